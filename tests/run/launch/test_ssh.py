"""Launcher ssh: what reaches a node by a login shell with an environment of its own.

Also over two network namespaces, each a machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfmspec.run.launch import ssh
from tests.conftest import ROOT, TINY, dfmspec
from tests.run.test_scripts import STAND_IN

FAKE = """#!{python}
# Like ssh: options, then a host, then words that a login shell of another environment reads. Keeps what it was given.
import json, os, subprocess, sys
words = sys.argv[1:]
end = words.index("--")
host, command = words[end + 1], " ".join(words[end + 2 :])
with open({log!r}, "a") as log:
    log.write(json.dumps([words[:end], host, command]) + "\\n")
if host == "nowhere":
    sys.exit("ssh: connect to host nowhere port 22: No route to host") or 255
inside = [*{inside!r}, host, *{named!r}, host] if {netns} else []
env = {{"HOME": os.environ["HOME"], "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", \
"PYTHONPATH": {root!r}, "PYTHONWARNINGS": "ignore"}}
sys.exit(subprocess.run([*inside, "sh", "-c", command], env=env, cwd="/").returncode)
"""
INSIDE = ["ip", "netns", "exec"]
NAMED = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
"""A namespace's name is also its host's name, which /etc/netns/NAME/hosts tells the others."""
RUN = [
    *TINY,
    "launcher.kind=ssh",
    "cluster.nnodes=2",
    "cluster.nproc_per_node=1",
    "train.global_batch_size=2",
    "train.train_iters=2",
]


def _fake(folder: Path, *, netns: bool = False) -> str:
    """A PATH on which `ssh` is ours."""
    folder.mkdir(exist_ok=True)
    ssh = folder / "ssh"
    text = FAKE.format(
        python=sys.executable, log=str(folder / "log"), netns=netns, root=str(ROOT), inside=INSIDE, named=NAMED
    )
    ssh.write_text(
        text.replace(
            'sys.exit("ssh: connect to host nowhere port 22: No route to host") or 255',
            'print("No route to host", file=sys.stderr); sys.exit(255)',
        )
    )
    ssh.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def spec(dataset: Path, tmp_path: Path) -> Path:
    folder = tmp_path / 'it\'s $(touch broken) "here" ü'
    folder.mkdir()
    (folder / "data").symlink_to(dataset)
    file = folder / "spec.yaml"
    file.write_text(
        "name: two\ndataset: {path: data, task_encoder_seq_length: 256}\n"
        "run: {output_dir: 'run dirs; ls'}\nlauncher: {setup: ['export FROM_SETUP=1']}\n"
    )
    return file


def test_two_nodes_of_hostile_paths_train_over_ssh(spec: Path, tmp_path: Path) -> None:
    words = ["run", spec, *RUN, "launcher.hosts=[me@127.0.0.1, 127.0.0.1]", 'launcher.ssh_options=["-p", "2222"]']
    done = dfmspec(*words, cwd=spec.parent, PATH=_fake(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    run_dir = Path(done.stdout.strip())
    manifest = json.loads((run_dir / "manifest.json").read_text())
    calls = [json.loads(line) for line in (tmp_path / "bin" / "log").read_text().splitlines()]

    assert [node["host"] for node in manifest["attempts"][0]["nodes"]] == ["me@127.0.0.1", "127.0.0.1"]
    assert [node["exit_code"] for node in manifest["attempts"][0]["nodes"]] == [0, 0]
    assert all(options[:3] == ["-tt", "-p", "2222"] and "BatchMode=yes" in options for options, _, _ in calls)
    assert not (spec.parent / "broken").exists()
    assert not list(tmp_path.glob("**/broken"))


def test_a_node_that_cannot_be_reached_is_told_before_anything_starts(spec: Path, tmp_path: Path) -> None:
    done = dfmspec(
        "run", spec, *RUN, "launcher.hosts=[127.0.0.1, nowhere]", cwd=spec.parent, PATH=_fake(tmp_path / "bin")
    )

    assert done.returncode == 4
    assert "nowhere cannot be reached by ssh: No route to host" in done.stderr
    assert "Traceback" not in done.stderr


ALIASES = "launcher.hosts=[gpu-a.invalid, gpu-b.invalid]"
"""Names that ssh finds in its configuration, and a resolver nowhere."""


def test_an_alias_of_ssh_as_the_meeting_point_is_told_before_anything_starts(spec: Path, tmp_path: Path) -> None:
    done = dfmspec("run", spec, *RUN, ALIASES, cwd=spec.parent, PATH=_fake(tmp_path / "bin"))

    assert done.returncode == 4
    assert "gpu-a.invalid cannot resolve gpu-a.invalid" in done.stderr
    assert "set cluster.master_addr" in done.stderr


def test_a_meeting_point_of_the_spec_that_no_node_resolves_is_told_by_its_key(spec: Path, tmp_path: Path) -> None:
    words = [*RUN, "launcher.hosts=[127.0.0.1, 127.0.0.1]", "cluster.master_addr=head.invalid"]
    done = dfmspec("run", spec, *words, cwd=spec.parent, PATH=_fake(tmp_path / "bin"))

    assert done.returncode == 4
    assert "127.0.0.1 cannot resolve cluster.master_addr head.invalid" in done.stderr


def test_aliases_of_ssh_are_no_hindrance_where_the_spec_gives_the_address(spec: Path, tmp_path: Path) -> None:
    words = [*RUN, ALIASES, "cluster.master_addr=192.0.2.1", 'launcher.setup=["false"]']
    done = dfmspec("run", spec, *words, cwd=spec.parent, PATH=_fake(tmp_path / "bin"))

    assert "torchrun ended with 1, 1" in done.stderr


@pytest.mark.parametrize("name", ["", "localhost", "192.0.2.1", "2001:db8::1", "anything.invalid"])
def test_what_is_known_or_cannot_be_asked_stops_no_node(name: str, tmp_path: Path) -> None:
    """An address needs no name anywhere; the last one is asked where there is no getent."""
    path = os.environ["PATH"] if name != "anything.invalid" else str(tmp_path)
    asked = subprocess.run(["/bin/sh", "-c", ssh._QUESTION, "sh", __file__, name], env={"PATH": path}, check=False)

    assert asked.returncode == 0


def test_a_failure_on_one_node_ends_the_run_with_its_word(spec: Path, tmp_path: Path) -> None:
    words = ["run", spec, *RUN, "launcher.hosts=[127.0.0.1, 127.0.0.1]", 'launcher.setup=["false"]']
    done = dfmspec(*words, cwd=spec.parent, PATH=_fake(tmp_path / "bin"))

    assert done.returncode == 1
    assert "torchrun ended with 1, 1" in done.stderr


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.99.77.1 and 10.99.77.2."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    names = [f"dfmspec{os.getpid()}a", f"dfmspec{os.getpid()}b"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.99.77.{i + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            known = Path("/etc/netns") / name
            known.mkdir(parents=True)
            (known / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"10.99.77.{j + 1} {other}\n" for j, other in enumerate(names))
            )
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.mark.long
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines_on_a_cable(rendezvous: str, spec: Path, tmp_path: Path, namespaces: list[str]) -> None:
    """Each node has its own address and its own loopback: nothing but the cable joins them."""
    words = [
        *RUN,
        f"launcher.hosts=[{namespaces[0]}, {namespaces[1]}]",
        f"launcher.rendezvous={rendezvous}",
        "launcher.env={GLOO_SOCKET_IFNAME: cable}",
        "model.tensor_model_parallel_size=2",
        "train.global_batch_size=1",
    ]
    apart = dfmspec("run", spec, *words, cwd=spec.parent, PATH=_fake(tmp_path / "bin", netns=True))
    assert apart.returncode == 0, apart.stderr
    local = [
        word
        for word in words
        if not word.startswith(("launcher.hosts", "launcher.env", "cluster.master", "launcher.kind"))
    ]
    together = dfmspec("run", spec, *local, cwd=spec.parent)
    assert together.returncode == 0, together.stderr

    assert _losses(apart.stdout) == pytest.approx(_losses(together.stdout), rel=1e-6)


@pytest.mark.long
def test_the_scripts_of_a_bundle_do_the_same_by_hand(spec: Path, tmp_path: Path, namespaces: list[str]) -> None:
    """The how-to's two commands, one on each machine."""
    words = [word for word in RUN if not word.startswith("launcher.")]
    assert (
        dfmspec(
            "plan", spec, *words, "launcher.env={GLOO_SOCKET_IFNAME: cable}", "-o", tmp_path / "plan", cwd=spec.parent
        ).returncode
        == 0
    )
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DFMSPEC_RUN_DIR": str(tmp_path / "out"),
        "MASTER_ADDR": "10.99.77.1",
        "MASTER_PORT": "29512",
    }
    (tmp_path / "out").mkdir()
    nodes = [
        subprocess.Popen(
            [*INSIDE, name, *NAMED, name, "bash", str(tmp_path / "plan" / f"node{i}.sh")],
            env=env,
            cwd=spec.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, name in enumerate(namespaces)
    ]
    said = [node.communicate(timeout=200)[0] for node in nodes]

    assert [node.returncode for node in nodes] == [0, 0]
    assert "Iteration 2/2" in said[0]
    assert (tmp_path / "out" / "checkpoints" / "iter_0000002").is_dir()


def _losses(run_dir: str) -> list[float]:
    events = [json.loads(line) for line in (Path(run_dir.strip()) / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["type"] == "iteration"]


SCRIPT = f"""
name: two
target: dfm
cluster: {{nnodes: 2, nproc_per_node: 1, device: cpu}}
launcher: {{kind: ssh, hosts: [localhost, b], root: {STAND_IN}}}
data: {{source: mock}}
train: {{global_batch_size: 2, train_iters: 3, eval_iters: 0}}
logger: {{log_interval: 1}}
run: {{output_dir: 'run dirs; ls'}}
"""


def test_a_script_is_looked_at_and_run_on_each_node(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s $(touch broken) "here" ü'
    folder.mkdir()
    (folder / "spec.yaml").write_text(SCRIPT)
    path = _fake(tmp_path / "bin")
    refused = dfmspec("run", "spec.yaml", cwd=folder, PATH=path)
    done = dfmspec("run", "spec.yaml", "--allow-revision", cwd=folder, PATH=path)
    assert done.stdout, (refused.stderr, done.stderr)
    run_dir = Path(done.stdout.strip())
    manifest = json.loads((run_dir / "manifest.json").read_text())

    assert refused.returncode == 4, refused.stderr
    assert "another revision than 7cb7634" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["failed", "finished"]
    assert manifest["attempts"][0]["failure"]["error_type"] == "configuration"
    assert {place.name for place in run_dir.glob("attempts/2/node*/preflight.json")} == {"preflight.json"}
    assert not (folder / "broken").exists()
