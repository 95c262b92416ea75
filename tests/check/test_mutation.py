"""Valid specs with one entry broken, or one constraint between entries.

The code of that fault fires, and besides it only what follows from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dfmspec.check.rules import check_spec
from dfmspec.check.rules.base import ALL as EVERY
from dfmspec.check.rules.base import DFM, DFM_DIT, DIT, FLUX, OURS, WAN
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.read.document import parse_document, write_scalar
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec
from dfmspec.spec.catalogue import Catalogue, types
from dfmspec.targets import catalogue
from tests.conftest import ROOT

SPECS = sorted((ROOT / "specs").glob("*.yaml")) + sorted((ROOT / "tests" / "corpus" / "valid").glob("*.yaml"))


class Mutation(NamedTuple):
    """One edit of a spec's text, and the code that must fire."""

    what: str
    text: str
    code: str
    key: str
    without: str | None = None
    """The spec without the entry, where that is a line of its own."""


def findings(text: str, file: Path) -> tuple[Diagnostic, ...]:
    return check_spec(resolve_spec(load_spec(file, text=text)), levels=("spec",))


def mutations(file: Path) -> Iterator[Mutation]:
    """Every entry `section.field` of the file, broken in each way that its type has."""
    text = file.read_text()
    document = parse_document(text.encode(), str(file))
    legal = catalogue(load_spec(file).target)
    for path, span in document.keys.items():
        field = legal.field(".".join(map(str, path)))
        value = document.values[path]
        if (
            len(path) != 2
            or field is None
            or "properties" in field
            or span.line != value.line
            or value.line != value.end_line
        ):
            continue
        key = ".".join(map(str, path))

        def replaced(span: Any, new: str) -> str:
            lines = text.splitlines(keepends=True)
            line = lines[span.line - 1]
            lines[span.line - 1] = line[: span.column - 1] + new + line[span.end_column - 1 :]
            return "".join(lines)

        lines = text.splitlines(keepends=True)
        line = lines[span.line - 1]
        if "&" in line:  # others refer to it
            continue
        alone = not line[: span.column - 1].strip()  # a line of its own
        without = "".join(lines[: span.line - 1] + lines[span.line :]) if alone else None
        yield Mutation("misspelt", replaced(span, f"{path[1]}_x"), "SPC201", key, without)
        if alone:
            yield Mutation("doubled", "".join([*lines[: span.line], *lines[span.line - 1 :]]), "SPC102", key)
        for what, bad, code in broken_values(field, legal):
            yield Mutation(
                what, replaced(value, write_scalar(bad) if not isinstance(bad, dict | list) else "{a: 1}"), code, key
            )


def broken_values(field: dict[str, Any], legal: Catalogue) -> Iterator[tuple[str, Any, str]]:
    """Values that the field cannot have."""
    if "enum" in field:
        yield "no choice", "no such choice", "SPC203"
        return
    declared = types(field)
    if "string" not in declared and "object" not in declared:
        yield "text", "some text", "SPC202"
    if "object" not in declared:
        yield "a mapping", {}, "SPC202"
    if "null" not in declared:
        yield "null", None, "SPC202"
    if "boolean" not in declared:
        yield "a truth value", True, "SPC202"
    if "integer" in declared and "number" not in declared:
        yield "a fraction", field.get("minimum", 2) + 0.5, "SPC202"
    if declared in (("boolean",), ("boolean", "null")):
        yield "a number", 1, "SPC202"
    if "minimum" in field:
        yield "below the least", field["minimum"] - 1, "SPC204"
    if "exclusiveMinimum" in field:
        yield "the excluded least", field["exclusiveMinimum"], "SPC204"
    if "maximum" in field:
        yield "above the most", field["maximum"] + 1, "SPC204"


ALL = [(file, mutation) for file in SPECS for mutation in mutations(file)]


def test_there_are_enough_of_them() -> None:
    assert len(ALL) >= 2000


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_a_broken_entry_is_found_and_the_rest_stays_silent(file: Path) -> None:
    """A broken value silences the rules that ask for it; a misspelt key is as if it were not there."""
    before = {(finding.code, finding.path) for finding in findings(file.read_text(), file)}
    for mutation in (mutation for other, mutation in ALL if other == file):
        found = findings(mutation.text, file)
        errors = [finding for finding in found if finding.severity is Severity.ERROR]
        here = f"{mutation.key} {mutation.what}"

        assert mutation.code in {finding.code for finding in errors}, here
        allowed = before
        if mutation.what == "misspelt":
            if mutation.without is None:
                continue
            allowed = {(f.code, f.path) for f in findings(mutation.without, file)}
        assert [
            f"{f.code} {f.message}"
            for f in found
            if f.code != mutation.code and f.severity > Severity.HINT and (f.code, f.path) not in allowed
        ] == [], here


class Cross(NamedTuple):
    """One way to break a constraint between several keys of a valid spec."""

    code: str
    targets: tuple[str, ...]
    broken: Callable[[Mapping[str, Any], random.Random], list[str] | None]
    """The overrides that break it, from the spec's values; None when the spec has nothing to break."""
    also: str = ""
    """Codes that follow from it."""


TP, PP, CP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size", "model.context_parallel_size"
LENGTH, HEADS, HIDDEN = "dataset.task_encoder_seq_length", "model.num_attention_heads", "model.hidden_size"


def sizes(v: Mapping[str, Any]) -> tuple[int, int, int]:
    """(world size, model-parallel size, data-parallel size)."""
    world, parallel = v["cluster.nnodes"] * v["cluster.nproc_per_node"], v[TP] * v[PP] * v[CP]
    return world, parallel, world // parallel


def no_divisor(number: int, rng: random.Random) -> int:
    return rng.choice([n for n in range(2, 32) if number % n])


def needs(key: str, *words: str) -> Callable[[Mapping[str, Any], random.Random], list[str] | None]:
    """The words alone, where the spec has the key."""
    return lambda v, rng: [*words] if v.get(key) is not None else None


def fits_iterations(v: Mapping[str, Any]) -> bool:
    return v["train.train_iters"] is not None and v.get("train.train_samples") is None


CROSS = [
    # layout
    Cross(
        "PAR101",
        EVERY,
        lambda v, rng: [f"cluster.nproc_per_node={sizes(v)[1] + 1}", "cluster.nnodes=1"] if sizes(v)[1] > 1 else None,
    ),
    Cross(
        "PAR102",
        EVERY,
        lambda v, rng: [
            f"{TP}={(n := no_divisor(v[HEADS], rng))}",
            f"cluster.nproc_per_node={n * v[PP] * v[CP]}",
            "cluster.nnodes=1",
        ],
        "PAR105 SEQ101 PRE108 WAN105",
    ),
    Cross("PAR103", EVERY, lambda v, rng: ["model.sequence_parallel=true"] if v[TP] == 1 else None),
    Cross("PAR104", EVERY, lambda v, rng: [f"model.num_query_groups={v[HEADS] // 2}"] if v[HEADS] % 2 == 0 else None),
    Cross(
        "PAR105",
        EVERY,
        lambda v, rng: [f"model.ffn_hidden_size={v['model.ffn_hidden_size'] * v[TP] + 1}"] if v[TP] > 1 else None,
    ),
    Cross("PAR108", DFM_DIT, lambda v, rng: ["model.sequence_parallel=true"] if v[TP] > 1 else None),
    Cross(
        "PIP101",
        OURS,
        lambda v, rng: [
            f"{PP}={(n := no_divisor(v['model.num_layers'], rng))}",
            f"cluster.nproc_per_node={n * v[TP] * v[CP]}",
            "cluster.nnodes=1",
        ],
        "PIP102 PIP104",
    ),
    Cross("PIP102", OURS, lambda v, rng: ["model.virtual_pipeline_model_parallel_size=2"] if v[PP] == 1 else None),
    Cross(
        "PIP103",
        DFM_DIT,
        lambda v, rng: [f"{PP}=2", f"cluster.nproc_per_node={2 * v['cluster.nproc_per_node']}"],
        "DDP104",
    ),
    Cross("PIP104", OURS, lambda v, rng: ["ddp.overlap_grad_reduce=true"] if v[PP] > 1 else None),
    Cross("PAR110", DFM, lambda v, rng: [f"ddp.num_distributed_optimizer_instances={sizes(v)[2] * v[CP] + 1}"]),
    Cross("PAR111", DFM, needs("target", "model.hierarchical_context_parallel_sizes=[3,5]")),
    Cross(
        "WAN101", (*WAN, *FLUX), lambda v, rng: [f"{PP}=2", f"cluster.nproc_per_node={2 * v['cluster.nproc_per_node']}"]
    ),
    Cross("FLX104", FLUX, lambda v, rng: [f"{CP}=2", f"cluster.nproc_per_node={2 * v['cluster.nproc_per_node']}"]),
    # batch
    Cross(
        "BAT101",
        EVERY,
        lambda v, rng: (
            [f"train.global_batch_size={v['train.global_batch_size'] * v['train.micro_batch_size'] * sizes(v)[2] + 1}"]
            if v["train.micro_batch_size"] * sizes(v)[2] > 1 and v.get("train.rampup_batch_size") is None
            else None
        ),
    ),
    Cross(
        "BAT102",
        DFM_DIT,
        lambda v, rng: ["train.micro_batch_size=2", f"train.global_batch_size={2 * v['train.global_batch_size']}"],
        "BAT104",
    ),
    Cross(
        "BAT103", DFM, lambda v, rng: ["train.train_samples=100000000"] if fits_iterations(v) else None, "OPT107 OPT109"
    ),
    Cross(
        "BAT104",
        DFM,
        lambda v, rng: (
            [f"train.rampup_batch_size=[{v['train.global_batch_size']},1,100]"] if fits_iterations(v) else None
        ),
    ),
    Cross(
        "SPC301",
        DIT,
        lambda v, rng: [
            f"train.global_batch_size={v['train.global_batch_size']}",
            f"dataset.global_batch_size={v['train.global_batch_size'] + 1}",
        ],
        "SPC303",
    ),
    # length
    Cross(
        "SEQ101",
        OURS,
        lambda v, rng: (
            [f"{LENGTH}={v[LENGTH] * v[TP] * v[CP] + 1}"] if v["model.sequence_parallel"] or v[CP] > 1 else None
        ),
    ),
    Cross(
        "SEQ102",
        DFM_DIT,
        lambda v, rng: [
            f"{CP}=3",
            f"cluster.nproc_per_node={3 * v[TP]}",
            "cluster.nnodes=1",
            f"train.global_batch_size={v['train.global_batch_size']}",
        ],
        "SEQ106 SEQ109",
    ),
    Cross("SEQ106", DFM, lambda v, rng: [f"model.seq_length={2 * v[CP] * 500 + 1}"] if v[CP] > 1 else None),
    Cross("SEQ103", DFM_DIT, needs("dataset.packing_buffer_size", "model.qkv_format=sbhd")),
    Cross("SEQ111", DFM_DIT + WAN, needs("target", "model.cuda_graph_impl=local")),
    Cross(
        "MOD104",
        OURS,
        lambda v, rng: (
            [f"{LENGTH}={(v['data.resolution'] // 8 // v['model.patch_spatial']) ** 2 - 1}"]
            if v["data.source"] == "embedded" and not v["model.sequence_parallel"]
            else None
        ),
    ),
    Cross("WAN107", WAN, needs("target", "model.qkv_format=sbhd")),
    Cross("FLX105", FLUX, needs("target", "dataset.packing_buffer_size=40")),
    # geometry
    Cross(
        "MOD101",
        EVERY,
        lambda v, rng: [f"{HIDDEN}={v[HIDDEN] + 16}"] if (v[HIDDEN] + 16) % v[HEADS] else None,
        "PAR105 WAN108 PRE108",
    ),
    Cross(
        "MOD102",
        DIT,
        lambda v, rng: (
            [f"{HIDDEN}={v[HEADS] * 8 * 33}", f"model.kv_channels={8 * 33}"] if v[HEADS] * 8 * 33 % 16 else None
        ),
    ),
    Cross(
        "MOD103",
        EVERY,
        lambda v, rng: [
            "model.recompute_granularity=full",
            "model.recompute_method=null",
            "model.recompute_num_layers=null",
        ],
        "MOD113",
    ),
    Cross("FLX101", FLUX, needs("target", "model.axes_dims_rope=[16,56,54]")),
    Cross("WAN110", WAN, needs("target", "model.add_bias_linear=false")),
    Cross("FLX107", FLUX, needs("target", "model.add_bias_linear=false")),
    # schedule
    Cross("OPT101", EVERY, lambda v, rng: [f"optimizer.min_lr={v['optimizer.lr'] * rng.choice([1.5, 2, 10])}"]),
    Cross(
        "OPT102",
        EVERY,
        lambda v, rng: (
            [f"scheduler.lr_warmup_iters={v['scheduler.lr_decay_iters'] + rng.randrange(9)}"]
            if fits_iterations(v) and v["scheduler.lr_decay_iters"]
            else None
        ),
    ),
    Cross(
        "OPT104",
        EVERY,
        lambda v, rng: ["scheduler.start_weight_decay=0.1", f"scheduler.end_weight_decay={rng.choice([0.0, 0.05])}"],
        "SPC301",
    ),
    Cross("OPT105", EVERY, lambda v, rng: [f"scheduler.lr_warmup_init={v['optimizer.lr'] * 2}"]),
    Cross("OPT107", DFM, lambda v, rng: ["scheduler.lr_decay_samples=100000"] if fits_iterations(v) else None),
    Cross(
        "OPT108",
        DFM,
        needs(
            "target", "scheduler.override_opt_param_scheduler=true", "scheduler.use_checkpoint_opt_param_scheduler=true"
        ),
    ),
    Cross(
        "OPT109",
        DFM,
        lambda v, rng: (
            ["scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=null"] if fits_iterations(v) else None
        ),
    ),
    Cross(
        "CKP102",
        EVERY,
        lambda v, rng: [f"checkpoint.save_interval={v['train.train_iters'] + 1}"] if fits_iterations(v) else None,
    ),
    Cross(
        "CKP103",
        EVERY,
        lambda v, rng: (
            [f"checkpoint.ckpt_step={v['train.train_iters'] + rng.randrange(9)}"] if fits_iterations(v) else None
        ),
    ),
    # precision
    Cross("PRE101", OURS, needs("target", "cluster.device=cpu", "model.transformer_impl=transformer_engine")),
    Cross("PRE104", DFM, needs("target", "mixed_precision.fp16=true", "mixed_precision.bf16=true")),
    Cross(
        "PRE105",
        DFM,
        lambda v, rng: ["mixed_precision.fp8_param_gather=true"] if not v["mixed_precision.fp8"] else None,
    ),
    Cross(
        "PRE107",
        DFM,
        lambda v, rng: (
            ["mixed_precision=bf16_with_mxfp8_mixed", "ddp.overlap_param_gather=false", "ddp.overlap_grad_reduce=false"]
            if v["comm_overlap.tp_comm_overlap"] is None
            else None
        ),
        "PRE108 PRE109",
    ),
    Cross(
        "PRE108",
        DFM_DIT,
        needs("target", "mixed_precision=bf16_with_fp8_current_scaling_mixed", "model.crossattn_emb_size=1000"),
        "PRE109 MOD110",
    ),
    Cross(
        "PRE109",
        DFM,
        needs("target", "cluster.gpu=a100", "mixed_precision=bf16_with_fp8_current_scaling_mixed"),
        "FLX109",
    ),
    # sharding and checkpoints
    Cross(
        "DDP101",
        EVERY,
        needs("target", "ddp.overlap_param_gather=true", "ddp.overlap_grad_reduce=false"),
        "PRE107 DDP102 SPC306",
    ),
    Cross(
        "DDP102",
        EVERY,
        needs(
            "target",
            "ddp.overlap_param_gather=true",
            "ddp.overlap_grad_reduce=true",
            "optimizer.use_distributed_optimizer=false",
            "ddp.use_distributed_optimizer=false",
        ),
        "PIP104 OPT111",
    ),
    Cross(
        "DDP104",
        DFM,
        lambda v, rng: (
            ["checkpoint.ckpt_format=fsdp_dtensor"]
            if not v["ddp.use_megatron_fsdp"]
            else ["checkpoint.ckpt_format=torch_dist"]
        ),
        "CKP109",
    ),
    Cross("OPT111", DFM, needs("target", "optimizer.use_precision_aware_optimizer=true", "optimizer.optimizer=sgd")),
    Cross(
        "OPT112", DFM, needs("target", "optimizer.optimizer_cpu_offload=true", "optimizer.decoupled_weight_decay=false")
    ),
    Cross(
        "CKP107",
        DFM,
        needs(
            "target",
            "checkpoint.dist_ckpt_optim_fully_reshardable=true",
            "checkpoint.distrib_optim_fully_reshardable_mem_efficient=true",
        ),
    ),
    Cross("CKP109", DFM, needs("target", "checkpoint.async_save=true", "checkpoint.use_persistent_ckpt_worker=false")),
    Cross("CKP110", DFM, needs("target", "checkpoint.load_main_params_from_ckpt=true", "checkpoint.load_optim=true")),
    Cross("RUN105", DFM, needs("target", "profiling.profile_step_start=10", "profiling.profile_step_end=5")),
]


@lru_cache
def valid(file: Path) -> Resolved:
    return resolve_spec(load_spec(file))


def crossed() -> Iterator[tuple[Path, Cross, list[str]]]:
    """Every way that a spec has something to break for, drawn from the names of both."""
    for file in SPECS:
        resolved = valid(file)
        for cross in CROSS:
            if resolved.spec.target in cross.targets:
                words = cross.broken(resolved.values, random.Random(f"{file.stem} {cross.code}"))
                if words is not None:
                    yield file, cross, words


CROSSED = list(crossed())


def test_there_are_enough_broken_constraints() -> None:
    assert len(CROSSED) >= 1000
    assert len({cross.code for _, cross, _ in CROSSED}) >= 50
    assert all(sum(file == spec for file, _, _ in CROSSED) >= 10 for spec in SPECS)


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_a_broken_constraint_is_found_and_besides_it_only_what_follows(file: Path) -> None:
    before = {finding.code for finding in check_spec(valid(file), levels=("spec",))}
    for cross, words in ((cross, words) for other, cross, words in CROSSED if other == file):
        found = check_spec(resolve_spec(load_spec(file, words)), levels=("spec",))
        codes = {finding.code for finding in found}

        assert cross.code in codes, (cross.code, words, sorted(codes - before))
        follows = {cross.code, "PAR117", *cross.also.split()}  # more processes than a machine of that GPU has
        assert {f.code for f in found if f.severity > Severity.HINT} - before - follows == set(), (cross.code, words)


def test_one_mistake_is_one_error() -> None:
    """Of 500 mutations, drawn from broken entries and from broken constraints alike, 95 % give exactly one error."""
    rng = random.Random(23)
    entries = [(file, mutation.text, []) for file, mutation in rng.sample(ALL, 250)]
    crossed = [(file, file.read_text(), words) for file, _, words in rng.sample(CROSSED, 250)]
    counts = []
    for file, text, words in [*entries, *crossed]:
        found = check_spec(resolve_spec(load_spec(file, words, text=text)), levels=("spec",))
        errors = [finding for finding in found if finding.severity is Severity.ERROR]
        counts.append(len(errors))
    told = [count for count in counts if count]  # some constraints are warnings

    assert len(told) >= 400
    assert sum(count == 1 for count in told) >= 0.95 * len(told)
