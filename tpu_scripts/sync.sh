#!/usr/bin/env bash
# Copy a run between a TPU, its bucket and this computer. Nothing is ever deleted at the destination.
#
#   tpu_scripts/sync.sh --name pod --zone us-west4-a --bucket gs://mine/run1 up      # worker 0 -> bucket, now
#   tpu_scripts/sync.sh --name pod --zone us-west4-a --bucket gs://mine/run1 down    # bucket -> every worker
#   tpu_scripts/sync.sh --bucket gs://mine/run1 fetch runs/run1                      # bucket -> this computer
#   tpu_scripts/sync.sh --bucket gs://mine/run1 push runs/run1                       # this computer -> bucket
#
# launch.sh does up and down itself. Checkpoints that are still being written are left out. One run is never copied over
# another: up refuses a bucket folder with other settings, down leaves a worker that has a run alone, and push refuses a
# bucket folder that holds a run.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project slices out bucket" "$@"
need bucket
case ${REST[*]:-} in
  up)
    need name zone
    on_first "$(remote upload --out "$OUT" --bucket "$BUCKET")" || die "the run was not copied to $BUCKET"
    ;;
  down)
    need name zone
    on_all "fetching the run" "$(remote restore --out "$OUT" --bucket "$BUCKET")" || die "not all workers have the run"
    ;;
  fetch\ ?*)
    run mkdir -p "${REST[1]}"
    run gcloud storage rsync "$BUCKET" "${REST[1]}" --recursive
    ;;
  push\ ?*)
    [[ -f ${REST[1]}/config.json ]] || die "${REST[1]}: not a run folder (no config.json)"
    if ((DRY_RUN)); then
      quoted gcloud storage ls "$BUCKET/config.json"
    elif gcloud storage ls "$BUCKET/config.json" >/dev/null 2>&1; then
      die "$BUCKET already holds a run" "use another --bucket folder"
    fi
    run gcloud storage rsync "${REST[1]}" "$BUCKET" --recursive --exclude='.*orbax-checkpoint-tmp.*|.*\.partial$'
    ;;
  *) die "got '${REST[*]:-}'" "give up, down, fetch FOLDER or push FOLDER; see --help" ;;
esac
