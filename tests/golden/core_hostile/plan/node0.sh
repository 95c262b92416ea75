#!/usr/bin/env bash
# hostile: node 0 of 1; plan 03a80f44a024
set -eo pipefail
set -u
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export NOTE='$HOME '"'"'and'"'"' "more"'
DFMSPEC_BUNDLE=$(cd "$(dirname "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"  # relative paths of the plan are relative to this
exec torchrun --nproc-per-node 2 \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
