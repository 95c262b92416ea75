#!/usr/bin/env bash
# hostile: node 0 of 1; plan 9e0cf1192b51
set -eo pipefail
set -u
here=$(cd "$(dirname "$0")" && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"  # relative paths of the plan are relative to this
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export NOTE='$HOME '"'"'and'"'"' "more"'
exec torchrun --nproc-per-node 2 \
    "$here"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$here"/config.yaml
