#!/usr/bin/env bash
# Runs on a worker; the other scripts call it there, over ssh or as a pod's command.
#
#   worker.sh install                                   create .venv and install .[train,tpu]
#   worker.sh mount --bucket gs://BUCKET                mount a bucket as ~/bucket
#   worker.sh restore --out OUT --bucket B              restore the run from the bucket, unless OUT has one
#   worker.sh begun --out OUT                           print whether OUT has a run
#   worker.sh start --out OUT [--resume] -- CONFIG ...  train in the background, log to ~/.jaxsteer/train.log
#   worker.sh upload --out OUT --bucket B [--every S]   copy the run to the bucket once, or until it ends
#   worker.sh status --out OUT                          print idle, running, finished, stopped or failed
#   worker.sh log [--lines N|all] [--follow]            print the log
#   worker.sh stop --out OUT                            ask the training to save and stop, and wait
#   worker.sh pod --out OUT -- CONFIG ...               train in the foreground, in one pod of a JobSet
#
# --dry-run prints the command of train.sft, or of the copy, instead of running it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STATE=$HOME/.jaxsteer
LOG=$STATE/train.log
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
HOST=${HOSTNAME:-$(hostname)}
UNFINISHED='.*orbax-checkpoint-tmp.*|.*\.partial$' # files that Orbax or the run are still writing

say() { printf '%s: %s\n' "$HOST" "$*"; }
die() {
  printf '%s: error: %s\n' "$HOST" "$*" >&2
  exit 1
}

OUT='' BUCKET='' EVERY='' LINES=40 FOLLOW=0 RESUME=() JOIN=() DRY_RUN=0
VERB=${1:---help}
shift || true
while (($#)); do
  case $1 in
    --out) OUT=$2 && shift 2 ;;
    --bucket) BUCKET=$2 && shift 2 ;;
    --every) EVERY=$2 && shift 2 ;;
    --lines) LINES=$2 && shift 2 ;;
    --follow) FOLLOW=1 && shift ;;
    --resume) RESUME=(--resume) && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --) shift && break ;;
    *) die "worker.sh $VERB: unexpected '$1'" ;;
  esac
done
case $OUT in
  '' | gs://* | /*) ;;
  \~/*) OUT=$HOME/${OUT#\~/} ;;
  *) OUT=$ROOT/$OUT ;;
esac

run() {
  if ((DRY_RUN)); then
    printf '%s ' "${@@Q}"
    echo
  else
    "$@"
  fi
}

# has FOLDER FILE: whether a folder, here or in a bucket, has a file. Failing to look is an error, not a no.
has() {
  local error
  if [[ $1 != gs://* ]]; then
    [[ -e $1/$2 ]]
    return
  fi
  error=$(gcloud storage ls "$1/$2" 2>&1 >/dev/null) && return 0
  [[ $error == *"matched no objects"* ]] || die "cannot read $1: $error"
  return 1
}

# ---- installing

install_all() {
  local began=$SECONDS python
  cd "$ROOT"
  if ! [[ -x .venv/bin/python ]]; then
    for python in python3.13 python3.12 python3.11 python3; do
      # Without ensurepip, Python cannot create an environment.
      "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      python=
    done
    if [[ $python ]]; then
      "$python" -m venv .venv
    else # TPU images have Python 3.10
      say "no Python 3.11 or newer: installing one with uv"
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
  fi
  say "installing into $ROOT/.venv, a few minutes ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[train,tpu]' ||
    die "pip could not install .[train,tpu]; see its message above"
  .venv/bin/python -c 'import train.config' || die "the installed repository cannot be imported"
  say "installed in $((SECONDS - began)) s"
}

mount_bucket() {
  local packages
  if ! command -v gcsfuse >/dev/null; then
    say "installing gcsfuse ..."
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    packages="https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] $packages" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
  fi
  mkdir -p "$HOME/bucket"
  if mountpoint -q "$HOME/bucket"; then say "the bucket is already mounted" && return; fi
  # Other workers write here, so do not cache; a checkpoint is completed by renaming its folder.
  gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "${BUCKET#gs://}" "$HOME/bucket" || die "cannot mount $BUCKET: can the TPU's service account read and write it?"
  say "mounted $BUCKET as ~/bucket"
}

# ---- the run and its copy in the bucket

restore() {
  [[ $OUT != gs://* ]] || return 0
  if has "$OUT" config.json; then say "$OUT already has the run; left as it is" && return; fi
  if ! has "$BUCKET" config.json; then say "no run in $BUCKET yet" && return; fi
  if [[ -d $OUT ]]; then
    rmdir "$OUT" 2>/dev/null || die "$OUT is not empty and not a run; use another --out"
  fi
  # Under another name until complete: half a run would look like one that lost its checkpoints.
  mkdir -p "$OUT.restoring"
  gcloud storage rsync "$BUCKET" "$OUT.restoring" --recursive --exclude='logs/.*' || die "cannot copy from $BUCKET"
  mv "$OUT.restoring" "$OUT"
  say "restored the run from $BUCKET"
}

upload_once() {
  if ! has "$OUT" config.json; then say "nothing to copy yet: $OUT has no run" && return; fi
  if ((DRY_RUN == 0)) && has "$BUCKET" config.json; then
    gcloud storage cat "$BUCKET/config.json" | cmp -s - "$OUT/config.json" ||
      die "$BUCKET holds a run with other settings, so it was left alone; use another --bucket folder"
  fi
  # Without --delete-unmatched-destination-objects, so that nothing is deleted in the bucket. An old checkpoint may be
  # removed here while it is being copied; the others are still copied.
  run gcloud storage rsync "$OUT" "$BUCKET" --recursive --continue-on-error --exclude="$UNFINISHED" || return 1
  if [[ -f $LOG ]]; then run gcloud storage cp "$LOG" "$BUCKET/logs/$HOST.log" || true; fi
}

upload() {
  local try
  for try in 1 2 3; do
    upload_once && return
    sleep "$try"
  done
  die "cannot copy $OUT to $BUCKET"
}

# Copy repeatedly until the training has ended, and once more after that.
upload_until_end() {
  trap : TERM INT # at shutdown the training is still saving
  local ended=0
  while ((!ended)); do
    if [[ -e $STATE/exit ]] || ! alive; then ended=1; fi
    upload || true
    ((ended)) || { sleep "$EVERY" & wait $!; } || true
  done
}

# ---- training

# After a reboot, the process id in the file may belong to another program.
alive() { [[ -e $STATE/pid ]] && grep -qs worker.sh "/proc/$(cat "$STATE/pid")/cmdline"; }

# train CONFIG ...: run train.sft and set CODE to its exit status.
train() {
  local command=("$PYTHON" -u -m train.sft "$@" --out "$OUT" "${RESUME[@]}" "${JOIN[@]}")
  cd "$ROOT"
  if ((DRY_RUN)); then run "${command[@]}" && exit 0; fi
  if [[ -r $STATE/env ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$STATE/env"
    set +a
  fi
  "${command[@]}" &
  CHILD=$!
  echo "$CHILD" >"$STATE/child"
  CODE=0
  while :; do # a signal interrupts the wait, not the training
    wait "$CHILD" && CODE=0 || CODE=$?
    kill -0 "$CHILD" 2>/dev/null || break
  done
}

start() {
  ! alive || die "a training is already running here: stop it with stop.sh"
  mkdir -p "$STATE"
  rm -f "$STATE/exit"
  printf '\n==== %s %s ====\n' "$(date -u +%FT%TZ)" "$*" >>"$LOG"
  nohup setsid bash "${BASH_SOURCE[0]}" background --out "$OUT" "${RESUME[@]}" -- "$@" >>"$LOG" 2>&1 </dev/null &
  echo $! >"$STATE/pid"
  say "started, log in $LOG"
}

background() {
  trap : TERM INT
  JOIN=(--distributed.join yes) # only the slice's metadata server knows its workers
  train "$@"
  echo "$CODE" >"$STATE/exit.new"
  mv "$STATE/exit.new" "$STATE/exit"
}

status() {
  local state step
  if ! [[ -e $STATE/pid ]]; then
    state=idle
  elif [[ -e $STATE/exit ]]; then
    case $(cat "$STATE/exit") in
      0) state=finished ;;
      75) state='stopped, can be resumed' ;;
      *) state="failed with status $(cat "$STATE/exit")" ;;
    esac
  elif alive; then
    step=$(tail -n 1 "$OUT/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": *\([0-9]*\).*/ step \1/p') || true
    state=running${step:-}
  else
    state='failed without an exit status: killed, or out of memory'
  fi
  echo "jaxsteer-status $HOST $state"
}

stop() {
  local began=$SECONDS shown=$SECONDS
  alive || { say "nothing is running here" && return; }
  kill -TERM "$(cat "$STATE/child")" 2>/dev/null || true
  while alive; do
    sleep 0.2
    if ((SECONDS - shown >= 30)); then shown=$SECONDS && say "saving: $((SECONDS - began)) s"; fi
    ((SECONDS - began < 600)) || die "the training did not stop within ten minutes"
  done
  say "stopped"
}

# One pod of a JobSet. OUT is in a bucket that all pods mount. Exit status 75 asks to be restarted.
pod() {
  local decision=$OUT.start-${RUN_TOKEN:-0}-${RESTART_ATTEMPT:-0} waited=0
  STATE=$(mktemp -d)
  if ((DRY_RUN)); then train "$@"; fi
  mkdir -p "$(dirname "$OUT")"
  # Pods start at different times; if each looked for itself, they could disagree on whether there is a run to resume.
  if [[ ${JOB_INDEX:-0}-${JOB_COMPLETION_INDEX:-0} == 0-0 ]]; then
    rm -f "$OUT".start-*
    if has "$OUT" config.json; then echo --resume; else echo new; fi >"$decision"
  fi
  until [[ -s $decision ]]; do
    sleep 2
    ((waited += 2))
    ((waited < 1200)) || die "pod 0 of the first slice did not start within 20 minutes"
  done
  if [[ $(cat "$decision") == --resume ]]; then RESUME=(--resume); fi
  trap 'kill -TERM "$CHILD" 2>/dev/null' TERM INT
  train "$@"
  if ((CODE == 75)); then say "stopped before the end: to be restarted"; fi
  exit "$CODE"
}

case $VERB in
  install) install_all ;;
  mount) mount_bucket ;;
  restore) restore ;;
  begun) if has "$OUT" config.json; then echo jaxsteer-run begun; else echo jaxsteer-run new; fi ;;
  start) start "$@" ;;
  background) background "$@" ;;
  upload)
    if [[ $EVERY ]]; then
      mkdir -p "$STATE"
      nohup setsid bash "${BASH_SOURCE[0]}" uploading --out "$OUT" --bucket "$BUCKET" --every "$EVERY" \
        >>"$STATE/upload.log" 2>&1 </dev/null &
      say "copying to $BUCKET every $EVERY s"
    else
      upload
    fi
    ;;
  uploading) upload_until_end ;;
  status) status ;;
  log)
    [[ -f $LOG ]] || die "no log yet: nothing was started here"
    if [[ $LINES == all ]]; then LINES=+1; fi
    if ((FOLLOW)); then exec tail -n "$LINES" -F "$LOG"; else tail -n "$LINES" "$LOG"; fi
    ;;
  stop) stop ;;
  pod) pod "$@" ;;
  -h | --help) sed -n '2,/^[^#]/ s/^#\( \|$\)//p' "$0" ;;
  *) die "unknown '$VERB'; see worker.sh --help" ;;
esac
