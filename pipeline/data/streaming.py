"""Training on shards that have no index: somebody's listing on the web, a brace list, compressed tars.

The webdataset library reads them as a stream. What that costs, and is said where it is chosen: an epoch is a number of steps,
samples are shuffled within a buffer and may come twice in an epoch or not at all, and a resumed run sees other samples than
the undisturbed one would have. What stays: every rank takes the same number of whole steps, and a sample becomes the same
tensor.

Nothing of a shard is unpickled or run: bytes are taken from it, and the library's own decoders and commands are switched off.
"""

import io
import itertools
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.config import DataConfig
from pipeline.data.augment import Augmentation, neutral_colour, plain_image
from pipeline.data.dataset import BadSample, Batch, new_images
from pipeline.data.labels import SampleRule
from pipeline.data.order import local_batch_size, mix
from pipeline.data.worker import deliver, in_time, kill_workers_at_exit, time_limit, worker_errors_explained
from pipeline.errors import DataError, RunError, ShardlineError
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.remote import RemoteFile, is_url


class StreamDataset(IterableDataset[Batch]):
    """An endless stream of local batches of one rank.

    `consumers` are the loader processes of all ranks. Each reads shards of its own in every pass over the list, or, where there
    are fewer shards than consumers, samples of its own of every shard.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        spec: PreprocessSpec,
        config: DataConfig,
        augmentation: Augmentation | None,
        *,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.urls = [name if "://" in name else str(manifest.folder / name) for name in manifest.streams["train"]]
        self.rule = SampleRule.of(manifest)
        self.num_classes = len(manifest.class_names) if manifest.task == "multi" else None
        self.spec, self.augmentation, self.seed = spec, augmentation, seed
        self.shuffle_buffer = config.shuffle_buffer
        self.batch_size = local_batch_size(config.micro_batch_size, world_size)
        # Captured in the rank: a spawned process could not find them out, and every one would read everything.
        self.first_consumer = rank * max(1, config.num_workers)
        self.num_consumers = world_size * max(1, config.num_workers)
        self.salt = 0  # another one for each start, so that a resumed run does not begin with the same samples again

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        consumer = self.first_consumer + (worker.id if worker is not None else 0)
        samples = enumerate(self._samples(consumer))
        while True:
            yield self._batch(list(itertools.islice(samples, self.batch_size)), consumer)

    def _samples(self, consumer: int) -> Iterator[dict[str, Any]]:
        """Raw samples for ever, one pass over the shards after another."""
        os.environ["WDS_SECURE"] = "1"
        from webdataset import filters

        draw = random.Random(mix(self.seed, self.salt, consumer))  # noqa: S311 - reproducible, not secret
        passes = itertools.chain.from_iterable(self._whole_pass(number, consumer) for number in itertools.count())
        samples: Iterator[dict[str, Any]] = filters._shuffle(passes, bufsize=self.shuffle_buffer, rng=draw)
        return samples

    def _whole_pass(self, number: int, consumer: int) -> Iterator[dict[str, Any]]:
        """The samples of a pass. Raises DataError where there is none: the next pass would not have any either."""
        num_samples = 0
        for sample in self._pass(number, consumer):
            num_samples += 1
            yield sample
        if not num_samples:
            raise DataError(
                f"the streamed shards ({self.urls[0]}, ...) hold too few samples: none is left for one of {self.num_consumers} "
                "loader processes. Use fewer processes, or more shards."
            )

    def _pass(self, number: int, consumer: int) -> Iterator[dict[str, Any]]:
        order = list(self.urls)
        random.Random(mix(self.seed, self.salt, number)).shuffle(order)  # noqa: S311 - the same on every rank
        if len(order) >= self.num_consumers:
            return read_samples(order[consumer :: self.num_consumers])
        return itertools.islice(read_samples(order), consumer, None, self.num_consumers)

    def _batch(self, samples: list[tuple[int, dict[str, Any]]], consumer: int) -> Batch:
        assert self.spec.fixed_size is not None
        images = new_images(len(samples), self.spec.fixed_size)
        weights, bad = np.ones(len(samples), np.float32), []
        labels = self._no_labels(len(samples))
        seeds = np.array([mix(mix(self.seed, self.salt), consumer, number) for number, _ in samples], np.uint64)
        for row, (_, sample) in enumerate(samples):
            try:
                encoded, numbers = self.rule.read(sample)
                if self.num_classes is None:
                    (labels[row], *_) = numbers
                else:
                    labels[row, numbers] = 1
                images[row] = self._pixels(encoded, int(seeds[row]))
            except DataError as error:
                images[row] = torch.tensor(neutral_colour(self.spec), dtype=torch.uint8)[:, None, None]
                weights[row] = 0
                bad.append(BadSample(row, sample["__url__"], sample["__key__"], str(error)))
        return {
            "image": images,
            "label": torch.from_numpy(labels),
            "weight": torch.from_numpy(weights),
            "index": torch.full((len(samples),), -1),
            "seed": seeds,
            "bad": bad,
        }

    def _no_labels(self, num_samples: int) -> npt.NDArray[Any]:
        if self.num_classes is None:
            return np.zeros(num_samples, np.int64)
        return np.zeros((num_samples, self.num_classes), np.uint8)

    def _pixels(self, encoded: bytes, seed: int) -> torch.Tensor:
        if self.augmentation is None:
            return plain_image(encoded, self.spec)
        return self.augmentation.image(encoded, self.spec, seed)


def read_samples(urls: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Samples of tars as the webdataset library groups them: {extension: bytes, "__key__": ..., "__url__": ...}.

    Raises DataError naming a shard that cannot be read.
    """
    os.environ["WDS_SECURE"] = "1"
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for url in urls:
        try:
            with open_stream(url) as stream:
                yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
        except ShardlineError:
            raise
        except Exception as error:  # tarfile, zlib and the library raise almost anything on broken bytes
            raise DataError(f"{url}: cannot be read as a stream of samples ({str(error)[:200]}).") from error


def open_stream(url: str) -> BinaryIO:
    """Open a shard on disk or at any URL that fsspec knows. Raises DataError."""
    if is_url(url):
        return io.BufferedReader(RemoteFile(url), buffer_size=1 << 20)
    try:
        return Path(url).open("rb")
    except OSError as error:
        raise DataError(f"{url}: cannot be opened ({error.strerror}).") from error


class StreamLoader(DataLoader[Batch]):
    """Endless batches cut into epochs of `num_batches`; the stream goes on from one epoch to the next."""

    def __init__(
        self, dataset: StreamDataset, num_batches: int, global_batch_size: int, timeout_seconds: float, **options: Any
    ) -> None:
        super().__init__(dataset, batch_size=None, collate_fn=deliver, **options)
        self.num_batches, self.global_batch_size = num_batches, global_batch_size
        self.timeout_seconds = timeout_seconds
        self.epoch = self.delivered = self.begin_with = 0
        self._stream: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with worker_errors_explained():
            if self._stream is None:
                with time_limit(self.timeout_seconds):
                    self._stream = in_time(super().__iter__(), self.timeout_seconds)
                kill_workers_at_exit()
            self.delivered, self.begin_with = self.begin_with, 0
            while self.delivered < self.num_batches:
                batch = next(self._stream)
                self.delivered += 1
                yield batch
        self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        """How far the run has come; which samples were seen cannot be said."""
        return {
            "epoch": self.epoch,
            "batch": self.delivered,
            "num_batches": self.num_batches,
            "global_batch_size": self.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after as many steps, with other samples. Raises RunError for another loader's state."""
        for name, here in (("global_batch_size", self.global_batch_size), ("num_batches", self.num_batches)):
            if state[name] != here:
                raise RunError(f"the checkpoint was made with {name} {state[name]}, but here it is {here}. Use --fresh.")
        self.epoch, self.begin_with = state["epoch"], state["batch"] % self.num_batches
        assert isinstance(self.dataset, StreamDataset)
        self.dataset.salt = mix(state["epoch"], state["batch"])
