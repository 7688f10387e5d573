"""The training images that show how large activations become: drawn by the run's seed, the classes in turn."""

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.data.dataset import ShardDataset
from pipeline.errors import ConfigError, DataError
from pipeline.export.parity import decodable
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec

BATCH = 16  # a calibrator holds every activation of a batch
# A random image of each of many shards would have all of them fetched where the data set is remote.
MOST_SHARDS = 32
CANDIDATES = 16  # for each image that is taken, so that rare classes have their turn


def require_calibratable(config: Config, manifest: DatasetManifest) -> None:
    """Raises ConfigError where int8 is wanted and no training image can be looked up by its number."""
    if "int8" in config.export.precisions and ("train" in manifest.streams or "train" not in manifest.splits):
        raise ConfigError(
            "`export.precisions` names int8, whose ranges are taken from training images, but the training shards are "
            "streamed. Adopt them with an index (`shardline index --train`), or leave int8 out."
        )


def calibration_batches(config: Config, manifest: DatasetManifest, spec: PreprocessSpec) -> Iterator[npt.NDArray[np.uint8]]:
    """Images (n, 3, H, W) of the training split as the model is served, without augmentation. Raises DataError without any."""
    dataset = ShardDataset(manifest, "train", spec, config=config.data)
    chosen = choose(dataset, 2 * config.export.calibration_images, config.seed)
    images = itertools.islice(decodable(dataset, chosen.tolist()), config.export.calibration_images)
    empty = True
    while batch := [image.numpy() for _, image in itertools.islice(images, BATCH)]:
        empty = False
        yield np.stack(batch)
    if empty:
        raise DataError("no image of the training split can be decoded. Look at the shards with `shardline verify`.")


def choose(dataset: ShardDataset, number: int, seed: int) -> npt.NDArray[np.int64]:
    """Numbers of at most `number` samples: of one label an image, each class in turn as long as it lasts."""
    random = np.random.default_rng(seed)
    shards = random.permutation(len(dataset.shards))[:MOST_SHARDS]
    candidates = np.flatnonzero(np.isin(dataset.rows["shard"], shards))
    candidates = random.choice(candidates, min(len(candidates), CANDIDATES * number), replace=False)
    if dataset.label_rows is None:
        labels = dataset.rows["label"][candidates]
        candidates = candidates[np.argsort(_turns(labels), kind="stable")]
    return candidates[:number].astype(np.int64)


def _turns(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many of the same label stand before each, (n,)."""
    by_label = np.argsort(labels, kind="stable")
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(labels[by_label])) + 1])
    places = np.arange(len(labels))
    turns = np.empty(len(labels), np.int64)
    turns[by_label] = places - np.repeat(firsts, np.diff([*firsts, len(labels)]))
    return turns
