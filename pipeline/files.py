"""Files that stages hand to each other: written whole or not at all, named by their digest, guarded by a lock.

A newcomer would forget the fsync: without it a rename can survive a power cut while the bytes do not.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RunError

CHUNK_BYTES = 1 << 20


def digest_of(value: Any) -> str:
    """Sha256 of the compact JSON of `value` with sorted keys: the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Sha256 of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path, owner: str = "") -> Path:
    """The name under which `path` is written before it is renamed; a reader never looks there.

    `owner` keeps jobs apart that may write the same file at the same time.
    """
    return path.with_name(f".{path.name}.{owner}.tmp" if owner else f".{path.name}.tmp")


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its final name, durably."""
    fsync_file(temporary)
    temporary.replace(final)
    fsync_folder(final.parent)


def write_bytes(path: Path, content: bytes, owner: str = "") -> None:
    """Write a whole file under a temporary name, then rename it. The temporary file is gone if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path, owner)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. A number that is none (nan, inf) becomes null: JSON has no word for it."""
    write_bytes(path, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def allow_open_files(number: int) -> None:
    """Have this process open so many files at once, as far as the machine allows: many begin with no more than 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, number), hard), hard))


def move_aside(path: Path, like: Path | None = None) -> Path:
    """Rename `path` to its own name (or that of `like`) with a time stamp and return that name; nothing is ever deleted."""
    like = like or path
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    target = like.with_name(f"{like.name}.{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = like.with_name(f"{like.name}.{stamp}-{number}")
    path.rename(target)
    return target


@contextlib.contextmanager
def locked(path: Path, wait_seconds: float = 0.0, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of the folder `path` (a `.NAME.lock` file beside it) until the block ends or this process dies.

    Several jobs may hold it at once if all of them do so `shared`. Raises RunError when another process still holds it
    after `wait_seconds`.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + wait_seconds
    try:
        while not _try_lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise RunError(
                    f"{path} is locked by another job ({holder or 'unknown'}). "
                    "Wait until it ends, stop it, or use another --name."
                )
            time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
