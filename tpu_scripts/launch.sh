#!/usr/bin/env bash
# Start `python -m train.sft CONFIG ...` on every worker of a TPU that was set up, with one log per worker.
#
#   tpu_scripts/launch.sh --name pod --zone us-west4-a --bucket gs://mine/run1 \
#       configs/listops_smollm2.py --optim.lr 3e-3
#
# CONFIG and what follows are passed to train.sft, except --out and --resume: a run that is already in --out or in
# --bucket is resumed, otherwise a new one starts. The training continues after you log out, until it has finished or is
# stopped (stop.sh).
#
# With --bucket, worker 0 copies the run folder there once a minute and at the end; nothing is ever deleted there.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project topology slices out bucket upload-every" "$@"
need name zone
((${#REST[@]})) || die "no CONFIG given" "for example: launch.sh --name $NAME --zone $ZONE configs/listops_smollm2.py"
for word in "${REST[@]}"; do
  case $word in
    --out | --out=*) die "--out is a flag of launch.sh" "put it before CONFIG" ;;
    --resume | --resume=*) die "--resume is not needed" "an existing run is resumed" ;;
  esac
done
check_run "${REST[@]}"
if [[ $TOPOLOGY ]]; then
  lookup "$TOPOLOGY"
  if ((HOSTS * SLICES > 1)) && [[ $OUT != /* ]] && ! out_is_safe; then
    say "note: $OUT is on each worker's own disk, but checkpoints of several hosts need a folder that all share:"
    say "      setup.sh --mount gs://BUCKET, then launch.sh --out '~/bucket/my-run'"
  fi
fi
one_place
run_arguments

if [[ $BUCKET ]]; then
  on_all "fetching the run" "$(remote restore "${RUN_ARGUMENTS[@]}")" ||
    die "not all workers have the run from $BUCKET, so nothing was started"
fi

# One worker decides: if every worker looked for itself, they could disagree.
answer=$(on_first "$(remote begun --out "$OUT")") || die "cannot look for $OUT on worker 0" "is the TPU set up?"
resume=()
if ((DRY_RUN)); then
  printf '%s\n' "$answer"
  say "(if that finds a run, the next command has --resume)"
elif [[ $answer == *"jaxsteer-run begun"* ]]; then
  resume=(--resume)
  say "Resuming the run in $OUT."
fi

on_all "starting" "$(remote start --out "$OUT" "${resume[@]}" -- "${REST[@]}")" ||
  die "the training did not start on all workers" "see above; stop the others with stop.sh before you launch again"
if [[ $BUCKET ]]; then
  on_first "$(remote upload "${RUN_ARGUMENTS[@]}" --every "$UPLOAD_EVERY")" ||
    die "the training is running, but is not being copied to $BUCKET" "fix the error above, then sync.sh up"
fi
hint "Started. Follow it with tpu_scripts/logs.sh --follow. To survive preemptions, use resume.sh instead."
