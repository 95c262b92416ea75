"""Runs a rank of a script that knows nothing of dfmspec: torchrun starts this, with the script's words after its own.

    rank.py SCRIPT WORD...

It keeps the rank's process id, what it prints and the error that ends it where a run's supervisor looks; lets rank 0 be
asked to stop by a file; has every rank end with its torchrun; and installs the script's handler of a signal, which
DFMSPEC_HANDLER names as MODULE:CLASS. It travels with a bundle, and needs Python alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

_PR_SET_PDEATHSIG = 1
"""From Linux's <sys/prctl.h>."""
_SECONDS_BETWEEN_LOOKS = 1.0
GOES_ON = "goes_on.json"
"""In a run directory: what a run that began elsewhere reads once it has saved."""


def main(words: list[str]) -> None:
    """Run the script in this process, as Python would by itself."""
    attempt = Path(os.environ["DFMSPEC_ATTEMPT_DIR"])
    node = os.environ["GROUP_RANK"]
    rank = int(os.environ["RANK"])
    folder = attempt / f"node{node}" / f"rank{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid").write_text(str(os.getpid()))
    if rank == 0:
        _pass_on(attempt / "stop")
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _to(folder / "stdout", sys.stdout.fileno())
    _to(folder / "stderr", sys.stderr.fileno())

    try:
        handler = os.environ.get("DFMSPEC_HANDLER")
        if handler:
            _install(handler)
        words = _going_on(words)
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            _write_error(folder / "error.json", rank, error)
        raise


def _going_on(words: list[str]) -> list[str]:
    """The words with another configuration, where the run has saved since it was told to start elsewhere."""
    if "--config-file" not in words:
        return words
    place = words.index("--config-file") + 1
    file = Path(words[place]).with_name(GOES_ON)
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):  # it began where it saves
        return words
    has_saved = Path(known["tracker"]).exists()
    return [*words[:place], known["config"], *words[place + 1 :]] if has_saved else words


def _install(name: str) -> None:
    """Let every handler of a signal be installed when it is made: upstream's is a context that nothing enters."""
    module, _, of_it = name.partition(":")
    handler = getattr(import_module(module), of_it)
    initialized = handler.__init__

    def installed(self: object, *args: object, **kwargs: object) -> None:
        initialized(self, *args, **kwargs)
        self.__enter__()  # type: ignore[attr-defined]

    handler.__init__ = installed


def _write_error(file: Path, rank: int, error: BaseException) -> None:
    """What ended this rank, and when."""
    record = {
        "rank": rank,
        "error_type": type(error).__name__,
        "message": str(error)[:2000],
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
        "time": time.time(),
    }
    with suppress(OSError):
        file.write_text(json.dumps(record))


def _to(file: Path, stream: int) -> None:
    """Let a stream of this process go to a file."""
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(target, stream)
    os.close(target)


def _pass_on(stop: Path) -> None:
    """Let a process look for a file that asks the ranks to stop, and hand this one the signal whose number it holds.

    One rank is enough: upstream's agree on a signal that any of them has.
    """
    asked = os.getpid()
    if os.fork():
        return
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    while os.getppid() == asked:
        number = _number_in(stop)
        if number:
            os.kill(asked, number)
            break
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(0)


def _number_in(stop: Path) -> int:
    """The number of a signal; 0: nobody has asked, or it is not written yet."""
    try:
        return int(stop.read_text())
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    main(sys.argv[1:])
