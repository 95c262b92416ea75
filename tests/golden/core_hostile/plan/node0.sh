#!/usr/bin/env bash
# hostile: node 0 of 1; plan 26e3c09aa938
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE MASTER_ADDR MASTER_PORT  # torchrun gives them to its ranks, or launcher.env does
set -u
export NOTE='$HOME '"'"'and'"'"' "more"'
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/hostile/26e3c09aa938  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:26e3c09aa93800ccd0bc093081330916f27aa900ec9621a6abe77317901a71bc  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
[ -z "${DFMSPEC_MASTER_PORT:-}" ] || export PET_MASTER_ADDR=127.0.0.1 PET_MASTER_PORT="$DFMSPEC_MASTER_PORT"  # else it is always 29500
[ ! -e "$DFMSPEC_RUN_DIR"/preflight.sh ] || bash "$DFMSPEC_RUN_DIR"/preflight.sh 0  # of dfmspec run
exec torchrun --nproc-per-node 2 \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
