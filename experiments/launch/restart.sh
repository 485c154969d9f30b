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

# Whoever is asked to leave may be this script alone: it hands the signal on and waits until everything is saved. With -m
# the command is a process group of its own, which heeds Ctrl-C; without, bash makes what it does not wait for deaf to it.
set -m
child='' leave=''
hand_on() {
  leave=$1
  [ -z "$child" ] || kill "-$2" -- "-$child" 2>/dev/null || true
}
trap 'hand_on 130 INT' INT
trap 'hand_on 143 TERM' TERM

crashes=0
while true; do
  begin=$SECONDS status=0
  "$@" &
  child=$!
  while wait "$child" || status=$?; [ "$status" -gt 128 ] && kill -0 "$child" 2>/dev/null; do status=0; done
  child=''
  [ -z "$leave" ] || exit "$leave"
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
  sleep "$PAUSE" &
  wait $! || true
  [ -z "$leave" ] || exit "$leave"
done
