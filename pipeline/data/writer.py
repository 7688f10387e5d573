"""Writes a data set of shards: split, order and bytes depend on the images and the seed alone.

The source is listed, its images are hashed, shared out and packed, each step in pieces that are files in DATASET/.partial. A
piece that is there need not be made again, whoever made it: an interrupted run goes on, and several machines can write one data
set. Nothing has a final name before everything is complete, and dataset.json comes last.
"""

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import DatasetConfig
from pipeline.console import say
from pipeline.data.assemble import assemble, move_earlier_out, publish_dataset
from pipeline.data.encode import Encoder
from pipeline.data.hashing import hash_images, read_contents
from pipeline.data.listing import Fingerprint, Listing
from pipeline.data.native import require_for_restarts
from pipeline.data.pack import Packer, ShardJob
from pipeline.data.parallel import counted, default_workers, run_parallel
from pipeline.data.partial import OWN_NAMES, Partial, Plan, Share
from pipeline.data.plan import Layout, ShardPlan, plan_layout
from pipeline.data.sources import ImageSource, open_source
from pipeline.errors import DataError, RunError, explain_os_error
from pipeline.files import digest_of, locked
from pipeline.manifest import MANIFEST_NAME, DatasetManifest, load_dataset

# With --trust the statistics are of about so many images, evenly spread over the shuffled training split: their error is
# some hundredths of the range, and decoding them costs next to nothing.
TRUSTED_STATISTICS = 100
IMAGES_WORTH_A_WORKER = 200
SECONDS_FOR_OTHERS = 30.0
# The processes of a part that was killed a moment ago still hold its lock.
SECONDS_TO_END = 2.0


def preparation_of(config: DatasetConfig, kind: str, *, trust: bool = False) -> dict[str, Any]:
    """What decides the shards besides the images: part of the data set's digest."""
    preparation: dict[str, Any] = {
        "source": kind,
        "class_level": config.class_level,
        "seed": config.split_seed,
        "fractions": {"val": config.val_fraction, "test": config.test_fraction},
        "samples_per_shard": config.samples_per_shard,
        "jpeg_quality": config.jpeg_quality,
        "keep_format": config.keep_format,
        "max_side": config.max_side,
        "background": config.background,
    }
    if config.restart is not None:
        preparation["restart"] = config.restart
    if trust:
        preparation["trust"] = {"statistics_of_at_most": TRUSTED_STATISTICS}
    return preparation


def prepare_dataset(
    config: DatasetConfig, folder: Path, *, fresh: bool = False, workers: int | None = None, trust: bool = False
) -> tuple[DatasetManifest, bool]:
    """Return the data set of this configuration in `folder`, and whether it had to be written.

    One that was made otherwise, or any when `fresh`, is moved aside once the new one is complete. Raises DataError for a
    damaged one, and when something else than a data set lies there. The caller holds the folder's lock.
    """
    if not fresh and (manifest := _up_to_date(config, folder)):
        remove_what_is_left(Partial(folder), manifest)
        return manifest, False
    require_for_restarts(config.restart)
    with contextlib.closing(open_source(config)) as source:
        require_own(folder)
        if fresh:
            with explained(Partial(folder)):
                _start_over(Partial(folder))
        if (folder / MANIFEST_NAME).is_file():
            say(f"{folder}: {'--fresh was given' if fresh else 'the images or the settings of `dataset` changed'}")
        return write_dataset(source, config, folder, workers=workers, trust=trust), True


def write_dataset(
    source: ImageSource, config: DatasetConfig, folder: Path, *, workers: int | None = None, trust: bool = False
) -> DatasetManifest:
    """Write all splits of `source` into `folder` and return the manifest. Goes on where an interrupted run stopped.

    Raises DataError when too many images cannot be decoded; what was done is kept.
    """
    partial = Partial(folder)
    with explained(partial), Listing(partial.root / "images.sqlite") as listing:
        plan = _list(listing, source, config, trust)
        agree(partial, plan)
        partial.remove_temporary()
        if not (partial.ready_dir / MANIFEST_NAME).exists():
            work = _Work(source, config, partial, plan, listing, Share(), workers)
            layout = work.hash_and_plan()
            work.write_shards(layout)
            _assemble(partial, plan, layout, config)
        return publish_dataset(partial)


@dataclass(frozen=True)
class PartOutcome:
    """How far a data set that several jobs write has come: shards there, and those missing by part."""

    num_shards: int
    missing: dict[int, int]  # part -> shards

    @property
    def num_done(self) -> int:
        """Shards that are there."""
        return self.num_shards - sum(self.missing.values())


def write_part(
    config: DatasetConfig, folder: Path, part: int, num_parts: int, *, workers: int | None = None, trust: bool = False
) -> PartOutcome | None:
    """Write the shards of job `part` of `num_parts`, counted from 1, into `folder`, which all share; None if none is needed.

    Nobody waits for another. Raises RunError when this part, the whole data set or parts of other images are being written.
    """
    if _up_to_date(config, folder):
        return None
    require_for_restarts(config.restart)
    share = Share(part, num_parts)
    partial = Partial(folder, share.owner)
    with contextlib.closing(open_source(config)) as source:
        require_own(folder)
        while True:
            with (
                explained(partial),
                locked(folder, shared=True),
                locked(partial.root / share.owner, wait_seconds=SECONDS_TO_END),
                Listing(partial.root / f"images-{share.owner}.sqlite") as listing,
            ):
                plan = _list(listing, source, config, trust)
                if _agree_with_others(partial, plan):
                    partial.remove_temporary()
                    work = _Work(source, config, partial, plan, listing, share, workers)
                    layout = work.hash_and_plan()
                    work.write_shards(layout)
                    return _outcome(partial, layout.shards(config.samples_per_shard), num_parts)
            _take_over(partial, plan)


def merge_parts(config: DatasetConfig, folder: Path) -> tuple[DatasetManifest, bool]:
    """Complete a data set whose shards were written in parts; also whether there was anything to do. The caller holds the lock.

    Raises DataError naming the parts that are missing.
    """
    partial = Partial(folder)
    plan = partial.read_plan()
    if plan is None:
        if (folder / MANIFEST_NAME).is_file():
            return load_dataset(folder), False
        raise DataError(f"{folder}: no part of a data set is there. Run `shardline shard --part 1/N` to `--part N/N` first.")
    wanted = preparation_of(config, plan.preparation["source"], trust="trust" in plan.preparation)
    if (wanted, config.source) != (plan.preparation, plan.source):
        raise DataError(
            f"{folder}: its parts were made with other settings of `dataset`. Merge with the settings of the parts."
        )
    with explained(partial):
        if not (partial.ready_dir / MANIFEST_NAME).exists():
            layout = partial.read_layout()
            _require_all_parts(partial, layout, config.samples_per_shard)
            assert layout is not None
            partial.remove_temporary()
            _assemble(partial, plan, layout, config)
        return publish_dataset(partial), True


# ---- the steps ----


@dataclass(frozen=True)
class _Work:
    """One job's work on a data set that is agreed upon."""

    source: ImageSource
    config: DatasetConfig
    partial: Partial
    plan: Plan
    listing: Listing
    share: Share
    workers: int | None

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.config, trust="trust" in self.plan.preparation)

    @property
    def num_workers(self) -> int:
        """Processes; a small data set is written sooner than they would start."""
        return self.workers or min(default_workers(), 1 + self.listing.num_images // IMAGES_WORTH_A_WORKER)

    def hash_and_plan(self) -> Layout:
        """Hash what is not yet hashed and say which shards there are to be."""
        layout = self.partial.read_layout()
        if layout is not None and not self.missing(layout):
            return layout
        hash_images(self.listing, self.source, self.encoder, self.partial, self.share, self.num_workers)
        self.listing.set_contents(read_contents(self.partial, self.listing.num_chunks))
        layout = plan_layout(self.listing, self.config, self.plan.class_names, self.plan.task)
        self.partial.write_layout(layout)
        return layout

    def missing(self, layout: Layout) -> list[ShardPlan]:
        """Those shards of this job that are not yet there."""
        shards = layout.shards(self.config.samples_per_shard)
        return [shard for shard in shards if self.share.has(shard.number) and not self.partial.read_sidecar(shard.name)]

    def write_shards(self, layout: Layout) -> None:
        """Write this job's shards that are not yet there."""
        shards = self.missing(layout)
        if not shards:
            return
        total = sum(shard.count for shard in layout.shards(self.config.samples_per_shard) if self.share.has(shard.number))
        already = total - sum(shard.count for shard in shards)
        stats_every = 1 + (layout.num_images["train"] - 1) // TRUSTED_STATISTICS if self.encoder.trust else 1
        jobs = (ShardJob(shard, self.listing.placed(shard.first_of_all, shard.count)) for shard in shards)
        with counted("write", total, already) as counter:
            packer = Packer(self.source, self.encoder, self.partial, self.plan.task, stats_every, counter)
            try:
                for _ in run_parallel(packer.write, jobs, self.num_workers, counter.look):
                    pass
            finally:
                self.partial.remove_temporary()  # of processes that ended because another failed


def _list(listing: Listing, source: ImageSource, config: DatasetConfig, trust: bool) -> Plan:
    fingerprint = _complete(listing.fill(source.images()), source)
    preparation = preparation_of(config, source.kind, trust=trust)
    return Plan(preparation, fingerprint, config.source, source.class_names, source.task, source.num_ignored)


def _complete(fingerprint: str, source: ImageSource) -> str:
    return digest_of([fingerprint, source.class_names, source.task])


def _assemble(partial: Partial, plan: Plan, layout: Layout, config: DatasetConfig) -> None:
    for note in layout.notes:
        say(note)
    assemble(partial, plan, layout, config.max_rejected)


def _outcome(partial: Partial, shards: list[ShardPlan], num_parts: int) -> PartOutcome:
    missing: dict[int, int] = {}
    for shard in shards:
        if partial.read_sidecar(shard.name) is None:
            part = shard.number % num_parts + 1
            missing[part] = missing.get(part, 0) + 1
    return PartOutcome(len(shards), dict(sorted(missing.items())))


def _require_all_parts(partial: Partial, layout: Layout | None, samples_per_shard: int) -> None:
    num_parts = partial.num_parts()
    if layout is None:
        raise DataError(
            f"{partial.folder}: no part has hashed all images yet. Run `shardline shard --part 1/{num_parts}` to the end."
        )
    outcome = _outcome(partial, layout.shards(samples_per_shard), num_parts)
    if outcome.missing:
        missing = ", ".join(f"{number} of part {part}/{num_parts}" for part, number in outcome.missing.items())
        raise DataError(
            f"{partial.folder}: {outcome.num_done} of {outcome.num_shards} shards are there. Missing: {missing}. "
            "Run `shardline shard --part` for each of these parts, then merge."
        )


# ---- what is there already ----


def _up_to_date(config: DatasetConfig, folder: Path) -> DatasetManifest | None:
    """The data set in `folder`, if it is the one that this configuration would write."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = load_dataset(folder)
    is_repacked = "repack" in manifest.preparation
    if is_repacked or manifest.preparation.get("source") == "index":
        made = "repack` wrote" if is_repacked else "index` adopted"
        say(f"{folder}: holds shards that `shardline {made}; they stay unless --fresh is given")
        return manifest
    with contextlib.closing(open_source(config)) as source:
        wanted = preparation_of(config, source.kind)
        # Images that were not decoded when they were written are the same images.
        found = {key: value for key, value in manifest.preparation.items() if key != "trust"}
        if found != wanted:
            return None
        fingerprint = Fingerprint()
        for image in source.images():
            fingerprint.add(image)
        return manifest if manifest.info["source_fingerprint"] == _complete(fingerprint.hexdigest(), source) else None


def remove_what_is_left(partial: Partial, manifest: DatasetManifest) -> None:
    """Finish a run that was killed when all but the removal of its own files was done."""
    if partial.root.exists():
        plan = partial.read_plan()
        if plan is None or plan.fingerprint == manifest.info.get("source_fingerprint"):
            partial.remove()


def require_own(folder: Path) -> None:
    """Refuse to write where a data set could not be put into its place in the end."""
    if (folder / MANIFEST_NAME).is_file():
        if folder.is_mount():
            raise DataError(
                f"{folder}: is a mount point, so the data set in it cannot be moved aside. Use a folder below it: "
                f"--dataset.path {folder}/NAME."
            )
    elif folder.is_dir():
        foreign = sorted(path.name for path in folder.iterdir() if not OWN_NAMES.fullmatch(path.name))
        if foreign:
            raise DataError(f"{folder}: is not a data set but holds {foreign[0]}. Choose another folder.")


def agree(partial: Partial, plan: Plan) -> None:
    """See to it that the files in `partial` belong to `plan`; remove them if they do not. The caller is alone there."""
    found = partial.read_plan()
    if found is not None and found.is_same(plan):
        say(f"{partial.folder}: going on with what an interrupted run has done")
        return
    if found is not None:
        say(f"{partial.folder}: the images or the settings of `dataset` changed since a run was interrupted; starting over")
    _start_over(partial)
    partial.write_plan(plan)


def _agree_with_others(partial: Partial, plan: Plan) -> bool:
    """Whether the files in `partial` belong to `plan`, which the first part to come writes down."""
    with locked(partial.root / "plan", wait_seconds=SECONDS_FOR_OTHERS):
        found = partial.read_plan()
        if found is None:
            partial.wipe()
            partial.write_plan(plan)
        return found is None or found.is_same(plan)


def _take_over(partial: Partial, plan: Plan) -> None:
    """Remove the work on another plan once nobody does it any more, unless somebody else has just done so."""
    deadline = time.monotonic() + SECONDS_FOR_OTHERS
    while True:
        with contextlib.suppress(RunError), locked(partial.folder):
            agree(partial, plan)
            return
        found = partial.read_plan()
        if found is not None and found.is_same(plan):
            return
        if time.monotonic() >= deadline:
            raise RunError(
                f"{partial.folder}: other parts are being written from other images or settings of `dataset`. "
                "Let all parts see the same images and settings, or stop the others first."
            )
        time.sleep(0.5)


def _start_over(partial: Partial) -> None:
    if partial.earlier_dir.exists():
        move_earlier_out(partial)
    partial.wipe()


@contextlib.contextmanager
def explained(partial: Partial) -> Iterator[None]:
    """Turn what the operating system refuses into one clear line."""
    folder = partial.folder
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, doing=str(folder)) or error from error
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            raise explain_os_error(full) or error from error
        raise DataError(f"{folder}: cannot keep the list of images there ({error}). Choose another --dataset.path.") from error
    except KeyboardInterrupt:
        say(f"{folder}: run the same command again to go on")
        raise
    finally:
        partial.remove_if_empty()
