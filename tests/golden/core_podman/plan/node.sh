#!/usr/bin/env bash
# core-podman: any of 40 nodes; plan 54274b3bfe1d
# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are
set -eo pipefail
for name in "${!PET_@}" "${!TORCHELASTIC_@}" "${!TORCH_ELASTIC_@}"; do unset "$name"; done  # flags and words of another launcher
unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE OMP_NUM_THREADS PYTHON_EXEC PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE  # torchrun gives them to its ranks, or launcher.env does
set -u
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170  # torchrun waits so long for ranks that save
NODE_RANK="${1:?give the rank of this node, 0 to 39}"
DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)
export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"
[ -n "${DFMSPEC_RUN_DIR:-}" ] || export DFMSPEC_RUN_DIR="$DFMSPEC_BASE"/runs/core-podman/54274b3bfe1d  # checkpoints and logs; the same on every node
export DFMSPEC_PLAN_ID=sha256:54274b3bfe1d5623f7fc8846165f8621aaa77c9c94f65db0a10ee4eeed2e8805  # checkpoints say whose they are
mkdir -p "$DFMSPEC_RUN_DIR"
if [ -z "${DFMSPEC_INSIDE:-}" ]; then  # enter the container, and go on there
    unset DFM_ROOT PYTHONPATH  # of this machine, not of the container
    name="dfmspec-$(basename "$DFMSPEC_RUN_DIR")-node$NODE_RANK"
    trap 'podman kill "$name" > /dev/null 2>&1 || true' EXIT
    trap 'exit 143' HUP INT TERM
    words=(--env DFMSPEC_INSIDE=1)
    for name_of in DFMSPEC_BASE DFMSPEC_SPEC_DIR DFMSPEC_RUN_DIR DFMSPEC_ATTEMPT_DIR DFMSPEC_RDZV_ID DFMSPEC_MASTER_PORT MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES TQDM_DISABLE WANDB_RUN_ID WANDB_API_KEY WANDB_MODE HF_TOKEN HF_HUB_OFFLINE; do words+=(--env "$name_of"); done
    for place in "$DFMSPEC_BUNDLE" "$DFMSPEC_RUN_DIR" "$(realpath -ms -- /data/butterflies)" ${DFMSPEC_START:+"$DFMSPEC_START"}; do
        case "${words[*]} " in *" $place:$place "*) ;; *) words+=(--volume "$place:$place") ;; esac
    done
    podman run --rm --init --name "$name" --network host --ipc host --device nvidia.com/gpu=all \
        --workdir "$DFMSPEC_RUN_DIR" "${words[@]}" registry.example.org/dfmspec@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef \
        bash "$DFMSPEC_BUNDLE"/node.sh "$NODE_RANK" &
    code=0
    wait "$!" || code=$?
    trap - EXIT
    exit "$code"
fi
: "${MASTER_ADDR:?set MASTER_ADDR to that of node 0}"
: "${MASTER_PORT:?set MASTER_PORT to that of node 0}"
[ ! -e "$DFMSPEC_RUN_DIR"/preflight.sh ] || bash "$DFMSPEC_RUN_DIR"/preflight.sh "$NODE_RANK"  # of dfmspec run
exec torchrun --nproc-per-node 8 \
    --nnodes 40 \
    --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    "$DFMSPEC_BUNDLE"/examples/megatron/recipes/dit/pretrain_dit_model.py \
    --config-file "$DFMSPEC_BUNDLE"/config.yaml
