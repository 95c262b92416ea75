#!/usr/bin/env bash
# one: node 0 of 1; plan 16512f3d7bd6
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
set -u
export CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
DFMSPEC_BUNDLE=$(cd "$(dirname "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/one/16512f3d7bd6  # checkpoints and logs; the same on every node
mkdir -p "$DFMSPEC_RUN_DIR"
exec torchrun --nproc-per-node 8 \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
