"""Cases of rules beside the one that is their example: each was once silent, or said at the wrong place."""

from __future__ import annotations

import io
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dfmspec.check.rules import LEVELS, check_spec
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from tests.conftest import CORPUS


def found(*words: str, levels: tuple[str, ...] = ("spec",)) -> dict[str, Diagnostic]:
    """The findings of some overrides, by code."""
    return {finding.code: finding for finding in check_spec(resolve_spec(load_spec(None, words)), levels=levels)}


FIRES = [
    *(("DAT109", f"dataset.path={address}://a/b") for address in ("s3", "gs", "hf", "https", "file", "S3", "rclone")),
    ("DAT109", "data.source=embedded dataset.path=msc://a/b"),
    ("DAT109", "dataset.path=/data checkpoint.save=s3://a/b"),
    ("DAT109", "dataset.path=/data run.output_dir=file:///a/b"),
    ("DAT101", "dataset.path=''"),
    ("DAT101", "target=dfm dataset.path=''"),
    ("WAN103", "target=dfm_wan dataset.path=''"),
    ("CKP102", "checkpoint.save=''"),
    ("CKP102", "target=dfm checkpoint.save=''"),
    ("OPT104", "target=dfm scheduler.start_weight_decay=0.03 scheduler.end_weight_decay=0.1"),
    *(
        (code, f"target={target} {words}")
        for target in ("dfm", "dfm_wan", "dfm_flux")
        for code, words in (
            ("MOD113", "model.recompute_granularity=selective model.recompute_modules=[moe]"),
            ("SEQ112", "model.variable_seq_lengths=true"),
            ("MOD119", "model.attention_dropout=1.5"),
            ("OPT115", "rng.data_parallel_random_init=true"),
            ("MOD115", "model.vocab_size=10"),
            (
                "FLX110" if target == "dfm_flux" else "SEQ111",
                "model.cuda_graph_impl=local model.enable_cuda_graph=true",
            ),
            ("OPT104", "scheduler.start_weight_decay=0.1 scheduler.end_weight_decay=0.05"),
        )
    ),
    ("RUN111", "cluster.nnodes=2 cluster.nproc_per_node=1 cluster.master_addr=localhost"),
    ("SPC203", "target=dfm comm_overlap.tp_comm_overlap=false comm_overlap._target_=foo.Bar"),
    ("SPC203", "target=dfm_wan ft._target_=os.system"),
    ("MOD110", "target=dfm data.source=mock model.crossattn_emb_size=4096"),
    ("MOD110", "target=dfm data.source=mock dataset.context_embeddings_dim=4096"),
    ("MOD110", "target=dfm data.source=mock dataset.H_latents=63"),
    ("MOD110", "target=dfm data.source=mock dataset.patch_spatial=4"),
    ("EVL103", "target=dfm model.vae_name=Cosmos-0.1-Tokenizer-CV8x16x16"),
    ("EVL103", "target=dfm model.vae_module=my.Decoder"),
    ("EVL103", "target=dfm model.vae_module=nonsense"),
    (
        "PRE108",
        (
            "target=dfm mixed_precision=bf16_with_fp8_current_scaling_mixed "
            "cluster.nproc_per_node=8 model.context_parallel_size=8"
        ),
    ),
    ("RUN104", "target=dfm logger.wandb_project=p logger.wandb_exp_name=\"''\""),
    ("RUN123", "target=dfm launcher.kind=slurm launcher.time_limit='0' train.exit_signal_handler=false"),
]


@pytest.mark.parametrize(("code", "words"), FIRES)
def test_a_rule_fires_on_its_further_cases(code: str, words: str) -> None:
    assert found(*shlex.split(words))[code].severity > Severity.HINT


SILENT = [
    ("DAT109", "target=dfm dataset.path=s3://a/b checkpoint.save=s3://a/b"),  # upstream's own affair
    ("DAT109", "data.source=mock dataset.path=s3://a/b"),
    ("DAT109", "dataset.path=msc://a/b"),
    ("OPT104", "scheduler.start_weight_decay=0.1 scheduler.end_weight_decay=0.2"),
    ("MOD113", "target=dfm_wan model.recompute_granularity=selective model.recompute_modules=[mlp]"),
    ("SPC203", "target=dfm comm_overlap._target_=megatron.bridge.training.comm_overlap.CommOverlapConfig"),
    ("EVL103", "target=dfm model.vae_name=Cosmos-0.1-Tokenizer-CV8x8x8"),
    ("EVL103", "target=dfm train.eval_iters=0 model.vae_module=my.Decoder"),
    ("MOD110", "target=dfm data.source=mock model.crossattn_emb_size=4096 dataset.context_embeddings_dim=4096"),
    (
        "PRE108",
        (
            "target=dfm mixed_precision=bf16_with_fp8_current_scaling_mixed "
            "cluster.nproc_per_node=8 model.context_parallel_size=4"
        ),
    ),
    ("SEQ113", "target=dfm_wan model.cp_comm_type=a2a"),
    ("FLX110", "target=dfm_flux model.enable_cuda_graph=true"),
    *(
        ("RUN124", f"launcher.kind=slurm launcher.time_limit='{limit}'")
        for limit in ("90", "0", "0:00", "2:30", "4:00:00", "1-0", "1-4:00")
    ),
    ("RUN124", "launcher.time_limit='4:00'"),
    ("RUN118", "launcher.kind=slurm launcher.time_limit='0:00'"),
]


@pytest.mark.parametrize(("code", "words"), SILENT)
def test_a_rule_is_silent_on_further_near_misses(code: str, words: str) -> None:
    assert code not in found(*shlex.split(words))


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("4:00", "4 minutes to Slurm"),
        ("04:00", "4 minutes to Slurm"),
        ("48:00", "48 minutes to Slurm"),
        ("4:30", "4 minutes and 30 seconds"),
    ],
)
def test_a_limit_of_two_numbers_is_told_in_minutes(limit: str, said: str) -> None:
    finding = found("launcher.kind=slurm", f"launcher.time_limit='{limit}'")["RUN124"]

    assert said in finding.message
    assert f'"{limit}:00"' in finding.hint


def test_the_length_of_wans_packs_is_named_by_the_key_that_cuts_them() -> None:
    wan = found(
        "target=dfm_wan",
        "data.source=mock",
        "cluster.nproc_per_node=2",
        "model.context_parallel_size=2",
        "model.seq_length=1023",
    )

    assert "packs are cut by dataset.seq_length" in wan["SEQ106"].hint


def test_upstreams_own_example_is_at_most_hinted_at() -> None:
    words = ("target=dfm", "cluster.nproc_per_node=8")
    resolved = resolve_spec(load_spec(CORPUS / "dfm" / "dit_pretrain.yaml", words))
    findings = check_spec(resolved, levels=("spec", "paths"))
    findings = [finding for finding in findings if finding.code != "CKP113"]  # this machine's disk

    assert {finding.code for finding in findings if finding.severity > Severity.HINT} == set()
    assert "RUN102" in {finding.code for finding in findings}


def test_a_value_that_upstream_has_anyway_is_no_fault() -> None:
    words = [
        "target=dfm_flux",
        "data.source=mock",
        "cluster.nproc_per_node=8",
        "train.global_batch_size=8",
        "dataset.global_batch_size=8",
        "train.train_iters=9",
    ]
    words += ["model.hidden_size=3072"]

    assert {finding.code for finding in found(*words).values() if finding.severity > Severity.HINT} == set()
    assert "WAN108" in found(*words, "model.hidden_size=1536")


def test_what_the_recipe_itself_has_is_at_most_a_hint() -> None:
    plain = found("target=dfm", "data.source=mock", "cluster.nproc_per_node=8", "train.train_iters=100")

    assert {plain["MOD108"].severity, plain["RUN115"].severity} == {Severity.HINT}


@pytest.mark.parametrize("target", ["megatron_core", "dfm"])
def test_resume_is_judged_by_what_is_there(target: str, tmp_path: Path) -> None:
    words = [
        f"target={target}",
        "data.source=mock",
        "name=x",
        f"run.output_dir={tmp_path / 'runs'}",
        f"checkpoint.save={tmp_path / 'ck'}",
    ]
    nothing = found(*words, "run.resume=require", levels=LEVELS)
    checkpoint = tmp_path / "ck" / "iter_0000100"
    checkpoint.mkdir(parents=True)
    begun = found(*words, "run.resume=require", levels=LEVELS)
    (checkpoint / ("manifest.json" if target == "megatron_core" else "metadata.json")).touch()
    there = found(*words, "run.resume=require", levels=LEVELS)
    never = found(*words, "run.resume=never", levels=LEVELS)

    assert "require" in nothing["RUN103"].message
    assert "require" in begun["RUN103"].message
    assert "RUN103" not in there
    assert "iteration 100" in never["RUN103"].message
    assert "RUN103" not in found(*words, levels=LEVELS)


def _lose(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _put(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("code", "harm"),
    [
        ("", lambda folder: None),
        ("", lambda folder: _put(folder, "notes.yaml", "a: 1\n")),
        ("DAT103", lambda folder: _lose(folder, ".nv-meta/split.yaml")),
        ("DAT103", lambda folder: _put(folder, ".nv-meta/split.yaml", "]]: garbage")),
        ("DAT103", lambda folder: _put(folder, ".nv-meta/split.yaml", "split_parts: [a, b]")),
        ("DAT103", lambda folder: _lose(folder, ".nv-meta/.info.json") or _lose(folder, ".nv-meta/.info.yaml")),
        ("DAT103", lambda folder: _put(folder, ".nv-meta/.info.json", "")),
        (
            "DAT103",
            lambda folder: _put(folder, ".nv-meta/.info.json", '{"shard_counts": {"shard-000000.tar": "many"}}'),
        ),
        ("DAT103", lambda folder: shutil.rmtree(folder / ".nv-meta")),
        ("DAT103", lambda folder: _put(folder, "metadataset.yaml", "a: 1\n") or shutil.rmtree(folder / ".nv-meta")),
        ("DAT105", lambda folder: shutil.copy(next(folder.glob("*.tar")), folder / "more.tar")),
        ("DAT105", lambda folder: next(folder.glob("*.tar")).unlink()),
        ("DAT108", lambda folder: next(folder.glob("*.idx")).unlink()),
        ("DAT108", lambda folder: next(folder.glob("*.idx")).write_bytes(b"12345678")),
        ("DAT211", lambda folder: _appended(sorted(folder.glob("*.tar"))[0])),
    ],
)
def test_a_dataset_and_its_metadata_must_agree(
    code: str, harm: Callable[[Path], object], dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    harm(folder)
    codes = found(
        f"dataset.path={folder}",
        "cluster.device=cpu",
        "recipe=dit_tiny",
        "dataset.task_encoder_seq_length=64",
        levels=LEVELS,
    ).keys()

    assert code in codes if code else not [found for found in codes if found.startswith("DAT")]


@pytest.mark.parametrize(
    ("code", "splits", "words"),
    [
        ("", "{train: {blend: [{weight: 2, path: ./a}, {weight: 1, path: inner.yaml}]}, val: {path: a}}", ""),
        ("", "{train: {path: 'msc://bucket/a', subflavors: {path: elsewhere}}, val: {path: 'msc://bucket/a'}}", ""),
        ("DAT102", "{train: {path: 's3://bucket/a'}, val: {path: a}}", "s3:// is not read"),
        ("", "{train: {blend_epochized: [{repetitions: 2, path: a}]}, val: {path: 2025-01-01, split_part: test}}", ""),
        ("", "{train: {path: a}, val: {path: unprepared/../a}, test: {path: longer}}", ""),  # test is not read
        ("", "{train: {path: a, split_config: mine.yaml}, val: {path: a, dataset_config: crude.yaml}}", ""),
        ("DAT102", "[]", "no splits"),
        ("DAT102", "{train: &t {path: a}, val: *t}", "split val needs one of path, blend"),  # Energon knows no aliases
        (
            "DAT102",
            "{train: {blend: [{weight: 2, path: a}, {weight: 1, path: c}]}, val: {path: a}}",
            "/c, which does not exist",
        ),
        ("DAT102", "{train: {path: notes.yaml}, val: {path: a}}", "notes.yaml: it has no splits"),
        ("DAT102", "{train: {path: first.yaml}, val: {path: a}}", "first.yaml: its split train needs datasets"),
        ("DAT102", "{train: {path: a/rank0-000000.tar}, val: {path: a}}", "is no dataset"),
        ("DAT102", "{train: {path: a, blend: [{path: a}]}, val: {path: a}}", "needs one of"),
        ("DAT102", "{train: {blend: [{weight: 1}]}, val: {path: a}}", "needs a path for each"),
        ("DAT102", "{train: {path: mix.yaml}, val: {path: a}}", "names itself"),
        ("DAT102", "{train: {path: a, aux: {more: a}}, val: {path: a}}", "auxiliary"),
        (
            "DAT103",
            "{train: {blend: [{path: a}, {path: unprepared}]}, val: {path: a}}",
            "unprepared has no Energon metadata",
        ),
        (
            "DAT103",
            "{train: {path: a}, val: {path: a}, test: {path: unprepared}}",
            "unprepared has no Energon metadata",
        ),
        ("DAT104", "{train: {path: a}}", "no split val; it has train"),
        ("DAT104", "{train: {path: a, split_part: other}, val: {path: a}}", "the other split of"),
        ("DAT104", "{train: {path: a}, val: {path: inner.yaml}}", "inner.yaml has no split val"),
        ("DAT211", "{train: {path: longer}, val: {path: a}}", "longer/rank0-000000.tar 17, not 16"),
    ],
)
def test_a_metadataset_and_what_it_names(code: str, splits: str, words: str, dataset: Path, tmp_path: Path) -> None:
    for name in ("a", "2025-01-01", "longer"):
        shutil.copytree(dataset, tmp_path / name)
    (tmp_path / "unprepared").mkdir()
    _appended(sorted((tmp_path / "longer").glob("*.tar"))[0])
    version = "__module__: megatron.energon\n__class__: MetadatasetV2\n"
    _put(tmp_path, "notes.yaml", "a: 1\n")
    _put(tmp_path, "inner.yaml", f"{version}splits: {{train: {{path: a}}}}\n")
    _put(tmp_path, "first.yaml", "splits: {train: {path: a}}\n")
    _put(tmp_path, "mix.yaml", f"{version}splits: {splits}\n")
    findings = found(
        f"dataset.path={tmp_path / 'mix.yaml'}",
        "cluster.device=cpu",
        "recipe=dit_tiny",
        "dataset.task_encoder_seq_length=64",
        levels=LEVELS,
    )

    assert words in findings[code].message if code else not [code for code in findings if code.startswith("DAT")]


def _appended(shard: Path) -> None:
    """A sample more, as by tar --append."""
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo("another.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))


def test_guidance_must_be_that_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000100").mkdir()
    (tmp_path / "latest_train_state.pt").touch()
    (tmp_path / "iter_0000100" / "run_config.yaml").write_text(
        "model:\n  guidance_embed: true\n  num_joint_layers: 19\n"
    )
    words = ["target=dfm_flux", "data.source=mock", f"checkpoint.load={tmp_path}"]

    assert "guidance_embed is false, and the checkpoint's is true" in found(*words, levels=LEVELS)["CKP116"].message
    assert "CKP116" not in found(*words, "model.guidance_embed=true", levels=LEVELS)


def test_a_folder_without_permission_is_a_finding_at_the_key_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Path.is_dir

    def refuse(path: Path) -> bool:
        if "closed" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return seen(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    finding = found(f"dataset.path={tmp_path / 'closed' / 'data'}", levels=("spec", "paths"))["RUN122"]

    assert finding.path == ("dataset", "path")
    assert "Permission denied" in finding.message


def test_a_folder_that_upstream_cannot_number_is_found_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "old" / "iter_best").mkdir(parents=True)
    words = ["target=dfm", "data.source=mock", f"checkpoint.save={tmp_path}"]

    assert "iter_best" in found(*words, "checkpoint.most_recent_k=2", levels=LEVELS)["CKP121"].message
    assert "CKP121" not in found(*words, levels=LEVELS)


@pytest.mark.parametrize(
    ("target", "named", "words"),
    [
        ("dfm", "weights.safetensors", "is a file, and the script starts from a folder of checkpoints"),
        ("dfm", "own", "is dfmspec's (it has manifest.json), which the script cannot read"),
        ("dfm", "upstream/iter_0000100", "has no latest_train_state.pt, by which the script finds what to start from"),
        ("dfm_wan", "empty", "has no latest_train_state.pt"),
        ("dfm_wan", "own", "is dfmspec's"),
        ("dfm_flux", "weights.safetensors", "is a file"),
        ("dfm", "upstream", None),
        ("megatron_core", "upstream", None),
        ("megatron_core", "weights.safetensors", "is of another network: model.num_layers is 1 there, and 28 here"),
        ("megatron_core", "own/iter_0000100/manifest.json", "is no safetensors file"),
        ("megatron_core", "empty", "holds no finished checkpoint"),
    ],
)
def test_weights_to_start_from_are_what_the_target_starts_from(
    target: str, named: str, words: str | None, tmp_path: Path
) -> None:
    shutil.copytree(CORPUS / "rules" / "CKP124", tmp_path, dirs_exist_ok=True)
    header = b'{"decoder.layers.0.x.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (tmp_path / "empty").mkdir()
    place = tmp_path / named
    finding = found(f"target={target}", f"checkpoint.pretrained_checkpoint={place}", levels=("paths",)).get("CKP124")

    assert (finding is None) == (words is None), finding
    if finding is not None and words is not None:
        assert words in finding.message
        assert target == "dfm" or "--for dfm" not in finding.hint  # it writes a DiT
