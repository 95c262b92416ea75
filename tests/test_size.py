"""Sizes that a plan shows: operations by hand-made anchors, places of ranks by brute force."""

from __future__ import annotations

import itertools

import pytest

from dfmspec.layout import Layout, crossing, places
from dfmspec.load import load_spec
from dfmspec.resolve import resolve_spec
from dfmspec.size import flops_per_pack, parameters
from tests.conftest import dfmspec


@pytest.mark.parametrize(("tokens", "megaflop_a_token"), [(2048, 4212), (8192, 6516), (15360, 9279)])
def test_the_operations_of_dit_xl_are_those_of_the_published_formula(tokens: int, megaflop_a_token: float) -> None:
    """One sample a pack and 512 tokens of text; 24 S h^2 + 4 h sum(s^2) + 4 S h^2 + 4 C d h + 4 h s c a layer, three times."""
    values = resolve_spec(load_spec(None, [f"dataset.task_encoder_seq_length={tokens}", "recipe=dit_xl"])).values

    assert flops_per_pack(values, tokens) / tokens / 1e6 == pytest.approx(megaflop_a_token, rel=0.01)


def test_the_parameters_of_dit_xl() -> None:
    assert parameters(resolve_spec(load_spec(None, [])).values) == 671_673_664


@pytest.mark.parametrize(("tp", "cp", "dp", "pp", "nproc"), [c for c in itertools.product((1, 2, 4), (1, 2), (1, 2, 3), (1, 2, 4), (2, 4, 6)) if (c[0] * c[1] * c[2] * c[3]) % c[4] == 0])
def test_groups_are_megatrons_and_crossing_ones_are_named(tp: int, cp: int, dp: int, pp: int, nproc: int) -> None:
    world = tp * cp * dp * pp
    layout = Layout(world, tp, pp, cp)
    found = list(places(layout, nproc))
    crossed = []
    for name in ("TP", "CP", "DP", "PP"):
        groups: dict[tuple, set[int]] = {}
        for place in found:
            others = tuple(getattr(place, other) for other in ("tp", "cp", "dp", "pp") if other != name.lower())
            groups.setdefault(others, set()).add(place.node)
        if any(len(nodes) > 1 for nodes in groups.values()):
            crossed.append(name)

    assert len(found) == world and len({(p.node, p.gpu) for p in found}) == world == len({(p.tp, p.cp, p.dp, p.pp) for p in found})
    assert crossing(layout, nproc) == crossed


def test_a_plan_tells_sizes_ranks_and_reasons(tmp_path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("cluster: {nnodes: 2, nproc_per_node: 2}\ndata: {source: embedded}\nmodel: {tensor_model_parallel_size: 2}\ntrain: {train_iters: 4000}\n")
    text, table = dfmspec("plan", file).stdout, dfmspec("plan", file, "--ranks").stdout.splitlines()
    why = dfmspec("plan", file, "--why", "scheduler.lr_warmup_iters").stdout

    assert "671.7 M parameters" in text and "groups that reach over nodes: DP" in text
    assert table[0].split() == ["rank", "node", "gpu", "tp", "cp", "dp", "pp"] and table[4].split() == ["3", "1", "1", "1", "0", "1", "0"]
    assert why.splitlines()[0].startswith("scheduler.lr_warmup_iters = 200  derived:") and why.splitlines()[1].strip() == f"train.train_iters = 4000  spec: {file}:4:9"
