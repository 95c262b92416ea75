#!/usr/bin/env bash
# dfm-docker: node 1 of 2; plan 812d9e2c124e
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE  # torchrun gives them to its ranks, or launcher.env does
set -u
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_SPEC_DIR:-}" ] || export DFMSPEC_SPEC_DIR="$DFMSPEC_BUNDLE"/..  # paths of the spec are relative to this
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/dfm-docker/812d9e2c124e  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:812d9e2c124e1558df1db08ec166a14192619d8849cc1d0f79319b1cd5f1d548  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
if [ -z "${DFMSPEC_INSIDE:-}" ]; then  # enter the container, and go on there
    unset DFM_ROOT PYTHONPATH  # of this machine, not of the container
    mkdir -p "$(realpath -ms -- /checkpoints/dfm)"
    name="dfmspec-$(basename "$DFMSPEC_RUN_DIR")-node1"
    trap 'docker kill "$name" > /dev/null 2>&1 || true' EXIT
    trap 'exit 143' HUP INT TERM
    words=(--env DFMSPEC_INSIDE=1)
    for name_of in DFMSPEC_BASE DFMSPEC_SPEC_DIR DFMSPEC_RUN_DIR DFMSPEC_ATTEMPT_DIR DFMSPEC_RDZV_ID DFMSPEC_MASTER_PORT MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES TQDM_DISABLE WANDB_RUN_ID WANDB_API_KEY WANDB_MODE HF_TOKEN HF_HUB_OFFLINE; do words+=(--env "$name_of"); done
    for place in "$DFMSPEC_BUNDLE" "$DFMSPEC_RUN_DIR" "$(realpath -ms -- "$DFMSPEC_SPEC_DIR"/'../the data')" "$(realpath -ms -- /checkpoints/dfm)" ${DFMSPEC_START:+"$DFMSPEC_START"}; do
        case "${words[*]} " in *" $place:$place "*) ;; *) words+=(--volume "$place:$place") ;; esac
    done
    words+=(--volume /scratch:/scratch)
    words+=(--volume /models:/mnt/models)
    docker run --rm --init --name "$name" --network host --ipc host --gpus all --ulimit memlock=-1 --user "$(id -u):$(id -g)" --env HOME=/tmp \
        --workdir "$DFMSPEC_RUN_DIR" "${words[@]}" nvcr.io/nvidia/dfm@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef \
        bash "$DFMSPEC_BUNDLE"/node1.sh &
    code=0
    wait "$!" || code=$?
    trap - EXIT
    exit "$code"
fi
: "${MASTER_ADDR:?set MASTER_ADDR to that of node 0}"
: "${MASTER_PORT:?set MASTER_PORT to that of node 0}"
[ -n "${DFM_ROOT:-}" ] || export DFM_ROOT=/opt/DFM  # where NVIDIA DFM is
export PYTHONPATH="$DFM_ROOT${PYTHONPATH:+:$PYTHONPATH}"  # for the packages of its checkout
export DFMSPEC_HANDLER=megatron.bridge.training.utils.sig_utils:DistributedSignalHandler  # it is made, and rank.py installs it
[ ! -e "$DFMSPEC_RUN_DIR"/preflight.sh ] || bash "$DFMSPEC_RUN_DIR"/preflight.sh 1  # of dfmspec run
exec torchrun --nproc-per-node 8 \
    --nnodes 2 \
    --node-rank 1 \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    ${DFMSPEC_ATTEMPT_DIR:+"$DFMSPEC_BUNDLE"/rank.py} "$DFM_ROOT"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
