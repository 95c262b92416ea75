"""Sizes that a plan shows: operations by hand-made anchors, places of ranks by brute force."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.targets import target_module
from dfmspec.targets.layout import Layout, crossing, places
from tests.conftest import dfmspec


@pytest.mark.parametrize(("tokens", "megaflop_a_token"), [(2048, 4212), (8192, 6516), (15360, 9279)])
def test_the_operations_of_dit_xl_are_those_of_the_published_formula(tokens: int, megaflop_a_token: float) -> None:
    """One sample a pack and 512 tokens of text.

    24 S h^2 + 4 h sum(s^2) + 4 S h^2 + 4 C d h + 4 h s c a layer, three times.
    """
    values = resolve_spec(load_spec(None, [f"dataset.task_encoder_seq_length={tokens}", "recipe=dit_xl"])).values

    assert target_module("megatron_core").work(values).flops / tokens / 1e6 == pytest.approx(megaflop_a_token, rel=0.01)


@pytest.mark.parametrize(
    ("target", "recipe", "tokens"),
    [("dfm_wan", "wan_1_3b", 24 * 52 * 30), ("dfm_wan", "wan_14b", 24 * 52 * 30), ("dfm_flux", "flux_schnell", 4096)],
)
def test_the_operations_of_wan_and_flux_are_those_of_their_weights_and_of_attention(
    target: str, recipe: str, tokens: int
) -> None:
    """Six for each weight that a token meets, and 12 h s^2 a layer.

    In a joint block of FLUX, a token of the picture meets half of the weights, and modulation none.
    """
    values = resolve_spec(
        load_spec(None, [f"target={target}", f"recipe={recipe}", "data.source=mock", "cluster.nproc_per_node=8"])
    ).values
    length, operations, _ = target_module(target).work(values)
    layers = (
        values["model.num_layers"]
        if target == "dfm_wan"
        else values["model.num_joint_layers"] + values["model.num_single_layers"]
    )
    s, hidden, met = tokens, values["model.hidden_size"], target_module(target).parameters(values)
    if target == "dfm_flux":
        s, met = (
            tokens + 512,
            met - hidden**2 * (values["model.num_joint_layers"] * (12 + 12) + values["model.num_single_layers"] * 3),
        )
    else:
        met -= layers * 2 * hidden * values["model.crossattn_emb_size"]  # keys and values of the text
    attention = 12 * layers * hidden * s * s

    assert length == tokens
    assert operations - attention == pytest.approx(6 * met * s, rel=0.12)


@pytest.mark.parametrize("target", ["dfm_wan", "dfm_flux"])
def test_a_plan_of_every_network_tells_tokens_and_operations(target: str, tmp_path) -> None:
    (tmp_path / "s.yaml").write_text(
        f"target: {target}\ncluster: {{nproc_per_node: 8}}\ndataset: {{path: /data}}\n"
        "model: {tensor_model_parallel_size: 4}\ntrain: {global_batch_size: 8}\n"
    )
    done = dfmspec("plan", tmp_path / "s.yaml")

    assert re.search(r"an iteration is [\d,]+ tokens and [\d.]+ [TPE]FLOP", done.stdout), done.stderr


def test_ranks_come_as_data_too_and_flag_what_crosses_nodes(tmp_path) -> None:
    (tmp_path / "s.yaml").write_text(
        "cluster: {nnodes: 2, nproc_per_node: 2}\ndata: {source: mock}\nmodel: {tensor_model_parallel_size: 2}\n"
    )
    table, data = (
        dfmspec("plan", tmp_path / "s.yaml", "--ranks").stdout,
        json.loads(dfmspec("plan", tmp_path / "s.yaml", "--ranks", "--format", "json").stdout),
    )

    assert table.splitlines()[0].split() == ["rank", "node", "gpu", "tp", "cp", "dp*", "pp"]
    assert data["over_nodes"] == ["dp"]
    assert data["ranks"][3] == {
        "rank": 3,
        "node": 1,
        "gpu": 1,
        "tp": 1,
        "cp": 0,
        "dp": 1,
        "pp": 0,
    }


def test_the_parameters_of_dit_xl() -> None:
    assert target_module("megatron_core").parameters(resolve_spec(load_spec(None, [])).values) == 671_673_664


@pytest.mark.parametrize(
    ("tp", "cp", "dp", "pp", "nproc"),
    [
        c
        for c in itertools.product((1, 2, 4), (1, 2), (1, 2, 3), (1, 2, 4), (2, 4, 6))
        if (c[0] * c[1] * c[2] * c[3]) % c[4] == 0
    ],
)
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

    assert len(found) == world
    assert len({(p.node, p.gpu) for p in found}) == world == len({(p.tp, p.cp, p.dp, p.pp) for p in found})
    assert crossing(layout, nproc) == crossed


def test_a_plan_tells_sizes_ranks_and_reasons(tmp_path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(
        "cluster: {nnodes: 2, nproc_per_node: 2}\ndata: {source: embedded}\n"
        "model: {tensor_model_parallel_size: 2}\ntrain: {train_iters: 4000}\n"
    )
    text, table = dfmspec("plan", file).stdout, dfmspec("plan", file, "--ranks").stdout.splitlines()
    why = dfmspec("plan", file, "--why", "scheduler.lr_warmup_iters").stdout

    assert "671.7 M parameters" in text
    assert "groups that reach over nodes: DP" in text
    assert table[0].split() == ["rank", "node", "gpu", "tp", "cp", "dp*", "pp"]
    assert table[4].split() == [
        "3",
        "1",
        "1",
        "1",
        "0",
        "1",
        "0",
    ]
    assert why.splitlines()[0].startswith("scheduler.lr_warmup_iters = 200  derived:")
    assert why.splitlines()[1].strip() == f"train.train_iters = 4000  spec: {file}:4:9"
