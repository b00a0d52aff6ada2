#!/usr/bin/env bash
# Ask the training on a TPU to save and stop, and wait until it has. launch.sh resumes it later.
#
#   tpu_scripts/stop.sh --name pod --zone us-west4-a
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project slices out" "$@"
need name zone
nothing_left
on_all "stopping" "$(remote stop --out "$OUT")" || die "not all workers stopped"
hint "Stopped. The TPU still exists and is billed: delete.sh removes it."
