#!/usr/bin/env bash
# dfm-slurm: node 6 of 8; plan b5373f5c21ff
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE  # torchrun gives them to its ranks, or launcher.env does
export DFM_ROOT=/opt/DFM
set -u
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export WANDB_RESUME=allow
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/dfm-slurm/b5373f5c21ff  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:b5373f5c21ffc89aae62e96ae7741ca5efb375f33485a65010aabbb1d9c39154  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
export WANDB_RUN_ID="${WANDB_RUN_ID:-dfm-slurm-b5373f5c21ff}"
: "${MASTER_ADDR:?set MASTER_ADDR to that of node 0}"
: "${MASTER_PORT:?set MASTER_PORT to that of node 0}"
export PYTHONPATH="${DFM_ROOT:-/opt/DFM}${PYTHONPATH:+:$PYTHONPATH}"  # for the packages of its checkout
exec torchrun --nproc-per-node 4 \
    --nnodes 8 \
    --node-rank 6 \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    "${DFM_ROOT:-/opt/DFM}"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml \
    --mock
