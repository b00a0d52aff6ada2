#!/usr/bin/env bash
# Show the training logs of a TPU's workers; each worker has its own.
#
#   tpu_scripts/logs.sh --name pod --zone us-west4-a --follow           # worker 0, until Ctrl-C
#   tpu_scripts/logs.sh --name pod --zone us-west4-a --worker all       # the last lines of every worker
#   tpu_scripts/logs.sh --name pod --zone us-west4-a --save logs/pod    # whole logs, one file a worker
#
# With several slices, --worker N means the first slice; --worker all and --save cover all slices.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project slices worker lines follow save" "$@"
need name zone
nothing_left
if [[ $SAVE ]]; then
  for node in $(nodes); do
    run mkdir -p "$SAVE/$node"
    run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --quiet --worker=all \
      --command="$(remote log --lines all)" --output-directory="$SAVE/$node"
  done
  hint "Logs are in $SAVE: one folder per slice, one file per worker."
  exit 0
fi
command=(log --lines "$LINES")
if ((FOLLOW)); then command+=(--follow); fi
if [[ $WORKER == all ]]; then
  on_all "reading logs" "$(remote "${command[@]}")" || die "could not read all logs"
else
  run gcloud compute tpus tpu-vm ssh "$(first_node)" "${WHERE[@]}" --quiet --worker="$WORKER" \
    --command="$(remote "${command[@]}")"
fi
