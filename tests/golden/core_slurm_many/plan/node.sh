#!/usr/bin/env bash
# many: any of 64 nodes; plan 2270646165c7
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE  # torchrun gives them to its ranks, or launcher.env does
set -u
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
NODE_RANK="${1:?give the rank of this node, 0 to 63}"
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/many/2270646165c7  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:2270646165c70a50fc8cc67956fa52f1f161b60ff87dbdf40d244f7cdade0f49  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
: "${MASTER_ADDR:?set MASTER_ADDR to that of node 0}"
: "${MASTER_PORT:?set MASTER_PORT to that of node 0}"
DFMSPEC_RDZV_ID="${DFMSPEC_RDZV_ID:-2270646165c7}"
[ ! -e "$DFMSPEC_RUN_DIR"/preflight.sh ] || bash "$DFMSPEC_RUN_DIR"/preflight.sh "$NODE_RANK"  # of dfmspec run
exec torchrun --nproc-per-node 8 \
    --nnodes 64 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    --rdzv-id "$DFMSPEC_RDZV_ID" \
    --rdzv-conf "is_host=$((NODE_RANK == 0))" \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
