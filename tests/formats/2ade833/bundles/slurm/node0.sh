#!/usr/bin/env bash
# tiny: node 0 of 2; plan 2d411c6cf974
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
set -u
export OMP_NUM_THREADS=1
DFMSPEC_BUNDLE=$(cd "$(dirname "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_SPEC_DIR:-}" ] || export DFMSPEC_SPEC_DIR="$DFMSPEC_BUNDLE"/../..  # paths of the spec are relative to this
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_SPEC_DIR"/runs/tiny/2d411c6cf974  # checkpoints and logs; the same on every node
mkdir -p "$DFMSPEC_RUN_DIR"
: "${MASTER_ADDR:?set MASTER_ADDR to that of node 0}"
: "${MASTER_PORT:?set MASTER_PORT to that of node 0}"
exec torchrun --nproc-per-node 1 \
    --nnodes 2 \
    --node-rank 0 \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
