#!/usr/bin/env bash
# trial: node 0 of 1; plan baed00a093be
set -eo pipefail
set -u
export OMP_NUM_THREADS=1
DFMSPEC_BUNDLE=$(cd "$(dirname "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"  # relative paths of the plan are relative to this
exec torchrun --nproc-per-node 2 \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
