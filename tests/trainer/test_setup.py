"""Ranks wait for one another as long as the experiment says, and no longer."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT, environment

GROUPS = """
import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups

from dfmspec.spec.experiment import Experiment
from dfmspec.trainer import setup
from dfmspec.trainer.signals import StopSignal
from tests.trainer import parity

experiment = Experiment.model_validate(parity.experiment({}) | {"dist": {"distributed_timeout_minutes": 3}})
setup.initialize_distributed(experiment)
found = [groups.get_tensor_model_parallel_group(), groups.get_pipeline_model_parallel_group(), \
groups.get_data_parallel_group(with_context_parallel=True)]
found += [dist.group.WORLD, StopSignal(None, setup.patience(experiment))._group]
print({group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in found})
"""


def test_every_group_has_the_timeout_of_the_experiment() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUPS],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert done.stdout.splitlines()[-1:] == ["{180.0}"], done.stderr[-2000:]
