"""FOLDER/.partial: what an unfinished data set consists of, so that an interrupted run goes on where it was.

Every file in it is whole as soon as it has its name, and is what any other run of the same plan would have written: chunks of
hashes, shards, and a sidecar of each shard. Nothing else has to be remembered.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.plan import Layout
from pipeline.errors import DataError
from pipeline.files import write_bytes
from pipeline.manifest import MANIFEST_NAME, Task

PARTIAL = ".partial"
# What lies in the folder of a data set, complete or not. Anything else there is somebody's, and not touched.
OWN_NAMES = re.compile(
    rf"(train|val|test)(-\d{{6}}\.tar|\.index\.npy|\.labels\.npy)|{re.escape(PARTIAL)}|rejected\.jsonl|inspect\.(html|json)"
    rf"|\.inspect\.(html|json)\.tmp|{re.escape(MANIFEST_NAME)}|\.{re.escape(MANIFEST_NAME)}\.tmp|\.rejected\.jsonl\.tmp"
)
PART_LOCK = re.compile(r"\.part-\d+-of-(\d+)\.lock")


@dataclass(frozen=True)
class Plan:
    """What is to be written. Two runs with equal `preparation` and `fingerprint` write the same bytes."""

    preparation: dict[str, Any]
    fingerprint: str
    source: str
    class_names: list[str]
    task: Task
    num_ignored: int

    def is_same(self, other: "Plan") -> bool:
        """Whether the work of one can go into the data set of the other."""
        return (self.preparation, self.fingerprint) == (other.preparation, other.fingerprint)


@dataclass(frozen=True)
class Share:
    """Which of the numbered pieces of work belong to job `part` of `num_parts`, counted from 1; all of them without a part."""

    part: int | None = None
    num_parts: int = 1

    @property
    def owner(self) -> str:
        """The job's name in those of its temporary files; none when the work is not divided."""
        return "" if self.part is None else f"part-{self.part}-of-{self.num_parts}"

    def has(self, number: int) -> bool:
        """Whether a piece of work is this job's."""
        return self.part is None or number % self.num_parts == self.part - 1


class Partial:
    """The paths in FOLDER/.partial. `owner` names the job, which keeps its temporary files apart from those of others."""

    def __init__(self, folder: Path, owner: str = "") -> None:
        self.folder, self.owner = folder, owner
        self.root = folder / PARTIAL
        self.plan_path = self.root / "plan.json"
        self.layout_path = self.root / "layout.json"
        self.hashes_dir = self.root / "hashes"
        self.shards_dir = self.root / "shards"
        self.ready_dir = self.root / "ready"  # the small files of a data set that is complete but not yet in its place
        self.earlier_dir = self.root / "earlier"  # the data set that it replaces, on its way out
        self.rejected_path = self.root / "rejected.jsonl"

    def hashes_path(self, number: int) -> Path:
        """The file of a chunk of hashes."""
        return self.hashes_dir / f"{number:06d}.json"

    def shard_path(self, name: str) -> Path:
        """A shard that is complete."""
        return self.shards_dir / name

    def sidecar_path(self, name: str) -> Path:
        """What there is to know of a shard; written after it, so a shard that has one is done."""
        return self.shards_dir / name.replace(".tar", ".json")

    def write_json(self, path: Path, value: Any) -> None:
        """Write `value` as compact JSON, atomically."""
        write_bytes(path, json.dumps(value, separators=(",", ":")).encode(), self.owner)

    def read_plan(self) -> Plan | None:
        """The plan that the files here belong to."""
        values = _read_json(self.plan_path)
        return None if values is None else Plan(**values)

    def write_plan(self, plan: Plan) -> None:
        """State what the files here will belong to."""
        self.write_json(self.plan_path, asdict(plan))

    def read_layout(self) -> Layout | None:
        """Which shards there are to be; None as long as not all images have been hashed."""
        values = _read_json(self.layout_path)
        if values is None:
            return None
        counts = {
            split: {int(label): number for label, number in by_label.items()}
            for split, by_label in values["class_counts"].items()
        }
        return Layout(counts, values["num_listed"], values["notes"])

    def write_layout(self, layout: Layout) -> None:
        """State which shards there are to be."""
        self.write_json(self.layout_path, asdict(layout))

    def read_sidecar(self, name: str) -> dict[str, Any] | None:
        """What there is to know of a shard; None when it is not done."""
        sidecar = _read_json(self.sidecar_path(name))
        with contextlib.suppress(FileNotFoundError):
            if sidecar is not None and self.shard_path(name).stat().st_size == sidecar["num_bytes"]:
                return sidecar
        return None

    def num_parts(self) -> int:
        """Into how many parts the work is divided, by the part that began last."""
        locks = [path for path in _entries(self.root) if PART_LOCK.fullmatch(path.name)]
        if not locks:
            return 1
        latest = PART_LOCK.fullmatch(max(locks, key=lambda path: (path.stat().st_mtime_ns, path.name)).name)
        assert latest is not None
        return int(latest[1])

    def remove_temporary(self) -> None:
        """Remove what this job left half-written when it was killed."""
        suffix = f".{self.owner}.tmp" if self.owner else ".tmp"
        for folder in (self.root, self.hashes_dir, self.shards_dir, self.ready_dir):
            for path in _entries(folder):
                if path.name.endswith(suffix):
                    path.unlink(missing_ok=True)

    def wipe(self) -> None:
        """Remove all work; the plan last, so that a removal cut short is taken for nothing else."""
        assert not self.earlier_dir.exists()
        for folder in (self.ready_dir, self.shards_dir, self.hashes_dir):
            shutil.rmtree(folder, ignore_errors=True)
        for path in (self.rejected_path, self.layout_path, self.plan_path):
            path.unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """Leave no empty folders behind when nothing could be begun."""
        with contextlib.suppress(OSError):
            self.root.rmdir()
            self.folder.rmdir()

    def remove(self) -> None:
        """Remove everything; for the end, when the data set is in its place."""
        shutil.rmtree(self.root, ignore_errors=True)


def _entries(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from folder.iterdir()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}). Remove {path.parent} and run again.") from error
