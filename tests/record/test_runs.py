"""Who owns a folder, on file systems that lock and on those that do not."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from dfmspec.errors import PreflightError
from dfmspec.record.run_dir import OWNER
from dfmspec.record.runs import owned


def _locks_fail_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize(("what", "key"), [("run", "run.output_dir"), ("checkpoint.save", "checkpoint.save")])
@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "EIO", "EINVAL", "ESTALE", "EREMOTEIO"])
def test_a_file_system_without_locks_is_told_with_the_folder_and_its_key(
    name: str, what: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(errno, name)
    _locks_fail_with(number, monkeypatch)

    with pytest.raises(PreflightError) as told, owned(tmp_path, what):
        pass
    assert f"{what} {tmp_path} cannot be locked" in str(told.value)
    assert os.strerror(number) in str(told.value)
    assert f"set {key} to a folder" in str(told.value)


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_that_knows_no_locks_at_all_is_owned_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _locks_fail_with(errno.ENOSYS, monkeypatch)
    owner = tmp_path / OWNER

    with owned(tmp_path, "run"):
        assert str(os.getpid()) in owner.read_text()
    assert not owner.exists()
