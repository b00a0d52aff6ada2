#!/usr/bin/env bash
#SBATCH --job-name=jaxsteer
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Train on GPU nodes under SLURM. From the root of the repository, with `.[train,cuda]` installed in .venv:
#
#   sbatch --gpus-per-node=4 tpu_scripts/slurm.sh --out runs/run1 configs/listops_smollm2.py --optim.lr 3e-3
#   bash tpu_scripts/slurm.sh --dry-run --out runs/run1 configs/listops_smollm2.py   # only check, and print it
#
# Options of sbatch override the #SBATCH lines above: one node of 8 GPUs, and one task that uses all of them. Several
# tasks form one run: train.sft finds them through SLURM's variables, and each uses its share of the node's GPUs. Use
# one task per node, or one per GPU with all GPUs visible (not --gpus-per-task).
#
# Five minutes before the time limit, and at a preemption, the tasks get SIGTERM and save; the job is requeued and
# resumes, until the training has finished. --out must be on a file system that all nodes share. Each task has its own
# log beside the run folder. PYTHON sets an interpreter other than .venv/bin/python.
set -euo pipefail

die() {
  printf 'error: %s\n' "$@" >&2
  exit 1
}

OUT='' DRY_RUN=0
while (($#)); do
  case $1 in
    -h | --help) sed -n '/^#$/,/^[^#]/ s/^#\( \|$\)//p' "$0" && exit 0 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --out) (($# > 1)) || die "--out needs a folder"; OUT=$2 && shift 2 ;;
    --out=*) OUT=${1#*=} && shift ;;
    -*) die "unknown flag $1; --out FOLDER and --dry-run come before CONFIG, the settings of train.sft after it" ;;
    *) break ;;
  esac
done
[[ $OUT ]] || die "--out is missing: the run folder, on a file system that all nodes share"
(($#)) || die "no CONFIG given, for example configs/listops_smollm2.py"
for word in "$@"; do
  case $word in
    --out | --out=* | --resume | --resume=*) die "${word%%=*} cannot be given after CONFIG; see --help" ;;
  esac
done
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON=${PYTHON:-.venv/bin/python}
[[ -z ${SLURM_GPUS_PER_TASK:-} ]] || die "--gpus-per-task hides GPUs from JAX: use --gpus-per-node"

# What `python -m train.sft` does before anything else: refuse a config that does not exist and options that it does not
# have, before other nodes are used.
if [[ ! -x $PYTHON ]] && ! command -v "$PYTHON" >/dev/null; then
  die "no such program: $PYTHON" "install jaxsteer in .venv (make install), or set PYTHON to an interpreter that has it"
fi
JAX_PLATFORMS=cpu "$PYTHON" -c '
import sys
from train.cli import from_command_line, run_main
from train.config import TrainConfig
run_main(lambda: from_command_line("sft", "", TrainConfig))' "$@" >/dev/null || die "train.sft does not accept: $*"

resume=()
if [[ -e $OUT/config.json ]]; then resume=(--resume); fi
command=(srun --kill-on-bad-exit=1 --gpu-bind=none --open-mode=append --output="$OUT.logs/%j-%t.log"
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
  "$PYTHON" -u -m train.sft "$@" --out "$OUT" "${resume[@]}")
if ((DRY_RUN)); then
  printf '%s ' "${command[@]@Q}"
  echo
  exit 0
fi

mkdir -p "$OUT.logs" # SLURM does not create log folders, and fails without them
echo "start ${SLURM_RESTART_COUNT:-0}: ${SLURM_NTASKS:-1} tasks on ${SLURM_JOB_NODELIST:-this node}; logs: $OUT.logs"
trap : TERM # the tasks act on it; this script must live on to requeue the job
"${command[@]}" &
step=$!
while :; do
  wait "$step" && code=0 || code=$?
  kill -0 "$step" 2>/dev/null || break
done
case $code in
  0) echo "finished: $OUT" ;;
  75)
    echo "stopped before the end, and saved: requeued"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
  *) die "srun exited with status $code; the tasks' logs are in $OUT.logs" ;;
esac
