#!/usr/bin/env bash
# Runs a command again until its exit status says that it is over; the other scripts here go through it.
#
#   experiments/launch/restart.sh COMMAND [ARGUMENT ...]
#
# Of experiments.mesanet.pretrain, 0 is a run that is finished, 2 a mistake that only its user can mend, 130 Ctrl-C;
# after anything else the same command goes on from the last checkpoint. What crashes soon after every start would crash
# for ever and bill for it, so a few such crashes in a row are the end, too. DRY_RUN=1 prints the command instead.
set -euo pipefail

FINAL=${FINAL:-0 2 130}   # exit statuses that are the end
PAUSE=${PAUSE:-10}        # seconds between a crash and the next start: the other hosts take up to ten to leave
SOON=${SOON:-600}         # seconds; a crash later than that is not held against the command
CRASHES=${CRASHES:-5}     # soon after the start and in a row, until it is given up
DRY_RUN=${DRY_RUN:-}

if [ -n "$DRY_RUN" ]; then
  printf '%q ' "$@"
  echo
  exit
fi

trap 'exit 130' INT # bash heeds both when the command has ended: it has saved everything by then
trap 'exit 143' TERM

crashes=0
while true; do
  begin=$SECONDS status=0
  "$@" || status=$?
  case " $FINAL " in *" $status "*) exit "$status" ;; esac
  crashes=$((crashes + 1))
  if [ "$status" -eq 143 ] || [ $((SECONDS - begin)) -ge "$SOON" ]; then
    crashes=0
  fi
  if [ "$crashes" -ge "$CRASHES" ]; then
    echo "error: $crashes crashes in a row within $SOON s of the start, the last with status $status; above is why." >&2
    exit "$status"
  fi
  echo "status $status: starting again in $PAUSE s" >&2
  sleep "$PAUSE"
done
