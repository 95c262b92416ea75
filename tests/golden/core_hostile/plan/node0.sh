#!/usr/bin/env bash
# hostile: node 0 of 1; plan 26e3c09aa938
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
set -u
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export NOTE='$HOME '"'"'and'"'"' "more"'
DFMSPEC_BUNDLE=$(cd "$(dirname "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/hostile/26e3c09aa938  # checkpoints and logs; the same on every node
mkdir -p "$DFMSPEC_RUN_DIR"
exec torchrun --nproc-per-node 2 \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
