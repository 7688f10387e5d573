import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from pipeline.config import Config
from pipeline.errors import DataError
from pipeline.manifest import DatasetManifest
from pipeline.training.bad_samples import FOLDER, BadSampleLedger
from pipeline.training.classifier import Classifier
from tests.unit.data.test_dataset import damage
from tests.unit.training.conftest import Fit, change, weights_of


class Steps(L.Callback):
    """Counts the optimizer steps."""

    number = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.number += 1


@pytest.fixture
def two_bad(copied_dataset: DatasetManifest) -> DatasetManifest:
    """The tiny data set with two of 36 training samples damaged."""
    damage(copied_dataset, 7)
    damage(copied_dataset, 20)
    return copied_dataset


def patient(config: Config, **values: Any) -> Config:
    """Whole epochs, and as many bad samples as there may be."""
    return change(change(config, "data", drop_last=False, max_bad_share=0.1, **values), "trainer", max_epochs=2)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FOLDER / "rank-0.jsonl").read_text().splitlines()]


def test_training_goes_on_without_bad_samples_and_names_each(
    tiny_config: Config, fit: Fit, two_bad: DatasetManifest, tmp_path: Path
) -> None:
    config, steps = patient(tiny_config), Steps()
    ledger = BadSampleLedger(tmp_path, config.data)
    module = fit(config, ledger, steps, manifest=two_bad)
    assert steps.number == 10
    lines = lines_of(tmp_path)
    assert sorted(line["index"] for line in lines) == [7, 7, 20, 20]
    assert ledger.total == 4
    assert lines[0]["split"] == "train"
    by_index = {line["index"]: line for line in lines}
    assert (by_index[7]["shard"], by_index[20]["shard"]) == ("train-000001.tar", "train-000004.tar")
    assert by_index[7]["key"].startswith("00000007-")
    assert "cannot identify" in by_index[7]["reason"]
    assert {line["step"] <= 5 for line in lines[:2]} == {True} and {line["step"] > 5 for line in lines[2:]} == {True}
    assert torch.isfinite(weights_of(module)).all()


def test_a_bad_sample_of_the_validation_split_is_counted_out_and_named_once(
    tiny_config: Config, fit: Fit, copied_dataset: DatasetManifest, tmp_path: Path
) -> None:
    shard = copied_dataset.folder / copied_dataset.split("val").shards[0].name
    content = bytearray(shard.read_bytes())
    content[512:516] = b"xxxx"  # the first image, behind the first header
    shard.write_bytes(content)
    module = fit(patient(tiny_config), BadSampleLedger(tmp_path, tiny_config.data), manifest=copied_dataset)
    assert module.metrics is not None
    assert (module.metrics.num_samples, module.metrics.num_bad) == (11, 1)
    ((split, index),) = [(line["split"], line["index"]) for line in lines_of(tmp_path)]
    assert (split, index) == ("val", 0)


def test_too_large_a_share_of_bad_samples_ends_the_run(
    tiny_config: Config, fit: Fit, two_bad: DatasetManifest, tmp_path: Path
) -> None:
    config = patient(tiny_config)
    config = change(config, "data", max_bad_share=0.03)  # one of 40 rows is less, two are more
    with pytest.raises(DataError, match=r"2 of an epoch's 40 samples can no longer be decoded .* raise `data\.max_bad_share`"):
        fit(config, BadSampleLedger(tmp_path, config.data), manifest=two_bad)
    assert len(lines_of(tmp_path)) == 2


def test_too_many_bad_samples_in_a_row_end_the_run(
    tiny_config: Config, fit: Fit, copied_dataset: DatasetManifest, tmp_path: Path
) -> None:
    for index in range(36):
        damage(copied_dataset, index)
    config = change(patient(tiny_config), "data", max_bad_in_row=10, max_bad_share=1.0)
    with pytest.raises(DataError, match=r"10 samples in a row can no longer be decoded .* raise `data\.max_bad_in_row`"):
        fit(config, BadSampleLedger(tmp_path, config.data), manifest=copied_dataset)


def test_a_good_sample_in_between_starts_the_row_anew(
    tiny_config: Config, fit: Fit, two_bad: DatasetManifest, tmp_path: Path
) -> None:
    config = patient(tiny_config, max_bad_in_row=2)
    fit(config, BadSampleLedger(tmp_path, config.data), manifest=two_bad)
    assert len(lines_of(tmp_path)) == 4


def test_steps_that_are_taken_again_are_written_down_once(
    tiny_config: Config, fit: Fit, two_bad: DatasetManifest, tmp_path: Path
) -> None:
    class SaveAfterOneEpoch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    config = patient(tiny_config)
    fit(config, BadSampleLedger(tmp_path, config.data), SaveAfterOneEpoch(), manifest=two_bad)
    before = lines_of(tmp_path)
    ledger = tmp_path / FOLDER / "rank-0.jsonl"
    ledger.write_text(ledger.read_text() + '{"step": 3, "ind')  # a process that was killed while it wrote
    (tmp_path / FOLDER / "rank-1.jsonl").write_text('{"step": 2}\n{"step": 9}\n')  # of a rank that is no more
    again = BadSampleLedger(tmp_path, config.data)
    module = fit(config, again, resume=tmp_path / "middle.ckpt", manifest=two_bad)
    assert isinstance(module, Classifier)
    assert lines_of(tmp_path) == before
    assert (tmp_path / FOLDER / "rank-1.jsonl").read_text() == '{"step": 2}\n'
    assert again.total == 5
