#!/usr/bin/env bash
# trial: node 0 of 1; plan c9a001f9abbe
set -eo pipefail
set -u
here=$(cd "$(dirname "$0")" && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"  # relative paths of the plan are relative to this
export OMP_NUM_THREADS=1
exec torchrun --nproc-per-node 2 \
    "$here"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$here"/config.yaml
