"""The images that were left out because nobody can decode or read them: one line each in rejected.jsonl, sorted by name."""

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.files import publish, temporary_name

REJECTED_NAME = "rejected.jsonl"
REASON_LETTERS = 80
OTHER_REASONS = "other reasons"
REASONS_NAMED = 20


class Rejects:
    """A table on disk, for there may be as many as images. A context manager: it is deleted at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reasons: Counter[str] = Counter()

    def __enter__(self) -> "Rejects":
        self.path.unlink(missing_ok=True)
        self._table = sqlite3.connect(self.path, isolation_level=None)
        self._table.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; CREATE TABLE rejected (name BLOB PRIMARY KEY, line TEXT)"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return self._reasons.total()

    def add(self, rejected: Iterable[tuple[str, str]]) -> None:
        """Take in (name, reason) of images."""
        for name, reason in rejected:
            self._reasons[summary_of(reason)] += 1
            line = json.dumps({"path": name, "reason": reason})
            self._table.execute("INSERT OR REPLACE INTO rejected VALUES (?, ?)", (name.encode(errors="surrogatepass"), line))

    def first(self, number: int) -> list[tuple[str, str]]:
        """(name, reason) of the first by name."""
        rows = self._table.execute("SELECT line FROM rejected ORDER BY name LIMIT ?", (number,))
        return [(values["path"], values["reason"]) for (line,) in rows for values in [json.loads(line)]]

    def by_reason(self) -> dict[str, int]:
        """How many for each reason, the most frequent first."""
        named = self._reasons.most_common(REASONS_NAMED)
        others = len(self) - sum(number for _, number in named)
        return dict(named) | ({OTHER_REASONS: others} if others else {})

    def write(self, path: Path) -> None:
        """Write all of them, atomically."""
        temporary = temporary_name(path)
        with temporary.open("w", encoding="ascii") as file:
            file.writelines(f"{line}\n" for line in self._lines())
        publish(temporary, path)

    def _lines(self) -> Iterator[str]:
        return (line for (line,) in self._table.execute("SELECT line FROM rejected ORDER BY name"))


def summary_of(reason: str) -> str:
    """A reason without the numbers that differ from image to image."""
    return re.sub(r"\d[\d,]*", "N", reason)[:REASON_LETTERS]
