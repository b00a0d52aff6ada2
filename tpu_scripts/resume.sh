#!/usr/bin/env bash
# Keep a training going until it has finished: create the TPU if there is none, set it up, launch, watch; when the TPU
# is preempted, delete what is left of it, request another and resume from the last checkpoint in the bucket.
#
#   tpu_scripts/resume.sh --name pod --zone us-west4-a --topology v5e:2x4 --spot --bucket gs://mine/run1 \
#       configs/listops_smollm2.py --optim.lr 3e-3
#
# Takes the flags of create.sh, setup.sh and launch.sh; CONFIG and what follows are passed to train.sft. Run it in tmux
# or on a small machine: it polls every 20 seconds (POD_POLL), and can itself be stopped and restarted at any time.
#
# Preemptions are always retried. Failures of the training itself are retried --retries times in a row (after half an
# hour of training the count starts over); then this stops, names the worker and leaves the TPU for you to inspect.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project topology slices spot valid-until repo ref env-file mount out bucket upload-every retries
  then-delete" "$@"
need name zone topology
one_place
((${#REST[@]})) || die "no CONFIG given" "see resume.sh --help"
check_run "${REST[@]}"
lookup "$TOPOLOGY"
if [[ ! $BUCKET ]] && ! out_is_safe; then
  die "a preempted TPU would take $OUT with it" \
    "give --bucket gs://BUCKET/FOLDER, or --mount gs://BUCKET and --out '~/bucket/my-run'"
fi
pass_flags_on
lost=0 failures=0 set_up=0 began=$SECONDS

note() { say "[$(elapsed "$began")] $*"; }

# The TPU's state: absent, waiting, active, deleting, lost or unknown.
look() {
  local node state
  case $(queue_state) in
    ACTIVE)
      for node in $(nodes); do
        state=$(gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" --format='value(state)' 2>/dev/null) ||
          continue
        case $state in PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) echo lost && return ;; esac
      done
      echo active
      ;;
    ABSENT) echo absent ;;
    DELETING) echo deleting ;;
    FAILED | SUSPENDING | SUSPENDED) echo lost ;;
    UNKNOWN) echo unknown ;;
    *) echo waiting ;;
  esac
}

remove() {
  local command=(gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet)
  run "${command[@]}" || note "could not delete what is left of $NAME yet; will try again"
}

# How this pass ended: finished, failed, stopped or lost.
watch() {
  local states shown=-600
  while :; do
    states=$(worker_states)
    if ((SECONDS - shown >= 600)); then
      shown=$SECONDS
      note "${states:-the workers do not answer}"
    fi
    if [[ $(look) != active ]]; then echo lost && return; fi
    case $states in
      *' failed'*)
        # When one worker is preempted, the others fail before Google reports it.
        sleep "$POLL"
        if [[ $(look) != active ]]; then echo lost && return; fi
        printf '%s\n' "$states" >"$SCRATCH/states"
        echo failed
        return
        ;;
      *' running'*) ;;
      *' finished'*) echo finished && return ;;
      *' stopped'* | *' idle'*) echo stopped && return ;;
    esac
    sleep "$POLL"
  done
}

count_failure() { # count_failure WHAT; $lasted is how long the pass lasted
  if ((lasted > 1800)); then failures=0; fi
  failures=$((failures + 1))
  note "$1 (failure $failures in a row, retrying up to $RETRIES times)"
  ((failures <= RETRIES)) || die "giving up: $1" "the TPU $NAME still exists and is billed: logs.sh, then delete.sh"
}

finish() {
  if [[ $BUCKET ]]; then
    on_first "$(remote upload --out "$OUT" --bucket "$BUCKET")" ||
      die "the training has finished, but its run was not copied to $BUCKET" "try sync.sh up, then delete.sh"
  fi
  note "The training has finished; its run is in ${BUCKET:-$OUT}. Preemptions: $lost."
  if ((THEN_DELETE)); then
    "$SCRIPTS/delete.sh"
  else
    say "The TPU $NAME still exists and is billed: delete.sh removes it."
  fi
  exit 0
}

if ((DRY_RUN)); then
  say "# until the training has finished:"
  "$SCRIPTS/create.sh"
  "$SCRIPTS/setup.sh"
  "$SCRIPTS/launch.sh" "${REST[@]}"
  worker_states
  if [[ $BUCKET ]]; then on_first "$(remote upload --out "$OUT" --bucket "$BUCKET")"; fi
  say "# after a preemption, this, and then the same again:"
  remove
  if ((THEN_DELETE)); then say "# at the end:" && "$SCRIPTS/delete.sh"; fi
  exit 0
fi

while :; do
  case $(look) in
    unknown | deleting)
      sleep "$POLL"
      continue
      ;;
    lost)
      lost=$((lost + 1)) set_up=0
      note "$NAME was preempted (preemption $lost): deleting what is left of it and requesting another."
      if ((SLICES > 1)) && [[ $BUCKET ]]; then # worker 0's slice may have survived, with a newer checkpoint
        timeout 120 gcloud compute tpus tpu-vm ssh "$(first_node)" "${WHERE[@]}" --quiet --worker=0 \
          --command="$(remote upload --out "$OUT" --bucket "$BUCKET")" 2>/dev/null || true
      fi
      remove
      sleep "$POLL"
      continue
      ;;
    absent | waiting)
      code=0 set_up=0
      if [[ $(queue_state) == ABSENT ]]; then
        "$SCRIPTS/create.sh" || code=$?
      else
        POD_WAIT_ONLY=1 "$SCRIPTS/create.sh" || code=$?
      fi
      if ((code == 3)); then sleep "$POLL" && continue; fi
      ((code == 0)) || exit "$code"
      ;;
  esac

  passed=$SECONDS
  if [[ $(worker_states) != *' running'* ]]; then
    if ((set_up)) || "$SCRIPTS/setup.sh"; then set_up=1; fi
    if ! { ((set_up)) && "$SCRIPTS/launch.sh" "${REST[@]}"; }; then
      if [[ $(look) == active ]]; then
        lasted=0
        count_failure "setting up or launching failed"
        sleep "$POLL"
      fi
      continue
    fi
  fi
  verdict=$(watch)
  lasted=$((SECONDS - passed))
  case $verdict in
    finished) finish ;;
    lost) ;;
    failed)
      say "$(cat "$SCRATCH/states")"
      on_all "last lines of the logs" "$(remote log --lines 15)" || true
      on_all "stopping the others" "$(remote stop --out "$OUT")" quiet || true
      count_failure "the training failed on $(awk '$2 == "failed" {printf "%s ", $1}' "$SCRATCH/states")"
      ;;
    stopped) count_failure "the training was stopped before its end" ;;
  esac
done
