#!/usr/bin/env bash
# Start a training on every worker of a TPU that was set up: `python -m train.sft CONFIG ...`, one log a worker.
#
#   tpu_scripts/launch.sh --name pod --zone us-west4-a --bucket gs://mine/run1 \
#       configs/listops_smollm2.py --optim.lr 3e-3
#
# CONFIG and what follows are train.sft's; --out and --resume are not among them: a run that is in --out or in --bucket
# already is resumed, otherwise it begins. The training goes on when you log out, and ends when it has finished or is
# told to (stop.sh).
#
# With --bucket, worker 0 copies the run folder there once a minute and at the end, and nothing is ever deleted there.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name zone project topology slices out bucket upload-every" "$@"
need name zone
((${#REST[@]})) || die "no CONFIG given" "for example: launch.sh --name $NAME --zone $ZONE configs/listops_smollm2.py"
for word in "${REST[@]}"; do
  case $word in
    --out | --out=*) die "--out is launch.sh's own flag here" "put it before CONFIG" ;;
    --resume | --resume=*) die "--resume is not needed" "a run that is there already is resumed" ;;
  esac
done
if [[ $TOPOLOGY ]]; then
  lookup "$TOPOLOGY"
  if ((HOSTS * SLICES > 1)) && [[ $OUT != /* ]] && ! out_is_safe; then
    say "note: $OUT is on each worker's own disk, and checkpoints of several hosts need a folder that all see:"
    say "      setup.sh --mount gs://BUCKET, then launch.sh --out '~/bucket/my-run'"
  fi
fi
one_place
run_arguments

if [[ $BUCKET ]]; then
  on_all "fetching the run" "$(remote restore "${RUN_ARGUMENTS[@]}")" ||
    die "not all workers have the run from $BUCKET, so nothing was started"
fi

# Asked once, of one worker: workers that each looked for themselves could disagree.
answer=$(on_first "$(remote begun --out "$OUT")") || die "cannot ask worker 0 for $OUT" "is the TPU set up?"
resume=()
if ((DRY_RUN)); then
  printf '%s\n' "$answer"
  say "(where that finds a run, the next command has --resume)"
elif [[ $answer == *"jaxsteer-run begun"* ]]; then
  resume=(--resume)
  say "Resuming the run in $OUT."
fi

on_all "starting" "$(remote start --out "$OUT" "${resume[@]}" -- "${REST[@]}")" ||
  die "the training did not start on all workers" "see above; stop the others before you launch again: stop.sh"
if [[ $BUCKET ]]; then
  on_first "$(remote upload "${RUN_ARGUMENTS[@]}" --every "$UPLOAD_EVERY")" ||
    die "the training runs, but nothing copies it to $BUCKET" "mend what is said above, then sync.sh up"
fi
hint "Started. Follow it with tpu_scripts/logs.sh --follow; keep it alive through preemptions with resume.sh instead."
