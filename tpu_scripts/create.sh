#!/usr/bin/env bash
# Request a TPU of one or more slices, as a queued resource, and wait until it is ready.
#
#   tpu_scripts/create.sh --name pod --zone us-west4-a --topology v5e:2x4 --spot
#
# Topologies have the compiler's names; tpu_scripts/topologies.txt lists what each is sold as (v5e:4x4 is 16 chips, sold
# as v5litepod-16; v5p:4x4x4 is 64 chips, sold as v5p-128). Words after -- are passed on to
# `gcloud compute tpus queued-resources create`, for example: ... --spot -- --network=NAME --service-account=ADDRESS
#
# Waiting can take hours when capacity is short. Ctrl-C stops the waiting, not the request: --wait-only resumes it.
# Exit status: 0 the TPU is ready; 1 the request was refused; 3 it was preempted or found no capacity, so try again.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project topology slices spot valid-until wait-only" "$@"
need name zone

if ! ((WAIT_ONLY)); then
  need topology
  lookup "$TOPOLOGY"
  request=(gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}"
    --accelerator-type="$SOLD_AS" --runtime-version="$RUNTIME")
  if ((SLICES == 1)); then
    request+=(--node-id="$NAME")
  else
    request+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  if ((SPOT)); then request+=(--spot); fi
  if [[ $VALID_UNTIL ]]; then request+=(--valid-until-duration="$VALID_UNTIL"); fi
  request+=("${REST[@]}")
  if run "${request[@]}" 2>"$SCRATCH/refusal"; then
    cat "$SCRATCH/refusal" >&2
  else
    cat "$SCRATCH/refusal" >&2
    if explain "$(cat "$SCRATCH/refusal")"; then exit 3; fi
    die "$NAME was not created" "nothing is running and nothing is billed"
  fi
fi

if ((DRY_RUN)); then
  quoted gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)'
  exit 0
fi

began=$SECONDS shown=-60 before=
while :; do
  state=$(queue_state)
  if [[ $state != "$before" ]] || ((SECONDS - shown >= 60)); then
    say "[$(elapsed "$began")] $NAME: $state"
    before=$state shown=$SECONDS
  fi
  case $state in
    ACTIVE)
      say "$NAME is ready. Next: tpu_scripts/setup.sh"
      exit 0
      ;;
    FAILED)
      reason=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
        --format='value(state.failedData.error.message)' || true)
      say "The request failed: ${reason:-gcloud gives no reason}"
      if explain "$reason" || [[ ! $reason ]]; then exit 3; fi
      die "$NAME was not created" "delete the request before you try again: tpu_scripts/delete.sh --discard"
      ;;
    SUSPENDING | SUSPENDED)
      say "$NAME was preempted while it was being created."
      exit 3
      ;;
    ABSENT | DELETING) die "$NAME is gone: someone deleted it" "request it again without --wait-only" ;;
  esac
  sleep "$POLL"
done
