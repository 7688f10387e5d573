"""What can go wrong through no fault of ours, and the exit code that says so.

Raise one of these for anything a user can cause. The command line prints the message as one line, without a traceback, so a
message names the thing, what was expected, and what to do next.
"""

import difflib
import errno
import signal
from collections.abc import Iterable


class ShardlineError(Exception):
    """A mistake that the user can mend: one line on stderr, exit code 2."""

    exit_code = 2


class ConfigError(ShardlineError):
    """A key, value or combination of values in the configuration that cannot work."""


class DataError(ShardlineError):
    """Images, shards, an index or a manifest that are not what they should be."""


class RunError(ShardlineError):
    """A run folder that is missing something, is locked, or belongs to something else."""


class ModelError(ShardlineError):
    """An ONNX file that is not a Shardline model, or no longer the one that was proved."""


class GateError(ShardlineError):
    """A gate (check, parity) said no: exit code 3."""

    exit_code = 3


class ProcessError(ShardlineError):
    """A process that died or hangs, through no mistake in the settings: exit code 1, and another try may help."""

    exit_code = 1


class TrainingError(ShardlineError):
    """A training that cannot go on as it is set, for example because its loss is no longer finite."""


class StoppedError(ShardlineError):
    """Training was asked to stop by a signal, and saved first: exit code 130 for SIGINT, 143 for SIGTERM and SIGUSR1."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 130 if signal_number == signal.SIGINT else 143


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space or choose another folder, then run the same command again.",
    errno.EDQUOT: "The disk quota is used up: free some space or choose another folder, then run the same command again.",
    errno.EACCES: "No permission: choose a folder that you may write to, or change its owner or mode.",
    errno.EPERM: "Not permitted: choose a folder that you may write to, or change its owner or mode.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.ENOTDIR: "A file stands where a folder is needed: rename it or choose another folder.",
    errno.ENAMETOOLONG: "No file can have such a name: give a shorter one.",
    errno.EBUSY: "It is in use, or mounted on its own: stop what uses it, or mount the folder above it.",
    errno.EMFILE: "Too many open files: raise the limit with `ulimit -n`.",
}


def explain_os_error(error: OSError, doing: str = "") -> ShardlineError | None:
    """Turn an operating system error that a user can mend into one clear line; None if it is no such error."""
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    where = error.filename if error.filename is not None else doing
    return ShardlineError(f"{where}: {error.strerror}. {remedy}" if where else f"{error.strerror}. {remedy}")
