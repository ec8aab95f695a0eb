#!/bin/bash
# prefill.py, attention.py and train_step.py at true geometry on one GPU of 80 GB or more, in under 8 minutes:
#   bash benchmarks/gpu.sh [FOLDER]        results go to FOLDER, else $OUT, else runs/gpu
cd "$(dirname "$0")/.." || exit 1
out=${1:-${OUT:-runs/gpu}}
failed=0
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
timeout 300 python benchmarks/prefill.py --geometry 7b --device cuda --turns 2 --out "$out/prefill" || failed=1
timeout 80 python benchmarks/attention.py --device cuda --max-cells inf --backends sdpa varlen xformers \
    --write --out "$out/attention" || failed=1
timeout 100 python benchmarks/train_step.py --geometry 2b --device cuda --samples 8 --out "$out/train_step" || failed=1
exit $failed
