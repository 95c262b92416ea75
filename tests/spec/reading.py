"""Trains a little on the CPU, samples, and writes down which fields of its configuration were asked for.

usage: python -m tests.spec.reading FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from dfmspec import entry
from dfmspec.spec.base import Section
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.commands import sample
from tests.trainer.training import SHORT

asked: set[str] = set()
names: dict[type, str] = {field.annotation: name for name, field in Experiment.model_fields.items() if field.annotation}


def recorded(section: Section, name: str) -> Any:
    """Attribute access that remembers the fields."""
    if name in type(section).model_fields and type(section) in names:
        asked.add(f"{names[type(section)]}.{name}")
    return object.__getattribute__(section, name)


def main(folder: str) -> int:
    """Train three iterations on embedded pictures, with everything that may happen in between, and draw one."""
    Section.__getattribute__ = recorded  # type: ignore[method-assign, assignment]
    words = [*SHORT, "train.train_iters=3", "train.eval_iters=1", "train.eval_interval=1", "checkpoint.save_interval=1"]
    words += ["data.source=embedded", "data.num_samples=8", f"dataset.path={folder}/data", "dataset.num_workers=0"]
    words += [f"checkpoint.save={folder}/ckpt", f"logger.tensorboard_dir={folder}/tb", "logger.log_interval=2"]
    code = entry.main(words)
    parallel_state.destroy_model_parallel()
    code = code or sample.main([f"{folder}/ckpt", "--num-samples", "1", "--out", f"{folder}/samples"])
    Path(folder, "asked.json").write_text(json.dumps(sorted(asked)))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
