"""Process groups, device, and the training objects that megatron-core builds from a configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.network.model import DiT, initialize, transformer_config
from dfmspec.trainer.ops.buffers import Incoming
from dfmspec.trainer.ops.graph import Graphs
from dfmspec.trainer.optim import gradients
from dfmspec.trainer.optim.ema import Ema
from dfmspec.trainer.optim.update import Update, update_of


def patience(experiment: Experiment) -> timedelta:
    """How long ranks wait for one another."""
    return timedelta(minutes=experiment.dist.distributed_timeout_minutes)


def initialize_distributed(experiment: Experiment) -> None:
    """Join the process groups that torchrun's environment and the layout describe; without torchrun, a world of one.

    Once for each layout: for another one, `parallel_state.destroy_model_parallel()` comes between.
    """
    model = experiment.model
    _choose_device(experiment)

    # Process groups.
    if not dist.is_initialized():
        alone: dict[str, Any] = {}
        if "RANK" not in os.environ:
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "gloo" if experiment.cluster.device == "cpu" else "nccl"
        dist.init_process_group(backend, timeout=patience(experiment), **alone)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        distributed_timeout_minutes=experiment.dist.distributed_timeout_minutes,
    )

    # Random state. Nothing is drawn in a block (no dropout), and to change the generator's state there is not possible
    # in a CUDA graph.
    tensor_parallel.model_parallel_cuda_manual_seed(experiment.rng.seed)
    tensor_parallel.get_cuda_rng_tracker().fork = nullcontext


def _choose_device(experiment: Experiment) -> None:
    """This process's device: the CPU, or the GPU of its local rank; on a GPU, repeatable where that is asked for."""
    device = experiment.cluster.device
    if device == "cpu":
        from dfmspec.trainer import cpu

        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        torch.set_num_threads(max(1, threads))
        cpu.install(device)
        return
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if experiment.model.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.use_deterministic_algorithms(True)


def build_model(experiment: Experiment) -> list[DiT]:
    """This rank's model chunks (one, or VPP of them), initialised the same in every layout."""
    config = transformer_config(experiment)
    stages = experiment.model.virtual_pipeline_model_parallel_size
    vp_stages: Sequence[int | None] = range(stages) if stages else [None]
    chunks = []
    for vp_stage in vp_stages:
        chunk = DiT(
            experiment,
            config,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        initialize(chunk, seed=experiment.rng.seed, std=experiment.model.init_method_std)
        chunks.append(chunk)
    return chunks


@dataclass
class Trainer:
    """What a training step works on."""

    experiment: Experiment
    chunks: list[DiT]
    """The bare model chunks of this rank."""
    model: list[Any]
    """The model chunks, wrapped for mixed precision and data parallelism."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ema: Ema
    update: Update
    incoming: Incoming
    """How gradients meet their buffers (`gradients.into_buffers`)."""
    graphs: Graphs | None = None
    """Runs a microbatch by a CUDA graph (`step.graphed`); None: megatron-core's schedule does."""

    def release_graphs(self) -> None:
        """Let go of the CUDA graphs; called before a process group is destroyed.

        NCCL waits there for every graph that holds one of its collectives.
        """
        if self.graphs:
            torch.cuda.synchronize()
            self.graphs = None


def build_trainer(experiment: Experiment, pretrained: Path | None = None) -> Trainer:
    """Model, DDP, distributed optimizer, schedule and averaged weights, from one configuration.

    `pretrained`: weights to start from.

    Raises:
        CheckpointError: these weights are of another network, or cannot be read.
    """
    # The model, and its wrapping.
    chunks = build_model(experiment)
    if pretrained:
        from dfmspec.trainer.network.weights import load_pretrained

        load_pretrained(chunks, pretrained)
    config = chunks[0].config
    model = _wrapped(experiment, chunks)

    # What follows the backward pass.
    incoming = gradients.into_buffers(model)
    ema = Ema(chunks, experiment.diffusion.ema_decay, model)
    optimizer = build_optimizer(experiment, model)
    scheduler = build_scheduler(experiment, optimizer)
    update = update_of(optimizer)

    # What megatron-core's schedules call.
    config.finalize_model_grads_func = gradients.finalize
    config.grad_scale_func = optimizer.scale_loss
    if experiment.ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    return Trainer(experiment, chunks, model, optimizer, scheduler, ema, update, incoming)


def _wrapped(experiment: Experiment, chunks: list[DiT]) -> list[Any]:
    """The chunks in mixed precision and DDP, with the same weights on all replicas."""
    config = chunks[0].config
    ddp = experiment.ddp
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_grad_reduce=ddp.overlap_grad_reduce,
        overlap_param_gather=ddp.overlap_param_gather,
        grad_reduce_in_fp32=ddp.grad_reduce_in_fp32,
        bucket_size=ddp.bucket_size,
        check_for_nan_in_grad=ddp.check_for_nan_in_grad,
    )
    model: list[Any] = list(chunks)
    if config.bf16:
        model = [Float16Module(config, chunk) for chunk in chunks]
    on_gpu = next(chunks[0].parameters()).is_cuda
    with _side_stream() if on_gpu else nullcontext():
        for index, chunk in enumerate(model):
            model[index] = DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
    for chunk in model:
        chunk.broadcast_params()
    return model


def _side_stream() -> AbstractContextManager[Any]:
    """Where gradients are accumulated: a CUDA graph can take in any stream but the default one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def build_optimizer(experiment: Experiment, model: list[Any]) -> MegatronOptimizer:
    """Adam over the model's parameters; 1-D parameters have no weight decay."""
    optimizer = experiment.optimizer
    bf16 = experiment.mixed_precision.bf16
    config = OptimizerConfig(
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
    )
    return get_megatron_optimizer(config, model)


def build_scheduler(experiment: Experiment, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up, decay and weight decay, counted in iterations."""
    schedule = experiment.scheduler
    stays = schedule.start_weight_decay == schedule.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=experiment.optimizer.lr,
        min_lr=experiment.optimizer.min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters,
        lr_decay_steps=schedule.lr_decay_iters,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=schedule.start_weight_decay,
        end_wd=schedule.end_weight_decay,
        wd_incr_steps=experiment.train.train_iters,
        wd_incr_style="constant" if stays else "linear",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
