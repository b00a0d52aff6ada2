#!/usr/bin/env bash
# Say how a TPU and the training on it are: one line for the request, one a worker.
#
#   tpu_scripts/status.sh --name pod --zone us-west4-a
#
# A worker is idle, running (with its step), finished, stopped (saved, can be resumed) or failed (with its exit status).
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
