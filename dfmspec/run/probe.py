"""Looks at a node before a run starts there: run by the interpreter that will train, which needs no dfmspec.

    python probe.py QUESTION ANSWER [ROOT]

It imports none of what it looks at, so that it takes a second and not a start. QUESTION and ANSWER are JSON files; the
answer has what was found, and the faults, each with its check, place, what is, what is needed, and a way out. The exit
code is 4 where there are any. ROOT: where the code of a script is on this node.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
FAULTY = 4
_DRIVER = Path("/proc/driver/nvidia/version")
_DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA's major version -> the oldest driver that runs it."""


def look(question: Facts) -> Facts:
    """What is found here, and what is wrong with it.

    Args:
        question: modules (module -> how to install it), distributions (whose versions are told), sources (name,
            revision, module, digest), root, variable, together (as dfmspec.targets.Together), gpus (0: none),
            any_revision, torchrun_options (further ones of a spec).
    """
    answer: Facts = {
        "python": sys.version.split()[0],
        "interpreter": sys.executable,
        "versions": {},
        "sources": [],
        "faults": [],
    }
    for name in question["distributions"]:
        found = _version(name)
        if found is not None:
            answer["versions"][name] = found
    checks = [_modules, _sources, _together]
    if question.get("torchrun_options"):
        checks.append(_torchrun)
    if question["gpus"]:
        checks += [_driver, _gpus, _cuda_build]
    for check in checks:
        answer["faults"] += check(question, answer)
    return answer


def _fault(check: str, place: str, found: str, needed: str, way_out: str) -> Facts:
    return {"check": check, "place": place, "is": found, "needed": needed, "way_out": way_out}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_found(module: str) -> bool:
    """Whether a module could be imported, as far as can be told without."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def _place_of(module: str) -> Path | None:
    """The folder of a package, or a module's file; nothing of it is imported, but for the package around it."""
    spec = importlib.util.find_spec(module) if _is_found(module) else None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin else None


def _modules(question: Facts, answer: Facts) -> list[Facts]:
    faults = []
    for module, mends in question["modules"].items():
        if not _is_found(module):
            faults.append(_fault("packages", sys.executable, f"it does not find {module}", module, mends))
    return faults


_PARSES = (
    "import sys; from torch.distributed.run import get_args_parser as p; p().parse_args([*sys.argv[1:], 'script'])"
)
"""What says whether torchrun takes options: its own parser."""


def _torchrun(question: Facts, answer: Facts) -> list[Facts]:
    """torchrun's own parser takes the options that a spec adds."""
    options = question["torchrun_options"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PARSES, *options], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode == 0:
        return []
    said = done.stderr.strip().splitlines() or ["it says nothing"]
    reason = said[-1].rpartition("error: ")[2]
    return [
        _fault(
            "torchrun",
            sys.executable,
            f"torchrun does not take {' '.join(options)}: {reason}",
            "options that this torchrun has",
            "mend launcher.torchrun_options, or the words behind --",
        )
    ]


def _sources(question: Facts, answer: Facts) -> list[Facts]:
    """The code at its revision, told by its digest."""
    faults = []
    for source in question["sources"]:
        name = source["name"]
        is_file = "/" in source["module"]
        place = Path(question["root"], source["module"]) if is_file else _place_of(source["module"])
        if place is None or not place.exists():
            faults.append(_not_there(source, place, question))
            continue
        digest = _digest(place)
        is_it = digest == source["digest"]
        answer["sources"].append(
            {"name": name, "place": str(place), "digest": digest, "revision": source["revision"] if is_it else None}
        )
        if not is_it and not question["any_revision"]:
            faults.append(
                _fault(
                    "revision",
                    str(place),
                    f"{name} is another revision than {source['revision']}, or was changed",
                    f"{name} at {source['revision']}, by which the spec was checked",
                    f"check out {source['revision']} there, or accept it with --allow-revision",
                )
            )
    return faults


def _not_there(source: Facts, place: Path | None, question: Facts) -> Facts:
    """The fault of code that is not found."""
    name = source["name"]
    root = question["root"]
    if place is None and not Path(root).is_dir():
        place = Path(root)
        found = "there is no such folder"
    elif place is None:
        place = Path(sys.executable)
        found = f"it does not find {source['module']}"
    else:
        found = "it is not there"
    return _fault(
        "packages",
        str(place),
        found,
        f"{name} at {source['revision']}",
        f"set launcher.root or {question['variable']} to the checkout, launcher.python to the interpreter that has its "
        "packages, or PYTHONPATH in launcher.env",
    )


def _digest(place: Path) -> str:
    """sha256 over a file, or over the names and contents of a package's Python files."""
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    whole = hashlib.sha256()
    files = {file.relative_to(place).as_posix(): file for file in place.rglob("*.py")}
    for name in sorted(files):
        content = hashlib.sha256(files[name].read_bytes()).digest()
        whole.update(name.encode() + b"\0" + content)
    return whole.hexdigest()


def _together(question: Facts, answer: Facts) -> list[Facts]:
    """Versions that do not go together."""
    faults = []
    for rule in question["together"]:
        version = _version(rule["name"])
        if version is None or not version.startswith(rule["versions"]):
            continue
        missing = [need for need in rule["needs"] if not _is_met(need)]
        if missing:
            faults.append(
                _fault(
                    "versions",
                    sys.executable,
                    f"{rule['name']} {version} is without {', '.join(missing)}: {rule['why']}",
                    ", ".join(rule["needs"]),
                    f"pip install {rule['mends']}",
                )
            )
    return faults


def _is_met(need: str) -> bool:
    """Whether a module is found, or a distribution is older than a version (or absent)."""
    name, below, bound = need.partition("<")
    if not below:
        return _is_found(name)
    version = _version(name)
    return version is None or _numbers(version) < _numbers(bound)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version.partition("+")[0])[:3])


def _driver(question: Facts, answer: Facts) -> list[Facts]:
    if _DRIVER.exists() or Path("/dev/nvidiactl").exists():
        return []
    return [
        _fault(
            "driver",
            os.uname().nodename,
            "this machine has no NVIDIA driver",
            "a driver, since the plan is for CUDA",
            "start it on a machine with GPUs, or give cluster.device=cpu to try it on the CPU",
        )
    ]


def _gpus(question: Facts, answer: Facts) -> list[Facts]:
    """As many GPUs as the plan has ranks here."""
    count = len([device for device in Path("/dev").iterdir() if re.fullmatch(r"nvidia\d+", device.name)])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    answer["gpus"] = count
    if count >= question["gpus"] or not (_DRIVER.exists() or Path("/dev/nvidiactl").exists()):
        return []
    by = "" if visible is None else f" by CUDA_VISIBLE_DEVICES={visible}"
    return [
        _fault(
            "gpus",
            os.uname().nodename,
            f"{count} GPUs{by}",
            f"{question['gpus']}, one a rank",
            f"give cluster.nproc_per_node={count}" if count else "ask for GPUs",
        )
    ]


def _cuda_build(question: Facts, answer: Facts) -> list[Facts]:
    """torch is built for CUDA, and the driver runs that."""
    place = _place_of("torch")
    if place is None:
        return []
    try:
        text = (place / "version.py").read_text()
    except OSError:
        return []
    found = re.search(r"^cuda\b[^=]*= *(?:None|'([0-9.]+)')", text, re.MULTILINE)
    if found is None:
        return []
    if found[1] is None:
        return [
            _fault(
                "torch",
                str(place),
                "torch is a build for the CPU",
                "a build for CUDA",
                "install torch for CUDA",
            )
        ]
    driver = _driver_version()
    needed = _DRIVERS.get(int(found[1].partition(".")[0]))
    if driver is None or needed is None or driver >= needed:
        return []
    return [
        _fault(
            "driver",
            os.uname().nodename,
            f"the NVIDIA driver is {driver}, and torch is built for CUDA {found[1]}",
            f"a driver from {needed} on",
            "use a torch for an older CUDA, or a newer driver",
        )
    ]


def _driver_version() -> int | None:
    try:
        found = re.search(r"Kernel Module[^\n]*?\b(\d{3})\.\d", _DRIVER.read_text())
    except OSError:
        return None
    return None if found is None else int(found[1])


def main(arguments: list[str]) -> int:
    """Answer a question; returns the exit code."""
    file, answer, *root = arguments
    question = json.loads(Path(file).read_text())
    if root:
        question["root"] = root[0]
    found = look(question)
    Path(answer).write_text(json.dumps(found))
    for fault in found["faults"]:
        print(f"error: {fault['place']}: {fault['is']}; needed: {fault['needed']}; {fault['way_out']}", file=sys.stderr)
    return FAULTY if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
