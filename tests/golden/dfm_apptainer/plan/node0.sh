#!/usr/bin/env bash
# dfm-apptainer: node 0 of 1; plan 2c80a803d887
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE MASTER_ADDR MASTER_PORT  # torchrun gives them to its ranks, or launcher.env does
if [ -z "${DFMSPEC_INSIDE:-}" ]; then
    module load apptainer
fi
set -u
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/dfm-apptainer/2c80a803d887  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:2c80a803d88774febbf3e58f9b1757fe91b748e723cca570d22a408d1b8583df  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
if [ -z "${DFMSPEC_INSIDE:-}" ]; then  # enter the container, and go on there
    unset DFM_ROOT PYTHONPATH  # of this machine, not of the container
    export DFMSPEC_INSIDE=1
    words=()
    for place in "$DFMSPEC_BUNDLE" "$DFMSPEC_RUN_DIR" "$(realpath -ms -- /data/butterflies)" ${DFMSPEC_START:+"$DFMSPEC_START"}; do
        case "${words[*]} " in *" $place:$place "*) ;; *) words+=(--bind "$place:$place") ;; esac
    done
    exec apptainer exec --nv --writable-tmpfs --pwd "$DFMSPEC_RUN_DIR" "${words[@]}" /images/dfm.sif \
        bash "$DFMSPEC_BUNDLE"/node0.sh
fi
[ -z "${DFMSPEC_MASTER_PORT:-}" ] || export PET_MASTER_ADDR=127.0.0.1 PET_MASTER_PORT="$DFMSPEC_MASTER_PORT"  # else it is always 29500
[ -n "${DFM_ROOT:-}" ] || export DFM_ROOT=/opt/DFM  # where NVIDIA DFM is
export PYTHONPATH="$DFM_ROOT${PYTHONPATH:+:$PYTHONPATH}"  # for the packages of its checkout
export DFMSPEC_HANDLER=megatron.bridge.training.utils.sig_utils:DistributedSignalHandler  # it is made, and rank.py installs it
[ ! -e "$DFMSPEC_RUN_DIR"/preflight.sh ] || bash "$DFMSPEC_RUN_DIR"/preflight.sh 0  # of dfmspec run
exec /opt/venv/bin/python -m torch.distributed.run --nproc-per-node 8 \
    ${DFMSPEC_ATTEMPT_DIR:+"$DFMSPEC_BUNDLE"/rank.py} "$DFM_ROOT"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
