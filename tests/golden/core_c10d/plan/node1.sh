#!/usr/bin/env bash
# agreed: node 1 of 4; plan e880d7a2d892
set -eo pipefail
set -u
here=$(cd "$(dirname "$0")" && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"  # relative paths of the plan are relative to this
export MASTER_ADDR=gpu-01
export MASTER_PORT=29400
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800
export NCCL_IB_HCA=mlx5
DFMSPEC_RDZV_ID="${DFMSPEC_RDZV_ID:-e880d7a2d892}"
exec torchrun --nproc-per-node 8 \
    --nnodes 4 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    --rdzv-id "$DFMSPEC_RDZV_ID" \
    --rdzv-conf is_host=0 \
    "$here"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$here"/config.yaml
