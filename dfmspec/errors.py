"""What can go wrong outside a spec, and the exit code that each kind has.

DfmspecError
 +-- UsageError           2   a flag, a file that is not there, an override that cannot be parsed
 +-- StalePlanError       3   a saved plan whose guards no longer hold
 +-- PreflightError       4   the environment: a missing extra, no device, no disk, no port
 +-- LockedError          5   another process owns the run
 +-- InvalidSpec          1   findings of severity error (they are printed, not raised at the user)
 +-- TrainingError        1   training cannot go on: CheckpointError, DataError, LoaderError
 +-- InternalError       70   a fault of dfmspec itself, beside which the rest was done

A fault of dfmspec itself is any other exception, too: exit 70, with a report file.
"""

from __future__ import annotations

# Exit codes.
OK = 0
FINDINGS = 1
USAGE = 2
STALE = 3
PREFLIGHT = 4
LOCKED = 5
INTERNAL = 70
RESUMABLE = 75
"""Training was stopped by a signal, and goes on when it is started again: EX_TEMPFAIL of <sysexits.h>."""


class DfmspecError(Exception):
    """An error with a message for the user: what is, what is needed, one way out."""

    exit_code = FINDINGS


class UsageError(DfmspecError):
    """The command line cannot be carried out as written."""

    exit_code = USAGE


class StalePlanError(DfmspecError):
    """A saved plan no longer describes what would run."""

    exit_code = STALE


class PreflightError(DfmspecError):
    """The environment lacks something that the run needs."""

    exit_code = PREFLIGHT


class LockedError(DfmspecError):
    """Another process owns the run directory."""

    exit_code = LOCKED


class InvalidSpec(DfmspecError):
    """The spec has findings of severity error."""

    exit_code = FINDINGS


class InternalError(DfmspecError):
    """A fault of dfmspec itself, of which a report file tells."""

    exit_code = INTERNAL


class TrainingError(DfmspecError):
    """Training cannot go on, for a reason that lies in its input or its numbers."""


class CheckpointError(TrainingError):
    """No checkpoint can be loaded or written; the message says what was found and what to do."""


class DataError(TrainingError):
    """A sample that cannot be used; the message names its key, its shard and what to do."""


class LoaderError(TrainingError):
    """A process that loads data is lost; the message says what ends such processes."""
