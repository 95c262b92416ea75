#!/usr/bin/env bash
# dfm-one: node 0 of 1; plan 6c0815b18b0d
set -eo pipefail
set -u
here=$(cd "$(dirname "$0")" && pwd)
export DFMSPEC_RUN_DIR="${DFMSPEC_RUN_DIR:-$PWD/runs/dfm-one}"  # checkpoints and logs; the same on every node
export CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
exec torchrun --nproc-per-node 8 \
    "${DFM_ROOT:-/opt/DFM}"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$here"/config.yaml
