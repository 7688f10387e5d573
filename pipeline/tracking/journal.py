"""What a run has to say to MLflow, in files of its own first: RUN/tracking/*.jsonl, one JSON object a line, only ever added to.

The training process writes lines, which takes microseconds and needs no server; another process sends them (see
`deliver`). A line is complete once its newline is there: what a kill left behind half-written is cut off before the next.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path("tracking")
# Points, tags and states in one, files and pictures in another: a full artifact store must not hold up the curves.
POINTS, FILES = "points.jsonl", "files.jsonl"

Entry = dict[str, Any]


class Journal:
    """One file of lines, written by one process at a time; opening it makes its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = _length_of_whole_lines(self._descriptor)
        os.ftruncate(self._descriptor, self._end)

    def add(self, *entries: Entry) -> None:
        """Add lines; they survive the end of this process. Raises OSError, and then none of them is there."""
        content = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries).encode()
        try:
            written = os.pwrite(self._descriptor, content, self._end)
            if written < len(content):  # the disk became full in the middle
                os.pwrite(self._descriptor, content[written:], self._end + written)
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(content)

    def make_durable(self) -> None:
        """Have what was added survive a power cut, too."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)


def _length_of_whole_lines(descriptor: int) -> int:
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, 1 << 20, max(0, size - (1 << 20)))
    while b"\n" not in tail and len(tail) < size:
        tail = os.pread(descriptor, size, 0)
    return size - (len(tail) - (tail.rfind(b"\n") + 1))


def read_entries(path: Path, start: int = 0) -> Iterator[tuple[Entry, int]]:
    """The entries from byte `start` on, each with the byte where it ends; nothing where there is no file.

    A line that cannot be read, as a power cut leaves where the file system had room for it but not yet its content, is an
    entry that says nothing.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is being written
            start += len(line)
            yield _entry_of(line), start


def _entry_of(line: bytes) -> Entry:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def last_steps(path: Path) -> dict[str, int]:
    """The last step of each curve in a journal of points."""
    steps: dict[str, int] = {}
    for entry, _ in read_entries(path):
        for key, _, _, step in entry.get("points", ()):
            steps[key] = max(step, steps.get(key, -1))
    return steps


def final_figures(path: Path) -> dict[str, float]:
    """The figures without a step in a journal of points."""
    figures: dict[str, float] = {}
    for entry, _ in read_entries(path):
        figures |= {key: value for key, value, _, _ in entry.get("final", ())}
    return figures
