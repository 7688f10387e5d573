"""Shards of remote data sets on the local disk: fetched once for all processes and jobs of a machine, within a bound.

A shard's name in the cache is its sha256, so a data set that changed never mixes with what it was. A reader that has a shard
open keeps it when it is evicted. Locks are released by the kernel, also when a process is killed.
"""

import contextlib
import fcntl
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.errors import ConfigError, DataError, ShardlineError, explain_os_error
from pipeline.files import publish
from pipeline.manifest import DatasetManifest, ShardEntry
from pipeline.remote import download, is_url, join

SUFFIX, PART_SUFFIX, LOCK_SUFFIX = ".tar", ".part", ".lock"
SECONDS_BETWEEN_LOOKS = 0.1
ROOM_TIMEOUT_SECONDS = 600.0
OPEN_ATTEMPTS = 5


@dataclass(frozen=True)
class ShardCache:
    """A folder of shards of at most `limit_bytes`, shared by everybody who names it."""

    folder: Path
    limit_bytes: int

    def path_of(self, shard: ShardEntry, url: str, *, wait: bool = True) -> Path | None:
        """The local file of a shard, fetched from `url` if need be. Without `wait`, None when another process fetches it.

        Raises DataError when it cannot be fetched.
        """
        final = self.folder / f"{shard.sha256}{SUFFIX}"
        if _touch(final):
            return final
        with self._locked(shard.sha256, wait=wait) as mine:
            if not mine:
                return None
            if not _touch(final):
                self._fetch(shard, url, final)
        return final

    def _fetch(self, shard: ShardEntry, url: str, final: Path) -> None:
        part = final.with_suffix(PART_SUFFIX)
        try:
            self._make_room(part, shard.num_bytes)
            download(url, part, shard.num_bytes, shard.sha256)
            publish(part, final)
        except OSError as error:
            raise explain_os_error(error, doing=str(self.folder)) or error from error
        finally:
            part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of `name`; False when somebody else has it and `wait` is off."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / f"{name}{LOCK_SUFFIX}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        try:
            yield True
        finally:
            # A process that was forked meanwhile has a copy of the descriptor, and closing ours alone would leave it the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _make_room(self, part: Path, num_bytes: int) -> None:
        """Reserve `num_bytes` in the name of `part`, evicting what was used longest ago. Raises ConfigError without room."""
        if num_bytes > self.limit_bytes:
            raise ConfigError(f"a shard of {num_bytes:,} bytes does not fit into the cache: raise `data.cache_gigabytes`.")
        deadline = time.monotonic() + ROOM_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            with self._locked("room"):
                if self._evict(self.limit_bytes - num_bytes):
                    with part.open("wb") as file:
                        file.truncate(num_bytes)  # from now on it counts
                    return
            time.sleep(SECONDS_BETWEEN_LOOKS)  # until another process has fetched what it is fetching
        raise ConfigError(
            f"{self.folder}: found no room for a shard in {ROOM_TIMEOUT_SECONDS:.0f} s: raise `data.cache_gigabytes`."
        )

    def _evict(self, limit_bytes: int) -> bool:
        """Remove shards until at most `limit_bytes` are left; whether that was possible."""
        kept = []
        for path in self.folder.glob(f"*{PART_SUFFIX}"):
            self._remove_if_abandoned(path)
        for path in itertools.chain(self.folder.glob(f"*{PART_SUFFIX}"), self.folder.glob(f"*{SUFFIX}")):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                kept.append((path.suffix == PART_SUFFIX, status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, _, size, _ in kept)
        for is_part, _, size, path in sorted(kept):
            if total <= limit_bytes:
                break
            if not is_part:
                path.unlink(missing_ok=True)
                total -= size
        return total <= limit_bytes

    def _remove_if_abandoned(self, part: Path) -> None:
        with self._locked(part.stem, wait=False) as nobody_fetches_it:
            if nobody_fetches_it:
                part.unlink(missing_ok=True)


def _touch(path: Path) -> bool:
    """Note that a shard is used now; whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class ShardFetcher:
    """Gives the local file of a shard by its number in a split. It can be sent to loader processes."""

    folder: Path
    url: str
    shards: list[ShardEntry]
    cache: ShardCache

    def __call__(self, number: int) -> Path:
        """The file, fetched if need be. Raises DataError."""
        path = self.fetch(number, wait=True)
        assert path is not None
        return path

    def fetch(self, number: int, *, wait: bool) -> Path | None:
        """The file; without `wait`, None when another process fetches it just now."""
        shard = self.shards[number]
        if not self.url and not is_url(shard.name):
            return self.folder / shard.name
        return self.cache.path_of(shard, join(self.url, shard.name), wait=wait)


def fetcher_for(manifest: DatasetManifest, split_name: str, config: DataConfig) -> ShardFetcher | None:
    """What brings the shards of a split here; None when all of them are."""
    shards = manifest.split(split_name).shards
    if not manifest.url and not any(is_url(shard.name) for shard in shards):
        return None
    return ShardFetcher(manifest.folder, manifest.url, shards, cache_of(config))


def cache_of(config: DataConfig) -> ShardCache:
    """The cache that the configuration names."""
    return ShardCache(config.cache_folder / "shards", int(config.cache_gigabytes * 1e9))


def require_room(manifest: DatasetManifest, config: DataConfig) -> None:
    """Refuse a cache in which the shards that training reads at one time do not fit. Raises ConfigError."""
    largest = max(
        (shard.num_bytes for split in manifest.splits.values() for shard in split.shards if manifest.url or is_url(shard.name)),
        default=0,
    )
    # A window of shards is read in random order, while the next one comes in.
    needed = 2 * config.shuffle_shards * largest
    if needed > config.cache_gigabytes * 1e9:
        raise ConfigError(
            f"`data.cache_gigabytes` is {config.cache_gigabytes:g}, but two windows of {config.shuffle_shards} shards "
            f"(`data.shuffle_shards`) of up to {largest:,} bytes need {needed / 1e9:.2g}. Raise it, or lower the window."
        )


class Prefetcher:
    """A thread that fetches shards before they are needed, at most half a cache ahead of their use.

    Errors are left to the reader of the shard, who meets them too and says them.
    """

    def __init__(self, fetcher: ShardFetcher, upcoming: Iterator[int], share_used: Callable[[], float]) -> None:
        self.fetcher, self.upcoming, self.share_used = fetcher, upcoming, share_used
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch shards", daemon=True)

    def start(self) -> "Prefetcher":
        """Begin."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End after the shard at hand; do not wait for it."""
        self._stopped.set()

    def _work(self) -> None:
        total = sum(shard.num_bytes for shard in self.fetcher.shards)
        fetched = 0
        for number in self.upcoming:
            while fetched - self.share_used() * total > self.fetcher.cache.limit_bytes / 2:
                if self._stopped.wait(SECONDS_BETWEEN_LOOKS):
                    return
            if self._stopped.is_set():
                return
            with contextlib.suppress(ShardlineError, OSError):
                self.fetcher.fetch(number, wait=False)
            fetched += self.fetcher.shards[number].num_bytes


def open_fetched(fetch: Callable[[int], Path], number: int) -> int:
    """A descriptor of a shard's local file, fetched again when it was evicted a moment ago. Raises DataError."""
    for _ in range(OPEN_ATTEMPTS):
        path = fetch(number)
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    raise DataError(f"{path}: vanishes from the cache as soon as it is there. Raise `data.cache_gigabytes`.")
