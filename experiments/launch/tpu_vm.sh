#!/usr/bin/env bash
# Trains on this machine, a TPU VM of one host or any other, and starts again after a crash.
#
#   VENV=~/venv experiments/launch/tpu_vm.sh 145m --output runs/145m --data.source shards/mine
#
# Run it in the root of this repository; all arguments go to experiments.mesanet.pretrain. A TPU VM BILLS as long as it
# exists, also when the run is finished, and this script deletes nothing. DRY_RUN=1 prints the command instead.
set -euo pipefail

VENV=${VENV:-} # virtual environment with this package in it: pip install -c constraints.txt -e ".[tpu]"

if [ -z "$VENV" ]; then
  echo "error: VENV is not set; give the virtual environment that this package is installed in." >&2
  exit 2
fi

exec experiments/launch/restart.sh "$VENV/bin/python" -m experiments.mesanet.pretrain "$@"
