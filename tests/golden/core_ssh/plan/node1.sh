#!/usr/bin/env bash
# by-ssh: node 1 of 3; plan b0b03e00576e
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE  # torchrun gives them to its ranks, or launcher.env does
module load cuda/12.8
source /opt/venv/bin/activate
set -u
export A_FIRST=2
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export Z_LAST=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR=/shared/runs/by-ssh/b0b03e00576e  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:b0b03e00576ef39969d034ccea456cc380a8283580baab3b6b54326bd5d9c4d6  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
: "${MASTER_ADDR:?set MASTER_ADDR to that of node 0}"
: "${MASTER_PORT:?set MASTER_PORT to that of node 0}"
[ ! -e "$DFMSPEC_RUN_DIR"/preflight.sh ] || bash "$DFMSPEC_RUN_DIR"/preflight.sh 1  # of dfmspec run
exec torchrun --nproc-per-node 4 \
    --nnodes 3 \
    --node-rank 1 \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
