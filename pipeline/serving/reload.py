"""A new model takes the place of the old one between two batches: loaded, proved and warmed up first, or not at all."""

import asyncio
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.console import say
from pipeline.errors import ModelError
from pipeline.golden import GOLDEN
from pipeline.predictor import NO_PROOF
from pipeline.serving.batching import Batcher
from pipeline.serving.metrics import Board
from pipeline.serving.served import ServedModel, load_served, name_of
from pipeline.serving.settings import ServeSettings

# Files that change within this time are still being written.
SETTLE_SECONDS = 0.2
Fingerprint = tuple[object, ...]


class Place(NamedTuple):
    """Where a model lies, and what it is called; no version: the beginning of its sha256."""

    path: Path
    name: str
    version: str


@dataclass(frozen=True)
class ModelSource:
    """A model file, or a pointer to one: JSON of path, name and version, which another process replaces as a whole."""

    path: Path
    is_pointer: bool = False

    def locate(self) -> Place:
        """Where the model is now. Raises ModelError where the pointer cannot be read."""
        if not self.is_pointer:
            return Place(self.path, name_of(self.path), "")
        try:
            found = json.loads(self.path.read_text())
            return Place(Path(found["path"]), str(found["name"]), str(found["version"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{self.path}: cannot be read as a pointer to a model ({error}).") from error

    def fingerprint(self) -> Fingerprint | None:
        """What changes when the model does, or the proof beside it; None while there is no model."""
        try:
            place = self.locate()
            found = [_stamp(place.path.with_name(name)) for name in (place.path.name, "parity.json", GOLDEN)]
        except (ModelError, OSError):
            return None
        return (place, *found) if found[0] is not None else None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class Reloader:
    """Looks for a new model every `poll_seconds`. Only the first worker speaks of it."""

    def __init__(self, source: ModelSource, settings: ServeSettings, batcher: Batcher, board: Board, *, speaks: bool) -> None:
        self.source, self.settings, self.batcher, self.board, self.speaks = source, settings, batcher, board, speaks
        self.seen: Fingerprint | None = None
        # One thread for all of them: the allocator keeps what each thread has once used, so ten would keep ten models' worth.
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="models")

    async def load_first(self) -> ServedModel:
        """The model to begin with. Raises ModelError."""
        self.seen = self.source.fingerprint()
        self.batcher.model = await self._load()
        return self.batcher.model

    async def watch(self) -> None:
        """Look for new ones, for ever."""
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            await self.look()

    async def look(self) -> None:
        """Take a new model, if there is one."""
        found = self.source.fingerprint()
        if found is None or found == self.seen:
            return
        await asyncio.sleep(SETTLE_SECONDS)
        if self.source.fingerprint() != found:
            return
        old = self.batcher.model
        assert old is not None
        try:
            new = await self._load()
            if old.is_proved and not new.is_proved:
                raise ModelError(f"{new.predictor.path}: has {NO_PROOF}, which the one before had")
        except Exception as error:  # onnxruntime's have no common base; whatever it is, the old model goes on
            if self.source.fingerprint() == found:
                self.seen = found  # until it changes again
                self.board.add("refused_models_total")
                self._say(f"serve: the new model is refused, version {old.version} goes on: {' '.join(str(error).split())}")
            return
        if self.source.fingerprint() != found:
            return
        self.seen = found
        if (new.sha256, new.name, new.version) != (old.sha256, old.name, old.version):
            self.batcher.model = new
            self.board.add("reloads_total")
            self._say(f"serve: {new.name} {new.version} has taken the place of {old.name} {old.version}")

    async def _load(self) -> ServedModel:
        place, settings = self.source.locate(), self.settings
        load = functools.partial(
            load_served, place.path, place.name, place.version, settings.session_threads, settings.max_batch
        )
        return await asyncio.get_running_loop().run_in_executor(self.loader, load)

    def _say(self, line: str) -> None:
        if self.speaks:
            say(line)
