#!/usr/bin/env bash
# Put the repository on every worker of a TPU and install it there, into ~/jaxsteer/.venv.
#
#   tpu_scripts/setup.sh --name pod --zone us-west4-a
#
# Copies the tracked files of this checkout, uncommitted changes included; untracked files are not copied. With --repo
# the workers clone instead. Safe to run again: run folders on the workers are left alone.
#
# A TPU of several hosts needs a run folder that all workers share: --mount gs://BUCKET mounts a bucket as ~/bucket on
# each worker (with gcsfuse; a bucket with a hierarchical namespace renames folders atomically); then use
# launch.sh --out '~/bucket/my-run'.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project slices repo ref env-file mount" "$@"
need name zone
nothing_left
[[ ! $MOUNT || $MOUNT =~ ^gs://[^/]+/?$ ]] || die "--mount: got '$MOUNT'" "give a bucket without a folder: gs://BUCKET"
[[ ! $ENV_FILE || -r $ENV_FILE ]] || die "--env-file: cannot read $ENV_FILE"
began=$SECONDS

# copy FILE REMOTE_NAME
copy() {
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$1" "$node:$2" "${WHERE[@]}" --quiet --worker=all ||
      die "could not copy $(basename "$1") to all workers of $node" \
        "see gcloud's message above; if it mentions the SSH agent: ssh-add ~/.ssh/google_compute_engine"
  done
}

install=$(remote install)
if [[ $MOUNT ]]; then install+=" && $(quoted bash tpu_scripts/worker.sh mount --bucket "${MOUNT%/}")"; fi

if [[ $REPO ]]; then
  clone=$(quoted git clone --quiet --depth 1 --branch "$REF" "$REPO" jaxsteer)
  update=$(quoted git -C jaxsteer fetch --quiet --depth 1 origin "$REF")
  update+=' && git -C jaxsteer checkout --quiet FETCH_HEAD'
  command="if [ -d jaxsteer/.git ]; then $update; else $clone; fi && $install"
else
  git -C "$ROOT" rev-parse --git-dir >/dev/null 2>&1 ||
    die "$ROOT is not a git checkout" "give a URL to clone: --repo https://..."
  archive=${TMPDIR:-/tmp}/jaxsteer-$NAME.tar.gz
  pack=(git -C "$ROOT" archive --format=tar.gz --output="$archive")
  snapshot=(git -C "$ROOT" -c user.name=jaxsteer -c user.email=jaxsteer stash create)
  if git -C "$ROOT" diff --quiet HEAD --; then
    run "${pack[@]}" HEAD
  elif ((DRY_RUN)); then
    # shellcheck disable=SC2016  # printed, not expanded
    printf '%s "$(%s)"\n' "$(quoted "${pack[@]}")" "$(quoted "${snapshot[@]}")"
  else
    "${pack[@]}" "$("${snapshot[@]}")" # a commit of the changes, on no branch
  fi
  untracked=$(git -C "$ROOT" ls-files --others --exclude-standard | wc -l)
  if ((untracked)); then
    say "note: $((untracked)) untracked file(s) are not copied; git add those you need"
  fi
  copy "$archive" jaxsteer.tar.gz
  run rm -f "$archive"
  command="mkdir -p jaxsteer && tar -xzf jaxsteer.tar.gz -C jaxsteer && $install"
fi
if [[ $ENV_FILE ]]; then
  on_all "making a private folder" "mkdir -p .jaxsteer && chmod 700 .jaxsteer" ||
    die "could not prepare all workers for --env-file"
  copy "$ENV_FILE" .jaxsteer/env
fi
on_all "setting up" "$command" ||
  die "not all workers are set up, so nothing can be launched" "fix the error above and run setup.sh again"
hint "All workers are set up, $(elapsed "$began"). Next: tpu_scripts/launch.sh CONFIG"
