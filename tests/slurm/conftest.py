"""A Slurm cluster of two nodes on this machine: its own munge, ports and folder; all that it starts, it stops."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CONF = """
ClusterName=dfmspec
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ReturnToService=2
MinJobAge=300
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Its folder; SLURM_CONF points at it."""
    if os.geteuid() != 0 or not shutil.which("slurmctld") or not shutil.which("munged"):
        pytest.fail("make slurm-test needs root, slurm-wlm and munge")
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("slurm")))
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=socket.gethostname().split(".")[0], ports=_free_ports(3)))
    env = os.environ | {"SLURM_CONF": str(conf)}
    munged = [
        "munged",
        "--foreground",
        "--force",
        f"--socket={folder}/munge.socket",
        f"--key-file={folder}/munge.key",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    ]
    started = []
    try:
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            log = (folder / f"{command[0]}.{command[-1]}.out".replace("/", "_")).open("wb")
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            time.sleep(0.5)
        _wait_for_nodes(env, folder)
        os.environ["SLURM_CONF"] = str(conf)
        yield folder
    finally:
        os.environ.pop("SLURM_CONF", None)
        _cancel_all(env)
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


def _cancel_all(env: dict[str, str]) -> None:
    """The daemons must live until the last step has ended: nobody else would end it."""
    subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, check=False)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, text=True, check=False)
        if left.returncode or not left.stdout.strip():
            return
        time.sleep(0.5)


def _wait_for_nodes(env: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        said = subprocess.run(
            ["sinfo", "--noheader", "--format=%T %D"], env=env, capture_output=True, text=True, check=False
        ).stdout.strip()
        if said == "idle 2":
            return
        time.sleep(0.5)
    logs = "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in folder.glob("*.log"))
    pytest.fail(f"the cluster did not come up: {said}\n{logs}")
