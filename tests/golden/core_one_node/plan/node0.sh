#!/usr/bin/env bash
# one: node 0 of 1; plan ba31a61b3cf2
set -eo pipefail
set -u
here=$(cd "$(dirname "$0")" && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"  # relative paths of the plan are relative to this
export CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
exec torchrun --nproc-per-node 8 \
    "$here"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$here"/config.yaml
