"""Plans: the how-to's command lines, the same bytes anywhere, safe quoting."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmspec.check.rules import check_spec
from dfmspec.diagnostics import Severity
from dfmspec.errors import InvalidSpec
from dfmspec.plan.describe import described, rank_table
from dfmspec.plan.plan import Plan, config_text, make_plan
from dfmspec.plan.scripts import node_script
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.run.bundle import read_bundle, write_bundle
from tests.conftest import HOWTO, ROOT, dfmspec, environment

ENTRY = "examples/megatron/recipes/dit/pretrain_dit_model.py"


def plan(file: Path | None, *overrides: str) -> Plan:
    return make_plan(resolve_spec(load_spec(file, overrides)))


def test_a_spec_with_nothing_but_a_dataset_gives_the_how_tos_two_commands(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("dataset: {path: /shared/butterfly_webdataset}\n")
    made = plan(path, "cluster.nnodes=2", "cluster.nproc_per_node=8")

    for rank in range(2):
        assert " ".join(made.argv(rank)) == (
            f"torchrun --nproc-per-node 8 --nnodes 2 --node-rank {rank} "
            "--master-addr $MASTER_ADDR --master-port $MASTER_PORT "
            f"{ENTRY} --dataset-path /shared/butterfly_webdataset"
        )


def test_anything_else_goes_through_a_config_file() -> None:
    made = plan(HOWTO, "cluster.nproc_per_node=2")

    assert made.argv(0) == ("torchrun", "--nproc-per-node", "2", ENTRY, "--config-file", "config.yaml")


@pytest.mark.parametrize(("sizes", "expected"), [(("TP", 2, "PP", 1), "DP: 4"), (("TP", 4, "PP", 2), "DP: 1")])
def test_the_how_tos_examples_of_dp(sizes: tuple, expected: str) -> None:
    words = [
        "data.source=mock",
        "cluster.nproc_per_node=8",
        f"model.tensor_model_parallel_size={sizes[1]}",
        f"model.pipeline_model_parallel_size={sizes[3]}",
    ]
    result = dfmspec("plan", HOWTO, *words)

    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def test_the_same_bytes_in_any_directory_and_hash_seed(tmp_path: Path) -> None:
    spec = shutil.copy(ROOT / "specs" / "butterfly_tiny_cpu.yaml", tmp_path / "butterfly_tiny_cpu.yaml")
    outputs = {
        dfmspec("plan", spec, "--format", "json", cwd=cwd, PYTHONHASHSEED=seed, LC_ALL="C").stdout
        for cwd in (ROOT, tmp_path)
        for seed in ("0", "7")
    }

    (text,) = outputs
    assert json.loads(text)["plan_id"].startswith("sha256:")


def test_the_config_reads_the_same_in_yaml_1_1_and_is_its_own_fixed_point(tmp_path: Path) -> None:
    made = plan(HOWTO, "cluster.nproc_per_node=2", "optimizer.lr=1e-5")
    (tmp_path / "config.yaml").write_text(config_text(made.config))

    assert yaml.safe_load(config_text(made.config)) == made.config
    again = plan(tmp_path / "config.yaml", "cluster.nproc_per_node=2")
    assert again.config == made.config


def test_target_dfm_gets_every_twin_and_none_of_our_sections() -> None:
    config = plan(HOWTO, "target=dfm", "cluster.nproc_per_node=2", "train.micro_batch_size=1").config

    assert config["dataset"]["global_batch_size"] == config["train"]["global_batch_size"] == 64
    assert config["scheduler"]["start_weight_decay"] == config["scheduler"]["end_weight_decay"] == 0.01
    assert config["optimizer"]["min_lr"] == 1e-5
    assert config["model"]["qk_layernorm"] is True
    assert not {"cluster", "run", "launcher", "data", "diffusion"} & config.keys()


@pytest.mark.parametrize("name", ["\U0001f98b", "\u00e4 \u4e2d", "a'b\"c\\d", "x\ty\nz", "\x85\u2028"])
def test_any_text_survives_the_config_file(name: str, tmp_path: Path) -> None:
    text = config_text({"dataset": {"path": f"/data/{name}"}})

    assert yaml.safe_load(text) == {"dataset": {"path": f"/data/{name}"}}


HOSTILE = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=30
).filter(lambda text: text.strip() == text and not text.startswith("-"))


@given(HOSTILE)
@settings(max_examples=60, deadline=None)
def test_no_path_can_break_out_of_a_command(name: str) -> None:
    made = plan(None, f"dataset.path=/data/{name}")
    script = node_script(made, 0)
    words = shlex.split(script.split("exec torchrun", 1)[1], posix=True)

    assert f"/data/{name}" in words or "--config-file" in words


def test_a_bundle_is_read_back_and_never_overwrites(tmp_path: Path) -> None:
    made = plan(HOWTO, "cluster.nproc_per_node=2")
    write_bundle(made, tmp_path / "plan")

    assert read_bundle(tmp_path / "plan").plan_id == made.plan_id
    assert dfmspec("plan", HOWTO, "-o", tmp_path / "plan").returncode == 2
    subprocess.run(["bash", "-n", str(tmp_path / "plan" / "node0.sh")], check=True)
    assert os.access(tmp_path / "plan" / "node0.sh", os.X_OK)


def test_why_tells_where_a_value_comes_from() -> None:
    words = [HOWTO, "cluster.nproc_per_node=2", "data.source=mock"]

    assert "derived: 0.1 x optimizer.lr" in dfmspec("plan", *words, "--why", "optimizer.min_lr").stdout
    assert ":15:3" in dfmspec("plan", *words, "--why", "optimizer.lr").stdout
    assert dfmspec("plan", *words, "--why", "optimizer.nothing").returncode == 2


def test_variables_that_a_mode_needs_are_set_or_removed_by_rule(tmp_path: Path) -> None:
    """What node 0 of target dfm hands to torchrun, from a shell that has another setting."""
    (tmp_path / "torchrun").write_text(
        "#!/bin/sh\n"
        'echo "${NCCL_ALGO:-} ${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-} ${CUDA_DEVICE_MAX_CONNECTIONS-unset} $PYTHONPATH"\n'
    )
    (tmp_path / "torchrun").chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": "/mine",
        "DFM_ROOT": "/dfm",
    }
    base = ["target=dfm", "data.source=mock", "cluster.nproc_per_node=8", "train.train_iters=10", "train.eval_iters=0"]
    said = []
    for number, words in enumerate(
        (
            ["model.deterministic_mode=true"],
            ["ddp.use_megatron_fsdp=true", "checkpoint.ckpt_format=fsdp_dtensor"],
            ["model.deterministic_mode=true", "launcher.env={NCCL_ALGO: Tree}"],
        )
    ):
        resolved = resolve_spec(load_spec(None, [*base, *words]))
        assert not [finding for finding in check_spec(resolved, levels=("spec",)) if finding.severity is Severity.ERROR]
        made = make_plan(resolved)
        (tmp_path / f"{number}.sh").write_text(node_script(made, 0))
        said.append(
            subprocess.run(
                ["bash", f"{number}.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
            ).stdout.strip()
        )
        assert (
            "CUDA_DEVICE_MAX_CONNECTIONS" in described(resolved, made)
            if number == 1
            else "model.deterministic_mode" in described(resolved, made)
        )

    assert said == ["Ring 0 1 /dfm:/mine", "unset /dfm:/mine", "Tree 0 1 /dfm:/mine"]


def _calls(file: Path, folder: Path) -> int:
    """Function calls from spec to bundle and table of ranks: a count of work that no load of the machine changes."""
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(counted)
    try:
        resolved = resolve_spec(load_spec(file))
        write_bundle(make_plan(resolved), folder)
        rank_table(resolved)
    finally:
        sys.setprofile(None)
    return count


def test_work_and_memory_grow_no_faster_than_the_nodes(tmp_path: Path) -> None:
    """4,096 nodes of 8 GPUs, each named.

    A bundle of few files, and at most 500 MB for it and for the table of 32,768 ranks.
    """
    for nodes in (512, 1024, 4096):
        hosts = ", ".join(f"node{i:04}" for i in range(nodes))
        text = (
            f"data: {{source: mock}}\ncluster: {{nproc_per_node: 8, nnodes: {nodes}}}\n"
            f"launcher: {{kind: ssh, hosts: [{hosts}]}}\n"
        )
        (tmp_path / f"{nodes}.yaml").write_text(text)
    _calls(tmp_path / "512.yaml", tmp_path / "warm")
    few, many = (_calls(tmp_path / f"{nodes}.yaml", tmp_path / str(nodes)) for nodes in (1024, 4096))
    files = [file for file in (tmp_path / "4096").rglob("*") if file.is_file()]
    peak = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    for words in (["-o", tmp_path / "out"], ["--ranks"]):
        command = [sys.executable, "-c", peak, sys.executable, "-m", "dfmspec", "plan", tmp_path / "4096.yaml", *words]
        kilobytes = int(
            subprocess.run(
                list(map(str, command)), env=environment(), capture_output=True, text=True, check=True
            ).stdout
        )
        assert kilobytes < 500_000

    assert many < 4.2 * few
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) < 200_000


@pytest.mark.parametrize(
    "words",
    [
        ("--why", "optimizer.lr", "-o", "out"),
        ("--ranks", "-o", "out"),
        ("--check", "out", "-o", "out"),
        ("--diff", "spec.yaml", "-o", "out"),
        ("--why", ""),
        ("--ranks", "--why", "name"),
        ("--why", "name", "--format", "json"),
        ("--ranks", "--format", "yaml"),
        ("-o", "out", "--format", "json"),
        ("--node", "0", "--format", "json"),
        ("--node", "0", "-o", "out"),
        ("--node", "2"),
    ],
)
def test_what_cannot_be_answered_together_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("data: {source: mock}\ncluster: {nproc_per_node: 2, nnodes: 2}\n")
    done = dfmspec("plan", "spec.yaml", *words, cwd=tmp_path)

    assert done.returncode == 2
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "word",
    [
        b'launcher.env={X: "a\xff"}',
        b'launcher.setup=["\xff"]',
        b"dataset.path=/data/\xff",
        b'launcher.env={X: "\\ud800"}',
        b'name="\\ud800"',
    ],
)
def test_bytes_that_are_no_text_end_no_program(word: bytes, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("data: {source: mock}\ncluster: {nproc_per_node: 2}\n")
    for words in ((), ("-o", "out"), ("--format", "json")):
        command = [sys.executable, "-m", "dfmspec", "plan", "spec.yaml", word, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, check=False)
        assert done.returncode in (0, 1), done.stderr
        assert b"Traceback" not in done.stderr, done.stderr


def test_one_node_is_its_script(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("data: {source: mock}\ncluster: {nproc_per_node: 2, nnodes: 2}\n")

    assert (
        dfmspec("plan", "spec.yaml", "--node", "1", cwd=tmp_path).stdout
        == dfmspec("plan", "spec.yaml", "--node", "1", "--format", "sh", cwd=tmp_path).stdout
    )


def test_a_plan_as_json_can_be_compared(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("data: {source: mock}\ncluster: {nproc_per_node: 2}\n")
    (tmp_path / "before.json").write_text(dfmspec("plan", "spec.yaml", "--format", "json", cwd=tmp_path).stdout)
    assert dfmspec("plan", "spec.yaml", "-o", "p1", cwd=tmp_path).returncode == 0

    for other in ("before.json", "p1/plan.json", "p1"):
        assert (
            dfmspec("plan", "spec.yaml", "optimizer.lr=1e-5", "--diff", other, cwd=tmp_path).stdout.count(
                "optimizer.lr: 9e-05 -> 1e-05"
            )
            == 1
        )
    assert dfmspec("plan", "spec.yaml", "--diff", "nowhere.json", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("target", "kind"), [("megatron_core", "ssh"), ("dfm", "ssh"), ("dfm", "slurm"), ("dfm", "local")]
)
def test_a_plan_says_how_it_can_be_started(target: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("data: {source: mock}\ncluster: {nproc_per_node: 2, nnodes: 2}\n")
    hosts = ["launcher.hosts=[a, b]"] if kind == "ssh" else []
    said = dfmspec(
        "plan",
        "spec.yaml",
        f"target={target}",
        f"launcher.kind={kind}",
        *hosts,
        "train.train_iters=10",
        "train.eval_iters=0",
        cwd=tmp_path,
    ).stdout

    assert f"# launcher {kind}: " in said
    assert "dfmspec run" in said
    assert ("write it with -o DIR" in said) == (target == "dfm")


def test_many_hosts_are_not_listed_one_by_one(tmp_path: Path) -> None:
    hosts = ", ".join(f"node{i}" for i in range(4096))
    (tmp_path / "spec.yaml").write_text(
        "data: {source: mock}\ncluster: {nproc_per_node: 8, nnodes: 4096}\n"
        f"launcher: {{kind: ssh, hosts: [{hosts}]}}\n"
    )
    said = dfmspec("plan", "spec.yaml", cwd=tmp_path).stdout

    assert said.count("node4095") == 0
    assert max(map(len, said.splitlines())) < 300


def test_why_tells_every_layer_that_sets_a_value_lowest_first() -> None:
    words = [
        HOWTO,
        "cluster.nproc_per_node=2",
        "data.source=mock",
        "train.global_batch_size=32",
        "train.global_batch_size=16",
    ]
    said = dfmspec("plan", *words, "--why", "train.global_batch_size").stdout.splitlines()

    assert said[0].startswith("train.global_batch_size = 16  override")
    assert said[1].startswith("  layers: 64 (spec: ")
    assert [layer.split(" ")[0] for layer in said[1].removeprefix("  layers: ").split(" < ")] == ["64", "32", "16"]


def test_why_knows_the_how_tos_names_and_near_spellings() -> None:
    words = [HOWTO, "cluster.nproc_per_node=2", "data.source=mock"]

    assert dfmspec("plan", *words, "--why", "checkpoint.checkpoint_dir").stdout.startswith("checkpoint.save = ")
    assert "did you mean model.num_layers?" in dfmspec("plan", *words, "--why", "model.num_layer").stderr


@pytest.mark.parametrize(
    ("words", "key", "ours", "upstream"),
    [
        (
            ("mixed_precision.recipe=bf16_with_fp8_delayed_scaling_mixed", "cluster.gpu=h100"),
            "model.fp8",
            "null",
            '"hybrid": mixed_precision.fp8',
        ),
        ((), "model.num_layers_at_start_in_bf16", "1", "0: mixed_precision.num_layers_at_start_in_bf16"),
        (("comm_overlap.tp_comm_overlap=false",), "ddp.overlap_grad_reduce", "true", None),
        (("rng.te_rng_tracker=true",), "model.use_te_rng_tracker", "true", None),
        ((), "dist.use_megatron_fsdp", "false", None),
        (
            ("target=dfm_flux", "recipe=flux_schnell", "model.tensor_model_parallel_size=4"),
            "model.expert_tensor_parallel_size",
            "null",
            "4: it fills in",
        ),
    ],
)
def test_why_tells_what_upstream_makes_of_a_value(
    words: tuple, key: str, ours: str, upstream: str | None, tmp_path: Path
) -> None:
    (tmp_path / "spec.yaml").write_text(
        "target: dfm\ncluster: {nproc_per_node: 8}\ndata: {source: mock}\n"
        "train: {global_batch_size: 64, train_iters: 100, eval_iters: 0}\n"
    )
    done = dfmspec("plan", "spec.yaml", *words, "--why", key, cwd=tmp_path)

    assert done.stdout.startswith(f"{key} = {ours}  "), done.stderr
    assert f"upstream has {upstream}" in done.stdout if upstream else "upstream" not in done.stdout


def test_a_plan_that_upstream_would_not_keep_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfmspec.targets.dfm import dit as dfm

    made = dfm.config
    monkeypatch.setattr(
        dfm,
        "config",
        lambda values: (
            made(values) | {"ddp": {"use_megatron_fsdp": True, "no_such_key": 1}, "dist": {"use_megatron_fsdp": False}}
        ),
    )
    with pytest.raises(InvalidSpec, match=r"ddp.no_such_key is dropped; .*dist.use_megatron_fsdp false becomes true"):
        plan(HOWTO, "target=dfm", "cluster.nproc_per_node=2", "train.micro_batch_size=1")


ALLOWED = {
    "dfmspec",
    "typer",
    "shellingham",
    "annotated_doc",
    "yaml",
    "jsonschema_rs",
    "_distutils_hack",
    "sitecustomize",
    "__main__",
    "__mp_main__",
    "org",
    "cython_runtime",
}
"""What the start-up of the command line may load beside Python's own library; each has been measured."""
HEAVY = {"asyncio", "multiprocessing", "tarfile", "concurrent", "http", "unittest", "sqlite3", "xml"}
"""Of Python's own library: what only some commands need."""


def test_what_validate_and_plan_import_stays_light() -> None:
    code = (
        "import sys; before = set(sys.modules); sys.argv = ['dfmspec', *sys.argv[1:]]\n"
        "try:\n    from dfmspec.cli.app import main; main()\n"
        "except SystemExit:\n    print('modules:', *set(sys.modules) - before, sep='\\n', file=sys.stderr)"
    )
    for command in ("validate", "plan"):
        result = subprocess.run(
            [sys.executable, "-c", code, command, "specs/butterfly_tiny_cpu.yaml"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        names = result.stderr.rpartition("modules:\n")[2].splitlines()
        loaded = {name.partition(".")[0] for name in names}
        own = {name for name in loaded if name in sys.stdlib_module_names or name.startswith("_")}

        assert "yaml" in loaded
        assert loaded - own <= ALLOWED, command
        assert not own & HEAVY, command


def test_thousands_of_nodes_share_one_script_and_any_of_theirs_can_be_printed(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("cluster: {nnodes: 4096, nproc_per_node: 8}\ndata: {source: mock}\n")
    assert dfmspec("plan", spec, "-o", tmp_path / "plan").returncode == 0
    made = read_bundle(tmp_path / "plan")
    files = {file.name for file in (tmp_path / "plan").iterdir()}

    assert files == {"plan.json", "guards.json", "source.json", "config.yaml", "node.sh", "examples"}
    assert sum(file.stat().st_size for file in (tmp_path / "plan").iterdir()) < 50_000
    assert made.argv(4095)[made.argv(4095).index("--node-rank") + 1] == "4095"
    assert "--node-rank 4095" in dfmspec("plan", spec, "--format", "sh", "--node", "4095").stdout
    assert len(dfmspec("plan", spec).stdout.splitlines()) < 40
    assert dfmspec("plan", spec, "--ranks").stdout.splitlines()[-1].split()[:3] == ["32767", "4095", "7"]


def test_the_shared_script_takes_its_rank_and_says_what_is_missing(tmp_path: Path) -> None:
    made = plan(HOWTO, "cluster.nnodes=40", "cluster.nproc_per_node=2", "train.global_batch_size=80")
    write_bundle(made, tmp_path / "plan")
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6000"}
    ran = subprocess.run(
        ["bash", str(tmp_path / "plan" / "node.sh"), "7"], env=env, capture_output=True, text=True, check=True
    )
    without = subprocess.run(
        ["bash", str(tmp_path / "plan" / "node.sh")], env=env, capture_output=True, text=True, check=False
    )

    words = ran.stdout.splitlines()
    assert words[words.index("--node-rank") + 1] == "7"
    assert words[words.index("--master-addr") + 1] == "10.0.0.1"
    assert without.returncode != 0
    assert "give the rank of this node, 0 to 39" in without.stderr
