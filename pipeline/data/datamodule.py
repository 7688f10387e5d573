"""Loaders for Lightning: exact batches for every rank, and a place in the epoch that survives any interruption.

The loader's state is (epoch, global batches delivered). Lightning saves rank 0's state only, so nothing of a rank, worker or
prefetch queue may be in it.
"""

import functools
import os
import threading
from collections.abc import Iterator
from typing import Any, cast

import lightning as L
from torch.utils.data import DataLoader

from pipeline import accelerator
from pipeline.config import DataConfig
from pipeline.data import native
from pipeline.data.augment import build_augmentation
from pipeline.data.cache import Prefetcher
from pipeline.data.dataset import Batch, ShardDataset
from pipeline.data.order import GlobalBatchSampler, SampleRef, training_steps_per_epoch
from pipeline.data.streaming import StreamDataset, StreamLoader
from pipeline.data.threads import Ring, in_threads
from pipeline.data.worker import deliver, in_time, kill_workers_at_exit, start_worker, time_limit, worker_errors_explained
from pipeline.errors import RunError
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader whose place is (epoch, global batches delivered); Lightning saves and restores it by state_dict."""

    delivered = 0

    def __init__(
        self, dataset: ShardDataset, timeout_seconds: float, num_threads: int = 0, num_ahead: int = 0, **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self.timeout_seconds, self.num_threads, self.num_ahead = timeout_seconds, num_threads, num_ahead
        assert dataset.spec.fixed_size is not None
        self.ring = Ring(dataset.spec.fixed_size, self.pin_memory)

    @property
    def batches(self) -> GlobalBatchSampler:
        """The sampler that decides what each batch holds."""
        return cast(GlobalBatchSampler, self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.delivered = self.batches.start
        upcoming = self.batches.upcoming_shards()
        with worker_errors_explained():
            with time_limit(self.timeout_seconds):  # processes that stay from one epoch to the next are asked to begin anew
                batches = self._batches_of_threads() if self.num_threads else super().__iter__()
            kill_workers_at_exit()
            # Only now: a thread that is in the middle of something must not be copied into a loader process.
            prefetcher = self._prefetcher(upcoming)
            try:
                for batch in in_time(batches, self.timeout_seconds):
                    self.delivered += 1
                    yield batch
            finally:
                if prefetcher is not None:
                    prefetcher.stop()

    def _batches_of_threads(self) -> Iterator[Batch]:
        dataset, own = cast(ShardDataset, self.dataset), threading.local()

        def make(refs: list[SampleRef]) -> Batch:
            if not hasattr(own, "dataset"):
                own.dataset = dataset.with_own_files()
            batch: Batch = own.dataset.__getitems__(refs, self.ring.take(len(refs)))
            return batch

        return in_threads(make, iter(self.batches), self.num_threads, self.num_ahead)

    def _prefetcher(self, upcoming: Iterator[int]) -> Prefetcher | None:
        """Fetches the shards of a remote data set ahead of this epoch's batches."""
        fetcher = cast(ShardDataset, self.dataset).fetcher
        if fetcher is None:
            return None
        begun = self.delivered
        return Prefetcher(fetcher, upcoming, lambda: (self.delivered - begun) / len(self)).start()

    def state_dict(self) -> dict[str, int]:
        """The cursor, and what must be the same for it to mean the same place."""
        return {
            "epoch": self.batches.epoch,
            "batch": self.delivered,
            "num_batches": len(self),
            "global_batch_size": self.batches.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved cursor; one at an epoch's end means the start of the next. Raises RunError for another loader's."""
        for name, here in (("global_batch_size", self.batches.global_batch_size), ("num_batches", len(self))):
            if state[name] != here:
                raise RunError(f"the checkpoint was made with {name} {state[name]}, but here it is {here}. Use --fresh.")
        epoch, batch = state["epoch"], state["batch"]
        if batch >= len(self):
            epoch, batch = epoch + 1, 0
        # A resumed epoch's iterator is made before Lightning calls set_epoch.
        self.batches.epoch, self.batches.start = epoch, batch
        self.delivered = batch


class ShardDataModule(L.LightningDataModule):
    """Train, validation and test loaders of a sharded data set, for the rank on which they are made."""

    def __init__(self, manifest: DatasetManifest, spec: PreprocessSpec, config: DataConfig, seed: int) -> None:
        super().__init__()
        self.manifest, self.spec, self.config, self.seed = manifest, spec, config, seed

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Shuffled and augmented, resumable in the middle of an epoch; or a stream, where shards have no index."""
        augmentation = build_augmentation(self.config.augment, self.spec, native.chosen(self.config.decoder))
        if "train" in self.manifest.streams:
            stream = StreamDataset(self.manifest, self.spec, self.config, augmentation, seed=self.seed, **self._place())
            batches = training_steps_per_epoch(self.manifest, self.config) * self.config.accumulate
            return StreamLoader(stream, batches, self.config.global_batch_size, **self._options())
        dataset = ShardDataset(self.manifest, "train", self.spec, augmentation, self.seed, self.config)
        # Rank and world size are captured here: a spawned worker could not find them out, and would read everything.
        sampler = GlobalBatchSampler.of_training(dataset.shards, self.config, self.seed, rows=dataset.rows, **self._place())
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> ResumableLoader:
        """Every validation sample exactly once over all ranks, in order."""
        return self.evaluation_loader("val", self.config.limit_val_batches)

    def test_dataloader(self) -> ResumableLoader:
        """Every sample of the final split exactly once over all ranks, in order."""
        return self.evaluation_loader(self.manifest.evaluation_split)

    def evaluation_loader(self, split_name: str, limit: int | None = None) -> ResumableLoader:
        """Every sample of a split (or of its first `limit` batches) exactly once over all ranks; padding rows weigh 0."""
        dataset = ShardDataset(self.manifest, split_name, self.spec, config=self.config)
        batches = GlobalBatchSampler.of_evaluation(dataset.shards, self.config, limit=limit, **self._place())
        return self._loader(dataset, batches)

    def _place(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _loader(self, dataset: ShardDataset, batches: GlobalBatchSampler) -> ResumableLoader:
        return ResumableLoader(dataset, batch_sampler=batches, collate_fn=deliver, **self._options(dataset.reads_crops))

    def _options(self, by_threads: bool = False) -> dict[str, Any]:
        config = self.config
        workers: dict[str, Any] = {}
        if config.num_workers and by_threads:
            workers = {"num_threads": config.num_workers, "num_ahead": config.num_workers * config.prefetch_factor}
        elif config.num_workers:
            workers = {
                "num_workers": config.num_workers,
                "multiprocessing_context": config.start_method,
                "persistent_workers": config.persistent_workers,
                "prefetch_factor": config.prefetch_factor,
                "worker_init_fn": functools.partial(start_worker, rank_pid=os.getpid()),
            }
        return {
            "timeout_seconds": config.timeout_seconds,
            "pin_memory": accelerator.pins_memory(config.pin_memory),
            **workers,
        }
