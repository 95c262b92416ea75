#!/usr/bin/env bash
# by_kubernetes: node 3 of 4; plan 550475a74bd9
set -eo pipefail
set -u
here=$(cd "$(dirname "$0")" && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"  # relative paths of the plan are relative to this
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
: "${MASTER_ADDR:?set MASTER_ADDR to that of node 0}"
: "${MASTER_PORT:?set MASTER_PORT to that of node 0}"
exec torchrun --nproc-per-node 8 \
    --nnodes 4 \
    --node-rank 3 \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    "$here"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$here"/config.yaml
