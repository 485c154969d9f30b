#!/usr/bin/env bash
# What tpu_pod.sh has each worker of a slice do; in the worker's home: mesanet, venv and pretrain.{lock,pid,status}.
#
#   tpu_worker.sh install ADDRESS:/EXPORT | train [ARGUMENT ...] | stop | status
set -euo pipefail

cd "$(dirname "$0")/../../.."

install() {
  if ! mountpoint -q /mnt/shared; then
    sudo apt-get install -y -qq nfs-common
    sudo mkdir -p /mnt/shared
    sudo mount "$1" /mnt/shared
  fi
  python3 -m pip install --user --quiet uv # the Python of the machine is older than 3.11
  [ -d venv ] || python3 -m uv venv --quiet --python 3.12 venv
  python3 -m uv pip install --quiet --python venv/bin/python -c mesanet/constraints.txt -e "mesanet[tpu]"
}

train() {
  local status=0
  exec 9>pretrain.lock # the command inherits it: a broken connection leaves a process behind that holds the TPU
  if ! flock --wait 300 9; then
    echo "error: an earlier start still holds this worker; end it with tpu_pod.sh stop." >&2
    status=2
  else
    rm -f pretrain.status
    (echo "$BASHPID" >pretrain.pid && cd mesanet && exec ../venv/bin/python -m experiments.mesanet.pretrain "$@") ||
      status=$?
  fi
  echo "$status" >pretrain.status
  exit "$status"
}

stop() { kill -TERM "$(cat pretrain.pid)"; }

status() {
  local found
  found=$(cat pretrain.status) # or this is the end, with status 1
  exit "$found"
}

"$@"
