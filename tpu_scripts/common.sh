# shellcheck shell=bash
# Shared by the scripts in this folder: flags, dry runs, workers, the table of topologies.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION (on macOS: brew install bash)" >&2
  exit 1
}

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # for the scripts that source this file
ROOT=$(dirname "$SCRIPTS")

# All flags, their meaning and defaults. Each can also be set in the environment, as POD_NAME etc.
FLAGS=(name zone project topology slices spot valid-until wait-only repo ref env-file mount out bucket upload-every
  worker lines follow save discard retries then-delete image namespace service-account max-restarts dry-run)
declare -A ABOUT=(
  [name]="name of the TPU (its queued resource and nodes), or of the JobSet"
  [zone]="zone of the TPU, for example us-west4-a"
  [project]="Google Cloud project (default: gcloud's)"
  [topology]="topology of one slice: v5e:4x4, v6e:8x8, v5p:4x4x4, ..., or as it is sold: v5litepod-16, v6e-64, ..."
  [slices]="number of slices, joined over the data-centre network (default 1)"
  [spot]="use spot capacity: cheaper, but can be preempted at any time"
  [valid-until]="give up if there is no capacity within this time, for example 6h"
  [wait-only]="wait for an earlier request instead of making one"
  [repo]="git URL to clone on the workers (default: copy the tracked files of this checkout)"
  [ref]="branch or tag of --repo (default main)"
  [env-file]="file of NAME=value lines for the training, such as HF_TOKEN=...; copied privately, never printed"
  [mount]="gs://BUCKET to mount as ~/bucket on all workers, for a run folder that all of them share"
  [out]="run folder on the workers (default runs/sft); ~/bucket/... is in the mounted bucket"
  [bucket]="gs://BUCKET/FOLDER for this run: worker 0 copies the run folder there, and workers restore it from there"
  [upload-every]="seconds between copies to --bucket (default 60)"
  [worker]="index of the worker, or all (default 0)"
  [lines]="number of last log lines to show (default 40)"
  [follow]="keep showing new lines until Ctrl-C"
  [save]="local folder to download whole logs to, one file per worker"
  [discard]="delete without copying the run folder to a bucket first"
  [retries]="consecutive failures to retry, preemptions not counted (default 2)"
  [then-delete]="delete the TPU once the training has finished and its run is in the bucket"
  [image]="container image with this repository installed; see tpu_scripts/Dockerfile"
  [namespace]="Kubernetes namespace (default default)"
  [service-account]="Kubernetes service account with read and write access to the bucket (default default)"
  [max-restarts]="maximum restarts after failures, preemptions not counted (default 3)"
  [dry-run]="print every command instead of running it"
)
SWITCHES=" spot wait-only follow discard then-delete dry-run "
declare -A DEFAULT=([slices]=1 [ref]=main [out]=runs/sft [upload-every]=60 [worker]=0 [lines]=40 [retries]=2
  [namespace]=default [service-account]=default [max-restarts]=3)

# shellcheck disable=SC2034  # for the scripts that source this file
POLL=${POD_POLL:-20} # seconds between polls
REST=()              # command-line words after the flags
WHERE=()             # gcloud's flags for the zone and project

# hint ...: printed unless this is a dry run.
hint() { ((DRY_RUN)) || say "$@"; }
say() { printf '%s\n' "$*" >&2; }

# die WHAT_WAS_WRONG [WHAT_TO_DO ...]
die() {
  printf 'error: %s\n' "$1" >&2
  shift
  (($# == 0)) || printf '       %s\n' "$@" >&2
  exit 1
}

# The words as one line, quoted so that a shell reads them back unchanged.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=${line:+ }$word
  done
  printf '%s\n' "$line"
}

# Run a command; in a dry run, print it.
run() { if ((DRY_RUN)); then quoted "$@"; else "$@"; fi; }

# elapsed START: the time since START, a value of $SECONDS.
elapsed() {
  local s=$((SECONDS - $1))
  if ((s < 3600)); then
    printf '%dm%02ds' $((s / 60)) $((s % 60))
  else
    printf '%dh%02dm' $((s / 3600)) $((s / 60 % 60))
  fi
}

# variable FLAG: set $name to the flag's variable, as WAIT_ONLY for wait-only.
variable() {
  name=${1^^}
  name=${name//-/_}
}

help() {
  local flag
  sed -n '2,/^[^#]/ s/^#\( \|$\)//p' "$0"
  printf '\nFlags come first (each can also be set in the environment, as POD_NAME for --name):\n'
  for flag in "${KNOWN[@]}"; do
    if [[ $SWITCHES == *" $flag "* ]]; then printf '  --%s\n' "$flag"; else printf '  --%s VALUE\n' "$flag"; fi
    printf '        %s\n' "${ABOUT[$flag]}"
  done
}

# parse "flags of the script" "$@": set NAME, DRY_RUN and so on; the first non-flag word and all after it go to REST.
parse() {
  local flag name value
  read -ra KNOWN -d '' <<<"$1 dry-run" || true
  shift
  for flag in "${FLAGS[@]}"; do
    variable "$flag"
    value=POD_$name
    if [[ $SWITCHES == *" $flag "* ]]; then value=${!value:-0}; else value=${!value:-${DEFAULT[$flag]:-}}; fi
    printf -v "$name" '%s' "$value"
  done
  while (($#)); do
    case $1 in
      -h | --help) help && exit 0 ;;
      --) shift && break ;;
      --*) ;;
      *) break ;;
    esac
    flag=${1%%=*}
    flag=${flag#--}
    [[ " ${KNOWN[*]} " == *" $flag "* ]] || die "unknown flag --$flag" "known: ${KNOWN[*]/#/--}; see --help"
    variable "$flag"
    if [[ $SWITCHES == *" $flag "* ]]; then
      [[ $1 != *=* ]] || die "--$flag takes no value"
      value=1
    elif [[ $1 == *=* ]]; then
      value=${1#*=}
    else
      (($# > 1)) || die "--$flag needs a value" "$flag: ${ABOUT[$flag]}"
      value=$2
      shift
    fi
    printf -v "$name" '%s' "$value"
    shift
  done
  REST=("$@")
  if [[ $ZONE ]]; then WHERE=(--zone="$ZONE"); fi
  if [[ $PROJECT ]]; then WHERE+=(--project="$PROJECT"); fi
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "--slices: must be a whole number, at least 1; got '$SLICES'"
  [[ ! $NAME || $NAME =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
    die "--name: got '$NAME'" "use lowercase letters, digits and -, starting with a letter, at most 50 characters"
  [[ ! $BUCKET || $BUCKET =~ ^gs://[^/]+/[^/] ]] ||
    die "--bucket: got '$BUCKET'" "give a folder for this run alone, gs://BUCKET/FOLDER"
  BUCKET=${BUCKET%/}
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
}

need() {
  local flag name
  for flag in "$@"; do
    variable "$flag"
    [[ ${!name} ]] || die "--$flag is missing: ${ABOUT[$flag]}" "give the flag, or set POD_$name in the environment"
  done
}

nothing_left() { ((${#REST[@]} == 0)) || die "unexpected '${REST[0]}'" "this script takes only flags; see --help"; }

# Whether the run folder survives the TPU, because it is in a bucket (mounted or not).
# shellcheck disable=SC2088  # the worker expands the tilde
out_is_safe() { [[ $OUT == gs://* || $OUT == '~/bucket/'* ]]; }

# With the run folder already in a bucket, --bucket would copy it onto itself, or make a second copy.
one_place() {
  if [[ $BUCKET ]] && out_is_safe; then die "$OUT is already in a bucket" "leave out --bucket (POD_BUCKET=$BUCKET)"; fi
}

# For scripts that call other scripts: pass this one's flags on.
pass_flags_on() {
  local flag name
  for flag in "${FLAGS[@]}"; do
    variable "$flag"
    export "POD_$name=${!name}"
  done
}

# ---- the run

# What `python -m train.sft` does before anything else: read the config and the options.
READ_SETTINGS='
import sys
from train.cli import from_command_line, run_main
from train.config import TrainConfig
run_main(lambda: from_command_line("sft", "", TrainConfig))'

# check_run CONFIG ...: refuse a config that does not exist and options that train.sft does not have, before anything is
# created. Options are read by this checkout's own .venv (or PYTHON); without one, only the config is looked for.
# A config outside the repository, or in another one (--repo), cannot be seen from here.
check_run() {
  local python=${PYTHON:-$ROOT/.venv/bin/python} said config=$1
  if [[ ${REPO:-} || $config == /* || $config == '~'* ]]; then return 0; fi
  if [[ $config != -* && ! -f $ROOT/$config && ! -f $ROOT/configs/$config.py ]]; then
    said=$(cd "$ROOT" && printf '%s ' configs/*.py)
    die "no such config: $config" "CONFIG is a path in this repository or the name of one of these: $said" \
      "(if setup.sh cloned another repository, set POD_REPO to it as well: its configs cannot be seen from here)"
  fi
  if [[ ! -x $python ]]; then
    hint "note: the options after CONFIG are not checked, since there is no $python (make install)"
  elif ! said=$(cd "$ROOT" && JAX_PLATFORMS=cpu "$python" -c "$READ_SETTINGS" "$@" 2>&1 >/dev/null); then
    die "train.sft does not accept: $(quoted "$@")" "$said"
  fi
}

# ---- topologies

# lookup TOPOLOGY: set TOPOLOGY to the compiler's name of the slice (v5litepod-16 and v5e-16 are v5e:4x4), and SOLD_AS, 
# RUNTIME, CHIPS, HOSTS, GKE_ACCELERATOR and GKE_MACHINE; print both names.
lookup() {
  local row wanted=${1,,}
  wanted=${wanted/#v5e-/v5litepod-}
  wanted=${wanted/#v5lite-/v5litepod-}
  row=$(awk -v wanted="$wanted" '!/^#/ && ($1 == wanted || $2 == wanted)' "$SCRIPTS/topologies.txt")
  [[ $row ]] || die "unknown topology '$1'" "known: $(awk '!/^#/ {printf "%s ", $1}' "$SCRIPTS/topologies.txt")"
  # shellcheck disable=SC2034  # some are used by gke.sh
  read -r TOPOLOGY SOLD_AS RUNTIME CHIPS HOSTS GKE_ACCELERATOR GKE_MACHINE <<<"$row"
  say "$TOPOLOGY is sold as $SOLD_AS: $CHIPS chips on $HOSTS host(s) per slice, $SLICES slice(s)"
}

# ---- the queued resource

# One name per line. With several slices, gcloud numbers the nodes itself.
nodes() {
  local i
  if ((SLICES == 1)); then echo "$NAME"; else for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done; fi
}

first_node() { nodes | head -n 1; }

# Prints ACTIVE, SUSPENDED and so on; ABSENT if there is no queued resource; UNKNOWN if gcloud does not answer.
queue_state() {
  local state
  if state=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)' \
    2>"$SCRATCH/describe"); then
    echo "${state:-UNKNOWN}"
  elif grep -qi 'NOT_FOUND\|not found' "$SCRATCH/describe"; then
    echo ABSENT
  else
    say "cannot get the state of $NAME: $(tail -n 1 "$SCRATCH/describe")"
    echo UNKNOWN
  fi
}

# explain MESSAGE: say what an error of gcloud means. Status 0 if trying again later, or in another zone, can help.
explain() {
  local text=$1
  case $text in
    *[Qq]uota*)
      say "The project's quota is too small: Google Cloud limits the number of TPU chips per project and zone."
      say "  - request more at https://console.cloud.google.com/iam-admin/quotas (service: Cloud TPU API, zone: $ZONE)"
      say "  - spot and on-demand capacity have separate quotas: try with or without --spot"
      say "  - or use another --zone, a smaller --topology or fewer --slices"
      return 1
      ;;
    *capacity* | *RESOURCE_EXHAUSTED*)
      say "There is no free capacity in $ZONE at the moment: try another --zone, or wait (see --valid-until)."
      ;;
    *ALREADY_EXISTS* | *"already exists"*)
      say "$NAME already exists: wait for it (--wait-only), delete it (delete.sh), or use another --name."
      return 1
      ;;
    *PERMISSION_DENIED* | *SERVICE_DISABLED* | *"has not been used in project"*)
      say "gcloud has no permission: check 'gcloud auth list' and the project, and enable the Cloud TPU API:"
      say "  gcloud services enable tpu.googleapis.com"
      return 1
      ;;
    *) return 1 ;;
  esac
}

# ---- the workers

# remote ARGUMENTS: the command line that runs worker.sh with these arguments on a worker.
remote() { printf 'cd jaxsteer && %s' "$(quoted bash tpu_scripts/worker.sh "$@")"; }

# on_all LABEL COMMAND [quiet]: run a command on every worker of every slice at once; name those that fail and return 1.
# The output of a node's workers is left in $SCRATCH/NODE.
on_all() {
  local label=$1 command=$2 quiet=${3:-} node i began=$SECONDS shown=$SECONDS
  local -a all pids=() failed=()
  mapfile -t all < <(nodes)
  for node in "${all[@]}"; do
    local ssh=(gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --quiet --worker=all --command="$command")
    if ((DRY_RUN)); then
      quoted "${ssh[@]}"
    elif [[ $quiet ]]; then
      "${ssh[@]}" >"$SCRATCH/$node" 2>&1 &
      pids+=($!)
    else
      "${ssh[@]}" 2>&1 | tee "$SCRATCH/$node" | awk -v node="$node" '{print "[" node "] " $0; fflush()}' >&2 &
      pids+=($!)
    fi
  done
  for i in "${!pids[@]}"; do
    while kill -0 "${pids[i]}" 2>/dev/null; do
      sleep 0.1
      if ((SECONDS - shown >= 30)) && [[ ! $quiet ]]; then
        shown=$SECONDS
        say "... $label: $(elapsed "$began")"
      fi
    done
    wait "${pids[i]}" || failed+=("${all[i]}")
  done
  ((${#failed[@]})) || return 0
  [[ $quiet ]] || for node in "${failed[@]}"; do say "$label failed: $(blame "$node")"; done
  return 1
}

# blame NODE: which of its workers failed, according to gcloud's output, and a remedy if one is known.
blame() {
  local workers
  workers=$(awk '/^##### Command execution on worker [0-9]+ failed/ {print "worker " $6 ", exit status " $11}' \
    "$SCRATCH/$1" | tr -d . | sort -u | paste -sd ';' - | sed 's/;/; /g')
  printf '%s %s' "$1" "${workers:-, see above}"
  if grep -q 'SSH agent\|ssh-add' "$SCRATCH/$1"; then
    printf '\n  gcloud needs your key in the SSH agent: ssh-add ~/.ssh/google_compute_engine'
  fi
  grep -h 'error:\|ERROR' "$SCRATCH/$1" | tail -n 3 | sed 's/^/\n  /' | tr -d '\r' || true
}

# on_first COMMAND: run a command on worker 0 of the first slice, where JAX's process 0 runs, and print its output.
on_first() {
  run gcloud compute tpus tpu-vm ssh "$(first_node)" "${WHERE[@]}" --quiet --worker=0 --command="$1"
}

# One line per worker: HOST STATE DETAIL, where STATE is idle, running, finished, stopped or failed.
worker_states() {
  local node
  on_all "asking the workers" "$(remote status --out "$OUT")" quiet || true
  ((DRY_RUN)) || for node in $(nodes); do sed -n 's/^jaxsteer-status //p' "$SCRATCH/$node"; done
}

# Set RUN_ARGUMENTS: the arguments of worker.sh that say where the run is.
run_arguments() {
  RUN_ARGUMENTS=(--out "$OUT")
  if [[ $BUCKET ]]; then RUN_ARGUMENTS+=(--bucket "$BUCKET"); fi
}
