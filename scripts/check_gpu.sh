#!/usr/bin/env bash
# Whether the package computes on a bare CUDA machine what it computes on a CPU, then how fast: losses,
# samples, scores, resumption and two ranks against the CPU; MFU, data and memory of real runs, the
# samplers, extraction, a trace. 9 minutes; what was cut off goes on when the same line is run again.
#
#   scripts/check_gpu.sh [OUT] [PYTHON]   OUT: a folder (outputs/gpu); PYTHON: one with torch >= 2.11
#   DEVICE=cpu SMALL=1 ONLY=losses,samples scripts/check_gpu.sh     tries the script itself
#
# No network is used. torch and its torchvision are the machine's; what else it lacks (lightning, rich and the like)
# is looked for in ./wheels, if that folder exists: fill it beforehand, on any machine, with
#   pip download --only-binary=:all: -d wheels --no-deps lightning lightning-utilities torchmetrics torchdiffeq safetensors rich \
#     numpy scipy pyyaml packaging tqdm pillow webdataset braceexpand timm open_clip_torch ftfy wcwidth regex \
#     huggingface-hub filelock
set -euo pipefail
out=$(realpath -m "${1:-outputs/gpu}")
python="${2:-python3}"
[[ $python == */* ]] && python=$(realpath -s "$python")
cd "$(dirname "$0")/.."
mkdir -p "$out"
if [ -d wheels ]; then
  for wheel in wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$out/packages"; done
fi
export PYTHONPATH="$PWD:$out/packages${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" scripts/check_gpu.py "$out"
