#!/usr/bin/env bash
# Show the state of a TPU and of the training on it: one line for the request, then one per worker.
#
#   tpu_scripts/status.sh --name pod --zone us-west4-a
#
# A worker is idle, running (with its step), finished, stopped (saved, can be resumed) or failed (with an exit status).
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project slices out" "$@"
need name zone
nothing_left
if ((DRY_RUN)); then
  quoted gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)'
else
  echo "$NAME $(queue_state)"
fi
worker_states
