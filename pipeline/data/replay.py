"""`shardline replay`: the very tensors that entered the network at a past step, whatever ranks and restarts there were.

Nothing was recorded for it: the order of samples, their augmentation and their mixing are functions of seed, epoch, step and
sample, so they are computed again.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.data import native
from pipeline.data.augment import build_augmentation
from pipeline.data.dataset import Batch, ShardDataset
from pipeline.data.mixing import Mixed, mix_batch
from pipeline.data.order import GlobalBatchSampler
from pipeline.data.pixel_changes import build_pixel_changes
from pipeline.errors import ConfigError
from pipeline.files import write_bytes
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.report.grid import draw_grid
from pipeline.task import label_text

FOLDER = Path("replay")
TILES_ON_A_SHEET = 64


@dataclass(frozen=True)
class ReplayedSample:
    """One row of a global batch."""

    index: int
    key: str
    shard: str
    label: str
    note: str  # what became of it besides augmentation


@dataclass(frozen=True)
class ReplayedStep:
    """A global batch as the network saw it."""

    step: int
    epoch: int
    batch: int
    samples: list[ReplayedSample]
    images: torch.Tensor  # uint8 (G, 3, H, W)


def replay_step(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, step: int) -> ReplayedStep:
    """Compute the global batch of `step` again; steps count from 1, as the training curves do. Raises ConfigError."""
    if "train" in manifest.streams:
        raise ConfigError(
            "the training shards of this run were streamed; which samples a step saw was not decided by its number."
        )
    # As training on this machine decodes: the other decoder's pixels differ a little, and so does what it refuses.
    augmentation = build_augmentation(config.data.augment, spec, is_native=native.decoder_of(config.data) == "native")
    dataset = ShardDataset(manifest, "train", spec, augmentation, config.seed, config.data)
    batches = GlobalBatchSampler.of_training(dataset.shards, config.data, config.seed, rows=dataset.rows)
    steps, parts = len(batches) // batches.accumulate, batches.accumulate
    last = steps * config.trainer.max_epochs
    if not 1 <= step <= last:
        raise ConfigError(f"--step is {step}; this run has the steps 1 to {last:,}.")
    epoch, number = divmod(step - 1, steps)
    batches.set_epoch(epoch)
    batches.start = number * parts
    changes = build_pixel_changes(config.data.augment, spec)
    samples, images = [], []
    for part, rows in enumerate(itertools.islice(batches, parts)):
        batch = dataset.__getitems__(rows)
        seen = batch["image"] if changes is None else changes(batch["image"], batch["seed"])
        augment, micro_step = config.data.augment, (step - 1) * parts + part
        seen, mixed = mix_batch(seen, batch["label"], batch["weight"], augment, config.seed, micro_step)
        samples += [_describe(dataset, batch, mixed, manifest.class_names, row) for row in range(len(rows))]
        images.append(seen)
    return ReplayedStep(step, epoch, number, samples, torch.cat(images))


def _describe(dataset: ShardDataset, batch: Batch, mixed: Mixed | None, class_names: list[str], row: int) -> ReplayedSample:
    index = int(batch["index"][row])
    is_bad = any(sample.row == row for sample in batch["bad"])
    note = "no longer decodes" if is_bad else "" if batch["weight"][row] > 0 else "padding"
    if mixed is not None and mixed.share[row] < 1:
        note = f"{float(mixed.share[row]):.2f}, rest {label_text(mixed.other_label[row], class_names)}"
    label = label_text(batch["label"][row], class_names)
    return ReplayedSample(index, dataset.key(index), dataset.shard_name(index), label, note)


def draw_step(replayed: ReplayedStep, run_dir: Path) -> list[Path]:
    """Write the images into RUN/replay/, at most 64 on a sheet, and return the paths."""
    paths = []
    images = replayed.images.permute(0, 2, 3, 1).numpy()  # (G, H, W, 3)
    captions = [f"{sample.label} {sample.note}".strip() for sample in replayed.samples]
    for first in range(0, len(images), TILES_ON_A_SHEET):
        suffix = f"-{first // TILES_ON_A_SHEET + 1}" if len(images) > TILES_ON_A_SHEET else ""
        path = run_dir / FOLDER / f"step-{replayed.step:08d}{suffix}.png"
        write_bytes(path, draw_grid(images[first : first + TILES_ON_A_SHEET], captions[first : first + TILES_ON_A_SHEET]))
        paths.append(path)
    return paths
