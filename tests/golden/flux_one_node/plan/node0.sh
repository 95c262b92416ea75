#!/usr/bin/env bash
# flux: node 0 of 1; plan 1e937a050f2f
set -eo pipefail
set -u
here=$(cd "$(dirname "$0")" && pwd)
export DFMSPEC_RUN_DIR="${DFMSPEC_RUN_DIR:-$PWD/runs/flux}"  # checkpoints and logs; the same on every node
export CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
exec torchrun --nproc-per-node 8 \
    "${DFM_ROOT:-/opt/DFM}"/examples/megatron/recipes/flux/pretrain_flux.py \
    --config-file "$here"/config.yaml \
    --mock \
    --guidance-scale 4.0
