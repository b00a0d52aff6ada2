#!/usr/bin/env bash
# Delete a TPU, after saving its run and copying it to the bucket.
#
#   tpu_scripts/delete.sh --name pod --zone us-west4-a --bucket gs://mine/run1
#
# The workers' disks are deleted with the TPU. So the training is stopped first (it saves), then worker 0 copies the run
# folder to --bucket, and only then is the TPU deleted; if the copy fails, it is not. --discard skips all of this.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project slices out bucket discard" "$@"
need name zone
one_place
nothing_left
state=ACTIVE
if ! ((DRY_RUN)); then
  state=$(queue_state)
  if [[ $state == ABSENT ]]; then say "$NAME does not exist: nothing to delete." && exit 0; fi
fi
if [[ $state == ACTIVE || $state == UNKNOWN ]] && ! ((DISCARD)); then
  if [[ ! $BUCKET ]] && ! out_is_safe; then
    die "deleting $NAME would delete $OUT on its disks" \
      "give --bucket gs://BUCKET/FOLDER to copy it first, or --discard if it may be lost"
  fi
  on_all "stopping" "$(remote stop --out "$OUT")" ||
    die "the training did not stop, so $NAME was not deleted" "--discard deletes it anyway"
  if [[ $BUCKET ]]; then
    on_first "$(remote upload --out "$OUT" --bucket "$BUCKET")" ||
      die "the run was not copied to $BUCKET, so $NAME was not deleted" "--discard deletes it anyway"
  fi
fi
began=$SECONDS
hint "Deleting $NAME, a few minutes ..."
run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
hint "Deleted, $(elapsed "$began")."
