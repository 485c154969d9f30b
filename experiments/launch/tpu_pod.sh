#!/usr/bin/env bash
# Takes a slice of a TPU pod as a queued resource, trains on all its workers, and takes another one after a preemption.
#
#   experiments/launch/tpu_pod.sh run 1b --output /mnt/shared/runs/1b --mesh.fsdp 16   all of it, until it is finished
#   experiments/launch/tpu_pod.sh up      only take the slice and install
#   experiments/launch/tpu_pod.sh stop    save and end the run on all workers; Ctrl-C during `run` does the same
#   experiments/launch/tpu_pod.sh down    give the slice back
#
# IT BILLS from the moment the slice is ACTIVE until `down`, also when the run is finished, crashed or stopped: chips x
# hours x the price in that zone. Run it in the root of this repository, where it can stay: in tmux on a small machine
# of the same zone, after `gcloud auth login` and `ssh-add ~/.ssh/google_compute_engine`. What is committed here is what
# runs there. The arguments of `run` go to experiments.mesanet.pretrain. DRY_RUN=1 prints the commands instead.
set -euo pipefail

NAME=${NAME:-}               # of the slice, such as mesa
ZONE=${ZONE:-}               # such as us-east5-a
ACCELERATOR=${ACCELERATOR:-} # such as v5p-128, which is 64 chips
RUNTIME=${RUNTIME:-}         # such as v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv6e (v6e)
SHARED=${SHARED:-}           # ADDRESS:/EXPORT of an NFS server (Filestore); the workers mount it at /mnt/shared
SPOT=${SPOT:-}               # anything: cheaper, and preempted when somebody else pays more
POLL=${POLL:-30}             # seconds between two looks at the queue
DRY_RUN=${DRY_RUN:-}

WORKER=mesanet/experiments/launch/tpu_worker.sh

main() {
  local command=${1:-}
  for variable in NAME ZONE ACCELERATOR RUNTIME SHARED; do need "$variable"; done
  case $command in
    run) run "${@:2}" ;;
    start) start "${@:2}" ;; # one round of `run`
    up)
      pack
      up
      ;;
    stop) stop ;;
    down) tpus queued-resources delete "$NAME" --zone="$ZONE" --force ;;
    *) fail "give one of run, up, stop and down, not '$command'." ;;
  esac
}

need() { [ -n "${!1}" ] || fail "$1 is not set; the head of $0 says what it is."; }

fail() {
  echo "error: $*" >&2
  exit 2
}

run() {
  local status=0
  pack
  if [ -n "$DRY_RUN" ]; then
    start "$@"
  else
    PAUSE=$POLL experiments/launch/restart.sh "$0" start "$@" || status=$?
    echo "$NAME still bills; $0 down gives it back." >&2
  fi
  exit "$status"
}

# Once for all rounds, so that no round goes on with other code.
pack() {
  ARCHIVE=$(mktemp --suffix=.tar.gz)
  export ARCHIVE
  trap 'rm -f "$ARCHIVE"' EXIT
  git archive --format=tar.gz --output="$ARCHIVE" HEAD
}

start() {
  trap 'stop || true; exit 130' INT
  up
  on all "$WORKER train $(printf '%q ' "$@")" || true # versions of gcloud make different things of many statuses
  [ "$(state)" = ACTIVE ] || exit 143
  on 0 "$WORKER status"
}

stop() { on all "$WORKER stop"; }

# Asks for a slice if there is none, gives back what is left of a preempted one, waits, and installs.
up() {
  local now last=
  [ -z "$DRY_RUN" ] || create
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case $now in
      '') create ;;
      SUSPENDED) tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet ;;
      FAILED) fail "the request failed; gcloud compute tpus queued-resources describe $NAME --zone=$ZONE says why." ;;
    esac
    [ "$now" = "$last" ] || echo "$NAME: ${now:-asked for}" >&2
    last=$now
    sleep "$POLL"
  done
  tpus tpu-vm scp "$ARCHIVE" "$NAME:mesanet.tar.gz" --zone="$ZONE" --worker=all
  on all "mkdir -p mesanet && tar -xzf mesanet.tar.gz -C mesanet && $WORKER install $(printf '%q' "$SHARED")"
}

create() {
  tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

# Of the request; nothing where there is none.
state() {
  if [ -n "$DRY_RUN" ]; then
    echo ACTIVE
  else
    tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' 2>/dev/null || true
  fi
}

on() {
  tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2" \
    --ssh-flag='-o ServerAliveInterval=60 -o ConnectTimeout=20'
}

tpus() {
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' gcloud compute tpus "$@"
    echo
  else
    gcloud compute tpus "$@"
  fi
}

main "$@"
