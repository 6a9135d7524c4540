#!/usr/bin/env bash
# The whole GPU table on a bare CUDA machine, in about 10 minutes: MFU, tokens/s, memory, bytes read
# and delivered, sampling (as one CUDA graph too), the optimizer, and a trace in outputs/gpu_trace.json.
#
#   scripts/bench_gpu.sh [PYTHON]      PYTHON: an interpreter with torch >= 2.11 (default: python3)
#
# No network is used. What torch's environment may lack (lightning, torchmetrics, rich and the like)
# is looked for in ./wheels, if that folder exists: fill it beforehand, on any machine, with
#   pip download --only-binary=:all: -d wheels --no-deps lightning lightning-utilities torchmetrics torchdiffeq safetensors rich \
#     numpy scipy pyyaml packaging tqdm
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
extra="$(mktemp -d)"
trap 'rm -rf "$extra"' EXIT
if [ -d wheels ]; then
  for wheel in wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$extra"; done
fi
export PYTHONPATH="$extra${PYTHONPATH:+:$PYTHONPATH}"
"$python" - <<'PY'
import torch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU: toy sizes'}")
PY
"$python" -m benchmarks ONLY=gpu
"$python" -m benchmarks ONLY=cuda_graph
