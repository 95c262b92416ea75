#!/usr/bin/env bash
# dfm-pyxis: node 0 of 2; plan 811a00ff4429
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE  # torchrun gives them to its ranks, or launcher.env does
set -u
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/dfm-pyxis/811a00ff4429  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:811a00ff44295665d8dd87d76569ed79b6c22c5926642d1657167431210cc9b2  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
: "${MASTER_ADDR:?set MASTER_ADDR to that of node 0}"
: "${MASTER_PORT:?set MASTER_PORT to that of node 0}"
[ -n "${DFM_ROOT:-}" ] || export DFM_ROOT=/opt/DFM  # where NVIDIA DFM is
export PYTHONPATH="$DFM_ROOT${PYTHONPATH:+:$PYTHONPATH}"  # for the packages of its checkout
export DFMSPEC_HANDLER=megatron.bridge.training.utils.sig_utils:DistributedSignalHandler  # it is made, and rank.py installs it
[ ! -e "$DFMSPEC_RUN_DIR"/preflight.sh ] || bash "$DFMSPEC_RUN_DIR"/preflight.sh 0  # of dfmspec run
exec torchrun --nproc-per-node 8 \
    --nnodes 2 \
    --node-rank 0 \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    ${DFMSPEC_ATTEMPT_DIR:+"$DFMSPEC_BUNDLE"/rank.py} "$DFM_ROOT"/examples/megatron/recipes/wan/pretrain_wan.py \
    --training-mode pretrain \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
