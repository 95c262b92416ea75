"""NVIDIA DFM's script and the trainer on the same packs: what one draws is kept, and the other trains on it.

usage: torchrun --nproc-per-node 1 benchmarks/both.py record RECORD SCRIPT WORD...
       torchrun --nproc-per-node 1 benchmarks/both.py replay RECORD key=value...
       python benchmarks/both.py table LOG LOG...
       python benchmarks/both.py mixed OUT
       torchrun --nproc-per-node 1 benchmarks/both.py clock RECORD SCRIPT WORD...
       python benchmarks/both.py rate RECORD

`record` runs DFM's script with its words, as a bundle's node0.sh has them (target=dfm), and keeps each iteration's
pictures, texts after dropout, noise level and noise in the folder RECORD. `replay` is the trainer on them in place of
its own streams (one stream, one pack an iteration); evaluations are its own. `table` sets the losses and the gradient
norms of such logs beside each other. `mixed` makes a data set of pictures of 256 to 1,024 px; `clock` keeps only when
each iteration began and how many of its tokens are no padding, and `rate` prints tokens a second.
"""

from __future__ import annotations

import re
import runpy
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

RANGES = (0, 50, 100, 200, 300, 400, 500)
"""Iterations between which `table` takes means."""
SAMPLES = 512
"""Pictures of `mixed`."""
WARM_UP = 20
"""Iterations that `rate` leaves out."""


def main() -> int:
    what, *words = sys.argv[1:]
    return _COMMANDS[what](*words)


# NVIDIA DFM's side.


def _record(record: str, script: str, *words: str) -> int:
    """DFM's script; one file an iteration."""
    folder = Path(record)
    folder.mkdir(parents=True)
    number = count()

    def keep(x0: Tensor, condition: dict[str, Any], noise: Tensor, sigma: Tensor) -> None:
        kept = {
            "clean": x0[0],
            "noise": noise[0],
            "sigma": sigma,
            "context": condition["crossattn_emb"][0],
            **{name: condition[name] for name in ("seq_len_q", "seq_len_kv", "latent_shape")},
            **{name: condition[name] for name in ("seq_len_q_padded", "seq_len_kv_padded")},
        }
        torch.save({name: value.cpu() for name, value in kept.items()}, folder / f"{next(number)}.pt")

    return _run(script, words, keep)


def _clock(record: str, script: str, *words: str) -> int:
    """DFM's script; one line an iteration: its useful tokens, and when it began."""
    with Path(record).open("w", buffering=1) as lines:

        def keep(_x0: Tensor, condition: dict[str, Any], _noise: Tensor, _sigma: Tensor) -> None:
            useful = int(condition["seq_len_q"].sum())
            lines.write(f"{useful} {time.perf_counter()}\n")

        return _run(script, words, keep)


def _rate(record: str) -> int:
    """Useful tokens a second, from what `clock` wrote."""
    lines = [line.split() for line in Path(record).read_text().splitlines()][WARM_UP:]
    tokens = sum(int(useful) for useful, _ in lines[:-1])
    seconds = float(lines[-1][1]) - float(lines[0][1])
    print(f"{len(lines) - 1} iterations, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")
    return 0


def _run(script: str, words: tuple[str, ...], keep: Any) -> int:
    """Run DFM's script in this process; `keep` sees what each training iteration's loss is made of."""
    from dfm.src.megatron.model.dit.edm.edm_pipeline import EDMPipeline

    own = EDMPipeline.compute_loss_with_epsilon_and_sigma

    def kept(self: Any, x0: Tensor, condition: dict[str, Any], epsilon: Tensor, sigma: Tensor) -> Any:
        if self.net.training:
            keep(x0, condition, epsilon, sigma)
        return own(self, x0, condition, epsilon, sigma)

    EDMPipeline.compute_loss_with_epsilon_and_sigma = kept
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
    return 0


# The trainer's side.


def _replay(record: str, *words: str) -> int:
    """The trainer, on recorded packs and draws."""
    from dfmspec import entry
    from dfmspec.trainer.data import streams

    own = streams.Stream.__next__
    number = count()

    def following(self: Any) -> Any:
        pack = own(self)  # its state stays one that can be saved
        if self.split != "train":
            return pack
        return tuple(_samples(Path(record) / f"{next(number)}.pt"))

    streams.Stream.__next__ = following  # type: ignore[method-assign]
    return entry.main(list(words))


def _samples(file: Path) -> Iterator[Any]:
    """The samples of a recorded pack, with DFM's draws."""
    from dfmspec.trainer.data.microbatch import DrawnSample
    from dfmspec.trainer.data.patches import unpatchify
    from dfmspec.trainer.noise import Draw

    kept = torch.load(file)
    tokens = kept["seq_len_q_padded"].tolist()
    texts = kept["seq_len_kv_padded"].tolist()
    parts = zip(
        kept["clean"].float().split(tokens),
        kept["noise"].float().split(tokens),
        kept["context"].split(texts),
        kept["seq_len_q"].tolist(),
        kept["seq_len_kv"].tolist(),
        kept["latent_shape"].tolist(),
        strict=True,
    )
    for number, (clean, noise, text, used, words, shape) in enumerate(parts):
        noise_of = unpatchify(noise[:used], tuple(shape), 1, 2)
        yield DrawnSample(
            key=f"{file.stem}-{number}",
            latent=unpatchify(clean[:used], tuple(shape), 1, 2) / 0.5,
            context=text[:words],
            draw=Draw(float(kept["sigma"]), True, noise_of),
        )


def _mixed(out: str) -> int:
    """A data set of square pictures of 16 to 64 patches a side, each side as likely."""
    from dfmspec.trainer.prepare.sources import Picture
    from dfmspec.trainer.prepare.writer import write_dataset

    def pictures() -> Iterator[Picture]:
        generator = np.random.default_rng(0)
        for number in range(SAMPLES):
            side = 16 * int(generator.integers(16, 65))
            pixels = generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((side, side))
            yield Picture(f"{number:06d}", image, f"a picture of {side} pixels a side, number {number}")

    write_dataset(pictures(), Path(out), count=SAMPLES)
    return 0


# What came out.

_LINES = (
    re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+)"),
    re.compile(r"Iteration +(\d+)/\d+, Loss: ([\d.]+),.*grad norm: ([\d.]+)"),
)
"""An iteration, its loss and its gradient norm: of DFM's log, and of the trainer's."""


def _table(*logs: str) -> int:
    """Mean loss and gradient norm of each range of iterations, and how far each loss is from that of the first log."""
    first: dict[int, tuple[float, float]] = {}
    for log in logs:
        found = _read(Path(log).read_text(errors="replace"))
        first = first or found
        print(f"{log}: {len(found)} iterations; the first: {found.get(1)}")
        for low, high in pairwise(RANGES):
            own = [(n, *found[n]) for n in range(low + 1, high + 1) if n in found and n in first]
            if not own:
                continue
            loss = statistics.mean(each for _, each, _ in own)
            norm = statistics.mean(each for _, _, each in own)
            apart = statistics.mean(abs(each - first[n][0]) for n, each, _ in own)
            print(f"  {low + 1:3} to {high}: loss {loss:.4f}, gradient norm {norm:.4f}, apart {apart:.4f}")
    return 0


def _read(text: str) -> dict[int, tuple[float, float]]:
    found = {}
    for pattern in _LINES:
        for iteration, loss, norm in pattern.findall(text):
            found[int(iteration)] = (float(loss), float(norm))
    return found


_COMMANDS = {
    "record": _record,
    "replay": _replay,
    "table": _table,
    "mixed": _mixed,
    "clock": _clock,
    "rate": _rate,
}


if __name__ == "__main__":
    sys.exit(main())
