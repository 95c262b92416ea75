"""Runs in containers, with stand-ins for the engines that write down their words and run the command.

That podman itself runs them was tried by hand (docs/howto/containers.md).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from dfmspec.errors import StalePlanError
from dfmspec.plan.containers import srun_words
from dfmspec.plan.plan import Plan, make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.run.guards import check_guards
from tests.conftest import dfmspec
from tests.run.test_run import manifest_of
from tests.run.test_scripts import SHORT, SPEC, begun

FAKES = Path(__file__).parent / "fakes"
IMAGE = "registry.example.org/dfm@sha256:" + "0123456789abcdef" * 4


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "dit.yaml"
    path.write_text(SPEC)
    return path


def fakes(tmp_path: Path) -> dict[str, str]:
    """The environment in which the engines are the stand-ins."""
    path = os.pathsep.join([str(FAKES), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "FAKE_LOG": str(tmp_path / "words"), "STANDIN_SECONDS": "0.01"}


def words_of(tmp_path: Path) -> list[str]:
    return (tmp_path / "words").read_text().splitlines()


def plan_of(*words: str) -> Plan:
    return make_plan(resolve_spec(load_spec(None, ["target=dfm", "data.source=mock", *words])))


@pytest.mark.parametrize("engine", ["docker", pytest.param("podman", marks=pytest.mark.long)])
def test_a_run_enters_its_container_and_is_judged_as_any(engine: str, spec: Path, tmp_path: Path) -> None:
    words = [f"launcher.container={IMAGE}", f"launcher.container_engine={engine}", *SHORT]
    words += [f"launcher.container_mounts=[{tmp_path}]", "launcher.container_options=[--shm-size=8g]"]
    done = dfmspec("run", "dit.yaml", "--allow-revision", *words, cwd=tmp_path, **fakes(tmp_path))
    run_dir = done.stdout.strip()
    said = words_of(tmp_path)

    assert done.returncode == 0, done.stderr
    assert manifest_of(run_dir)["environment"]["training"]["sources"]  # looked at inside
    assert said[:3] == [f"--- {engine}", "run", "--rm"]
    assert said[said.index("--name") + 1] == f"dfmspec-{Path(run_dir).name}-node0"
    assert said.count(f"{run_dir}:{run_dir}") == 1
    assert f"{tmp_path}:{tmp_path}" in said
    assert "--shm-size=8g" in said
    assert ("--user" in said) == (engine == "docker")
    assert said[said.index(IMAGE) :] == [IMAGE, "bash", f"{run_dir}/node0.sh"]


@pytest.mark.long
def test_a_run_in_a_container_stops_by_a_file_and_goes_on(spec: Path, tmp_path: Path) -> None:
    env = fakes(tmp_path) | {"STANDIN_SECONDS": "0.3"}
    process = begun(tmp_path, f"launcher.container={IMAGE}", **env)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    on = dfmspec("run", out.strip(), "--allow-revision", cwd=tmp_path, **fakes(tmp_path))

    assert process.returncode == 75, err
    assert (Path(out.strip()) / "attempts" / "1" / "stop").exists()
    assert on.returncode == 0, on.stderr


@pytest.mark.long
def test_a_run_that_is_ended_ends_its_container(spec: Path, tmp_path: Path) -> None:
    env = fakes(tmp_path) | {"STANDIN_SECONDS": "0.5"}
    process = begun(tmp_path, f"launcher.container={IMAGE}", iterations=1, **env)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    said = words_of(tmp_path)

    assert process.returncode in (75, 128 + signal.SIGINT)
    if process.returncode != 75:
        assert said[-2:] == ["kill", f"dfmspec-{Path(out.strip()).name}-node0"]


def test_apptainer_takes_a_file_whose_digest_is_a_guard(spec: Path, tmp_path: Path) -> None:
    image = tmp_path / "dfm.sif"
    image.write_bytes(b"an image")
    env = fakes(tmp_path) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = [f"launcher.container={image}", *SHORT]
    made = dfmspec("plan", "dit.yaml", *words, "-o", "bundle", cwd=tmp_path, **env)
    done = dfmspec("run", "bundle", "--allow-revision", cwd=tmp_path, **env)
    image.write_bytes(b"another image")
    changed = dfmspec("run", "bundle", "--allow-revision", cwd=tmp_path, **env)

    assert made.returncode == 0, made.stderr
    assert done.returncode == 0, done.stderr
    assert words_of(tmp_path)[:2] == ["--- apptainer", "exec"]
    assert changed.returncode == 3
    assert f"the image {image} has changed" in changed.stderr


def test_an_image_that_was_replaced_within_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = tmp_path / "dfm.sif"
    image.write_bytes(b"one")
    plan = plan_of(f"launcher.container={image}")
    check_guards(plan)
    check_guards(plan)
    image.unlink()
    image.write_bytes(b"two")

    with pytest.raises(StalePlanError, match="the image"):
        check_guards(plan)


def test_an_engine_that_is_not_there_is_told_before_anything_is_made(spec: Path, tmp_path: Path) -> None:
    env = fakes(tmp_path) | {"PATH": "/nowhere"}
    words = [f"launcher.container={IMAGE}", "launcher.container_engine=docker"]
    done = dfmspec("run", "dit.yaml", *words, cwd=tmp_path, **env)

    assert done.returncode == 4
    assert "docker is not found on PATH" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_is_to_be_mounted_and_is_not_there_is_told_by_the_engine_too(spec: Path, tmp_path: Path) -> None:
    words = [f"launcher.container={IMAGE}", "launcher.container_mounts=[/nowhere/at/all]"]
    done = dfmspec("run", "dit.yaml", *words, cwd=tmp_path, **fakes(tmp_path))

    assert done.returncode == 1
    assert "/nowhere/at/all, which is to be mounted, is not there" in done.stderr


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (IMAGE, IMAGE.replace("/", "#", 1)),
        ("nvidia/cuda@sha256:" + "0" * 64, "nvidia/cuda@sha256:" + "0" * 64),
        ("/images/dfm.sqsh", "/images/dfm.sqsh"),
    ],
)
def test_pyxis_has_enroots_names(image: str, named: str) -> None:
    words = srun_words(plan_of("launcher.kind=slurm", "launcher.time_limit=1:00:00", f"launcher.container={image}"))

    assert words[0].replace("'", "") == f"--container-image={named}"


def test_what_a_run_starts_from_and_writes_to_is_mounted_by_its_name(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    words = [f"launcher.container={IMAGE}", *SHORT]
    save = tmp_path / "link" / "checkpoints"
    first = dfmspec(
        "run", "dit.yaml", "--allow-revision", *words, f"checkpoint.save={save}",
        f"logger.tensorboard_dir={tmp_path / 'board'}", cwd=tmp_path, **fakes(tmp_path),
    )  # fmt: skip
    said = words_of(tmp_path)
    on = dfmspec(
        "run", "dit.yaml", "--allow-revision", *words, "train.train_iters=5", f"run.resume={save}",
        cwd=tmp_path, **fakes(tmp_path),
    )  # fmt: skip

    assert first.returncode == 0, first.stderr
    assert f"{save}:{save}" in said
    assert (tmp_path / "board").is_dir()
    assert on.returncode == 0, on.stderr
    assert f"{os.path.realpath(save)}:{os.path.realpath(save)}" in words_of(tmp_path)


def test_setup_runs_around_the_container_under_pyxis_too(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("spec_version: 1\ndata: {source: mock}\n")
    words = [
        "launcher.kind=slurm", "launcher.time_limit=1:00:00", "launcher.container=~/x.sqsh",
        'launcher.setup=["module load enroot"]',
    ]  # fmt: skip
    dfmspec("plan", "spec.yaml", *words, "-o", "bundle", cwd=tmp_path)
    job = (tmp_path / "bundle" / "job.sbatch").read_text()

    assert job.index("module load enroot") < job.index("export DFMSPEC_INSIDE=1") < job.index("\nsrun ")
    assert '--container-image="$HOME"/x.sqsh' in job
