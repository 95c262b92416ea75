#!/usr/bin/env bash
# agreed: node 0 of 4; plan c9a57649fe84
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE  # torchrun gives them to its ranks, or launcher.env does
set -u
export MASTER_ADDR=gpu-01
export MASTER_PORT=29400
export NCCL_IB_HCA=mlx5
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/agreed/c9a57649fe84  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:c9a57649fe84312ac37aa1a14c20a61d20b0862bdc19bb10e3ea5ce4eec2622b  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
DFMSPEC_RDZV_ID="${DFMSPEC_RDZV_ID:-c9a57649fe84}"
[ ! -e "$DFMSPEC_RUN_DIR"/preflight.sh ] || bash "$DFMSPEC_RUN_DIR"/preflight.sh 0  # of dfmspec run
exec torchrun --nproc-per-node 8 \
    --nnodes 4 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    --rdzv-id "$DFMSPEC_RDZV_ID" \
    --rdzv-conf is_host=1 \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
