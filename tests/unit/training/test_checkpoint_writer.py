import dataclasses
import math
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch

from pipeline.config import Config
from pipeline.manifest import DatasetManifest
from pipeline.metrics import Metrics
from pipeline.preprocess import PreprocessSpec
from pipeline.run import BEST, LAST, RunRecord
from pipeline.training import checkpoint_writer
from pipeline.training.checkpoint import checkpoint_path, checkpoints_in, identity_of, load_checkpoint, step_of
from pipeline.training.checkpoint_writer import CheckpointWriter, DurableCheckpointIO
from pipeline.training.classifier import Classifier
from tests.unit.training.conftest import Fit, change


@pytest.fixture
def make_writer(tiny_dataset: DatasetManifest, record: RunRecord) -> Callable[[Config], CheckpointWriter]:
    """A function that gives the writer of a configuration's run folder."""
    return lambda config: CheckpointWriter(config, tiny_dataset, identity_of(record), config.run_dir)


# ---- one file ----


def test_a_checkpoint_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints/last.ckpt"
    DurableCheckpointIO().save_checkpoint({"step": 1, "weight": torch.ones(3)}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert sorted(found.name for found in path.parent.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]
    done = subprocess.run(["sha256sum", "-c", "last.ckpt.sha256"], cwd=path.parent, capture_output=True, text=True, check=False)
    assert done.stdout == "last.ckpt: OK\n"


@pytest.mark.parametrize(
    ("fails", "reason"), [("while writing", "File too large"), ("before the new name", "No space left on device")]
)
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, reason: str
) -> None:
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint({"step": 1}, path)
    new = {"step": 2, "weight": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fails == "before the new name":

        def publish(temporary: Path, final: Path) -> None:
            assert torch.load(temporary, weights_only=True)["step"] == 2
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint_writer, "publish", publish)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=f"{reason}: '.*last.ckpt'"):
            DurableCheckpointIO().save_checkpoint(new, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert sorted(found.name for found in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


# ---- which is the best ----


class Trainer:
    """In place of Lightning's: a save holds its own step."""

    is_global_zero = True
    num_training_batches = 10
    global_step = 0
    should_stop = False

    def __init__(self) -> None:
        self.saved: list[int] = []

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(self.global_step)
        DurableCheckpointIO().save_checkpoint({"step": self.global_step}, path)


def validate(writer: CheckpointWriter, module: Classifier, trainer: Trainer, *, accuracy: float, loss: float) -> None:
    trainer.global_step += 1
    module.metrics = Metrics(12, accuracy, loss, [])
    writer.on_validation_end(cast(L.Trainer, trainer), module)


def steps_in(config: Config) -> list[int]:
    return [step_of(path) for path in checkpoints_in(config.run_dir)]


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
    for step, value in enumerate(values, start=1):
        validate(writer, module, trainer, accuracy=value, loss=value)
        assert torch.load(config.run_dir / LAST, weights_only=True) == {"step": step}
    assert torch.load(config.run_dir / BEST, weights_only=True) == {"step": best}
    assert (writer.best_value, step_of(writer.best_path)) == (values[best - 1], best)
    assert steps_in(config) == sorted({best, len(values), len(values) - 1}, reverse=True), "the best and the last two are kept"


def test_the_best_few_and_the_newest_few_are_kept_and_everything_else_is_gone(
    tiny_config: Config,
    make_writer: Callable[[Config], CheckpointWriter],
    make_classifier: Callable[[Config], Classifier],
) -> None:
    config = change(tiny_config, "trainer", keep_best=3, keep_last=1)
    writer, module, trainer = make_writer(config), make_classifier(config), Trainer()
    for value in (0.1, 0.7, 0.5, 0.6, 0.2, 0.7, 0.3):
        validate(writer, module, trainer, accuracy=value, loss=0.0)
    assert steps_in(config) == [7, 6, 4, 2]
    assert [step for _, step in writer.ranking] == [2, 6, 4], "of equal ones the first ranks higher"
    names = {path.name for path in (config.run_dir / BEST).parent.iterdir()}
    kept = {f"step-{step:08d}.ckpt" for step in (2, 4, 6, 7)}
    assert names == kept | {f"{name}.sha256" for name in kept} | {"best.ckpt", "last.ckpt"}


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
    assert torch.load(tiny_config.run_dir / BEST, weights_only=True) == {"step": 1}


def test_a_checkpoint_from_after_the_place_where_the_run_goes_on_does_not_push_out_a_whole_one(
    tiny_config: Config,
    make_writer: Callable[[Config], CheckpointWriter],
    make_classifier: Callable[[Config], Classifier],
) -> None:
    module, trainer = make_classifier(tiny_config), Trainer()
    DurableCheckpointIO().save_checkpoint({"step": 9}, checkpoint_path(tiny_config.run_dir, 9))
    for _ in range(3):
        validate(make_writer(tiny_config), module, trainer, accuracy=0.5, loss=1.0)
    assert steps_in(tiny_config) == [9, 3, 2]


def test_early_stopping_counts_validations_since_the_best(
    tiny_config: Config,
    make_writer: Callable[[Config], CheckpointWriter],
    make_classifier: Callable[[Config], Classifier],
) -> None:
    config = change(tiny_config, "trainer", early_stopping=2)
    writer, module, trainer = make_writer(config), make_classifier(config), Trainer()
    stopped = []
    for value in (0.5, 0.4, 0.6, 0.6, 0.5):
        validate(writer, module, trainer, accuracy=value, loss=0.0)
        stopped.append(trainer.should_stop)
    assert stopped == [False, False, False, False, True]


def test_saves_come_every_few_steps_but_where_a_validation_follows_they_wait_for_it(
    tiny_config: Config,
    make_writer: Callable[[Config], CheckpointWriter],
    make_classifier: Callable[[Config], Classifier],
) -> None:
    config = change(tiny_config, "trainer", checkpoint_every_steps=5, validate_every_steps=15)
    writer, module, trainer = make_writer(config), make_classifier(config), Trainer()
    for step in range(1, 21):
        trainer.global_step = step
        writer.on_train_batch_end(cast(L.Trainer, trainer), module, None, None, batch_idx=(step - 1) % 10)
    assert trainer.saved == [5]
    writer.on_train_epoch_end(cast(L.Trainer, trainer), module)
    assert trainer.saved == [5, 20], "an epoch's end is saved after it"


def test_a_save_is_due_after_some_minutes(
    tiny_config: Config, make_writer: Callable[[Config], CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = make_writer(change(tiny_config, "trainer", checkpoint_every_minutes=2.0))
    began = writer.saved_at
    for seconds, is_due in ((119.0, False), (121.0, True)):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: began + seconds)
        assert writer.is_due == is_due


# ---- what a file says of itself ----


def test_a_checkpoint_says_what_it_is_and_where_training_was(
    tiny_config: Config,
    tiny_dataset: DatasetManifest,
    spec: PreprocessSpec,
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
    ((_, best_step),) = end.pop("ranking")
    assert best_step in (9, 18)  # the ends of the two epochs
    assert end == {
        "format_version": 1,
        "config": config.as_dict(),
        "preprocess": dataclasses.asdict(spec),
        "data_digest": tiny_dataset.digest,
        "config_digest": record.config_digest,
        "preprocess_hash": record.preprocess_hash,
        "class_names": ["blue", "green", "red"],
        "task": "single",
        "world_size": 1,
        "compiled": False,
        "decoder": None,  # no crops are taken
        "global_batch_size": 4,
        "cursor": {"epoch": 1, "batch": 9},
        "global_step": 18,
        "job_id": record.job_id,
        "run_id": record.mlflow["run_id"],
    }
