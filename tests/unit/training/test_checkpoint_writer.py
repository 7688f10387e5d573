import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch

from pipeline.config import Config
from pipeline.manifest import DatasetManifest
from pipeline.run import BEST, LAST, RunRecord
from pipeline.task import Metrics
from pipeline.training import checkpoint_writer
from pipeline.training.checkpoint import identity_of, load_checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter, DurableCheckpointIO
from pipeline.training.classifier import Classifier
from tests.unit.training.conftest import Fit, change


@pytest.fixture
def make_writer(tiny_dataset: DatasetManifest, record: RunRecord) -> Callable[[Config], CheckpointWriter]:
    """A function that gives the writer of a configuration's run folder."""
    return lambda config: CheckpointWriter(config, tiny_dataset, identity_of(record), config.run_dir)


# ---- one file ----


class DiskFull:
    """Pickling it fails half-way, as a write to a full disk does."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_a_checkpoint_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints/last.ckpt"
    DurableCheckpointIO().save_checkpoint({"step": 1, "weight": torch.ones(3)}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [found.name for found in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("fails", ["while writing", "before the new name"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint({"step": 1}, path)
    new: dict[str, Any] = {"step": 2, "weight": torch.zeros(100_000)}
    if fails == "while writing":
        new["last"] = DiskFull()
    else:

        def publish(temporary: Path, final: Path) -> None:
            assert torch.load(temporary, weights_only=True)["step"] == 2
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint_writer, "publish", publish)
    with pytest.raises(OSError, match="No space left"):
        DurableCheckpointIO().save_checkpoint(new, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


# ---- which is the best ----


class Trainer:
    """In place of Lightning's: writes the number of the save instead of a checkpoint."""

    is_global_zero = True
    num_training_batches = 10
    global_step = 0

    def __init__(self) -> None:
        self.saved: list[str] = []

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(path.name)
        DurableCheckpointIO().save_checkpoint({"save": len(self.saved)}, path)


def validate(writer: CheckpointWriter, module: Classifier, trainer: Trainer, *, accuracy: float, loss: float) -> None:
    module.metrics = Metrics(12, accuracy, loss, [])
    writer.on_validation_end(cast(L.Trainer, trainer), module)


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [
        ("val/accuracy", [0.5, 0.75, 0.75, 0.6], 2),
        ("val/loss", [0.9, 0.4, 0.4, 0.6], 2),
        ("val/loss", [0.2, 0.4, math.nan, 0.3], 1),
        ("val/loss", [math.nan, 0.4, 0.3, 0.6], 3),
        ("val/loss", [math.inf, 0.4, 0.5], 2),
    ],
)
def test_the_first_to_reach_the_best_value_is_the_best(
    tiny_config: Config,
    make_writer: Callable[[Config], CheckpointWriter],
    make_classifier: Callable[[Config], Classifier],
    monitor: str,
    values: list[float],
    best: int,
) -> None:
    config = change(tiny_config, "trainer", monitor=monitor)
    writer, module, trainer = make_writer(config), make_classifier(config), Trainer()
    for value in values:
        validate(writer, module, trainer, accuracy=value, loss=value)
        last = torch.load(config.run_dir / LAST, weights_only=True)
        assert last == {"save": len(trainer.saved)}, "last.ckpt is the newest, whether it is the best or not"
    assert torch.load(config.run_dir / BEST, weights_only=True) == {"save": best}
    assert writer.best_value == values[best - 1]
    assert sorted(path.name for path in (config.run_dir / BEST).parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_resumed_writer_goes_on_comparing_with_the_best_so_far(
    tiny_config: Config,
    make_writer: Callable[[Config], CheckpointWriter],
    make_classifier: Callable[[Config], Classifier],
) -> None:
    module, trainer = make_classifier(tiny_config), Trainer()
    first, second = make_writer(tiny_config), make_writer(tiny_config)
    validate(first, module, trainer, accuracy=0.75, loss=1.0)
    second.load_state_dict(first.state_dict())
    validate(second, module, trainer, accuracy=0.75, loss=0.1)
    assert torch.load(tiny_config.run_dir / BEST, weights_only=True) == {"save": 1}


def test_saves_come_every_few_steps_but_an_epoch_s_end_waits_for_its_validation(
    tiny_config: Config,
    make_writer: Callable[[Config], CheckpointWriter],
    make_classifier: Callable[[Config], Classifier],
) -> None:
    config = change(tiny_config, "trainer", checkpoint_every_steps=5)
    writer, module, trainer = make_writer(config), make_classifier(config), Trainer()
    saved_after = []
    for step in range(1, 21):
        trainer.global_step = step
        number = len(trainer.saved)
        writer.on_train_batch_end(cast(L.Trainer, trainer), module, None, None, batch_idx=(step - 1) % 10)
        saved_after += [step] * (len(trainer.saved) - number)
    assert saved_after == [5, 15]


# ---- what a file says of itself ----


def test_a_checkpoint_says_what_it_is_and_where_training_was(
    tiny_config: Config,
    tiny_dataset: DatasetManifest,
    record: RunRecord,
    make_writer: Callable[[Config], CheckpointWriter],
    fit: Fit,
) -> None:
    config = change(change(tiny_config, "trainer", max_epochs=2, checkpoint_every_steps=3), "data", global_batch_size=4)
    kept: list[dict[str, Any]] = []

    class Keep(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step in (3, 15):
                kept.append(load_checkpoint(config.run_dir / LAST, record)["shardline"])

    fit(config, make_writer(config), Keep())
    at_3, at_15 = kept
    # 36 samples in batches of 4 are 9 steps an epoch.
    assert (at_3["cursor"], at_3["global_step"]) == ({"epoch": 0, "batch": 3}, 3)
    assert (at_15["cursor"], at_15["global_step"]) == ({"epoch": 1, "batch": 6}, 15)
    end = load_checkpoint(config.run_dir / LAST, record)["shardline"]
    assert (end["cursor"], end["global_step"]) == ({"epoch": 1, "batch": 9}, 18)
    assert end == {
        "format_version": 1,
        "config": config.as_dict(),
        "data_digest": tiny_dataset.digest,
        "config_digest": record.config_digest,
        "preprocess_hash": record.preprocess_hash,
        "class_names": ["blue", "green", "red"],
        "task": "single",
        "global_batch_size": 4,
        "cursor": {"epoch": 1, "batch": 9},
        "global_step": 18,
        "job_id": record.job_id,
        "run_id": record.mlflow["run_id"],
    }
