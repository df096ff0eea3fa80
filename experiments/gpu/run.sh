#!/usr/bin/env bash
# Measures on one GPU what fits into some minutes: bash experiments/gpu/run.sh OUT [MINUTES] [--tiny]
#
# Tests that need a device, tables of time and memory, runs of the campaign. Everything is saved in OUT as it goes;
# called again with the same OUT, it goes on where it stopped. Needs torch, lightning and the extra "train"; timm,
# torchvision and torchdiffeq are measured beside it where they import. ODENETS_DATA names the folder of cifar10/.
# --tiny runs all of it at sizes for a CPU. `python experiments/gpu/tables.py OUT` prints the tables.
set -euo pipefail
out=${1:?usage: bash experiments/gpu/run.sh OUT [MINUTES] [--tiny]}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" experiments/gpu/session.py "$out" "${2:-9}" "${@:3}"
