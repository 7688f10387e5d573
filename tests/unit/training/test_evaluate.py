import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import Config
from pipeline.data.sources import open_source
from pipeline.data.writer import write_dataset
from pipeline.files import sha256_of
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import build_spec
from pipeline.run import BEST, RunRecord
from pipeline.training import evaluate as evaluate_module
from pipeline.training.checkpoint import identity_of
from pipeline.training.classifier import Classifier
from pipeline.training.evaluate import PREDICTIONS, RESULT, evaluate
from tests.unit.training.conftest import Listener, make_trainer


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Listener:
    """One process without DDP, and nobody to tell."""
    found = Listener()
    monkeypatch.setattr(evaluate_module, "open_tracker", lambda config, record, status: found)
    monkeypatch.setattr(evaluate_module, "build_trainer", lambda config, callbacks: make_trainer(config, *callbacks))
    return found


def finish_training(config: Config, manifest: DatasetManifest, module: Classifier) -> RunRecord:
    """Leave what a finished training of `module` leaves."""
    identity = (config.identity(), manifest.digest, build_spec(config.preprocess, manifest.image_stats).hash())
    record = RunRecord("tiny", "a" * 32, *identity, git={}, outcome="done", folder=config.run_dir)
    path = config.run_dir / BEST
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": module.state_dict(), "shardline": {"format_version": 1, **identity_of(record)}}, path)
    record.best = {"path": str(BEST), "sha256": sha256_of(path), "monitor": "val/accuracy", "value": 0.5}
    record.save()
    return record


def test_an_evaluation_leaves_its_figures_and_every_prediction(
    tiny_config: Config, tiny_dataset: DatasetManifest, make_classifier: Callable[[Config], Classifier], tracker: Listener
) -> None:
    record = finish_training(tiny_config, tiny_dataset, make_classifier(tiny_config))
    evaluate(tiny_config)
    result = json.loads((tiny_config.run_dir / RESULT).read_text())
    with (tiny_config.run_dir / PREDICTIONS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(result) == [
        "split",
        "num_samples",
        "num_bad_samples",
        "accuracy",
        "loss",
        "macro_f1",
        "auroc",
        "average_precision",
        "ece",
        "baselines",
        "recall",
        "per_class",
        "reliability",
        "confusion",
        "data_digest",
        "checkpoint_sha256",
    ]
    assert (result["split"], result["num_samples"], result["data_digest"]) == ("test", 12, tiny_dataset.digest)
    assert record.best is not None
    assert result["checkpoint_sha256"] == record.best["sha256"]
    assert [int(row["index"]) for row in rows] == list(range(12))
    assert len({row["key"] for row in rows}) == 12
    right = [row["label"] == row["predicted"] for row in rows]
    assert result["accuracy"] == sum(right) / 12
    for name, recall in result["recall"].items():
        of_class = [correct for row, correct in zip(rows, right, strict=True) if row["label"] == name]
        assert recall == sum(of_class) / 4
    names = ("accuracy", "loss", "macro_f1", "auroc", "average_precision", "ece")
    assert tracker.figures == {f"test/{name}": result[name] for name in names}
    assert tracker.kept == [
        "evaluation/test.json",
        "evaluation/predictions.csv",
        "plots/confusion_matrix.png",
        "plots/reliability.png",
        "tables/per_class.csv",
    ]
    saved = RunRecord.require(tiny_config.run_dir)
    assert saved.stage_is_done("evaluate", saved.inputs_of("evaluate", tiny_config, "test"))


def test_without_a_test_split_the_final_figures_stay_off_the_training_curves(
    tiny_config: Config,
    tiny_source: Path,
    make_classifier: Callable[[Config], Classifier],
    tracker: Listener,
    tmp_path: Path,
) -> None:
    dataset = dataclasses.replace(tiny_config.dataset, test_fraction=0.0, path=str(tmp_path / "no-test"))
    config = dataclasses.replace(tiny_config, dataset=dataset)
    manifest = write_dataset(open_source(dataset), dataset, config.dataset_dir)
    finish_training(config, manifest, make_classifier(config))
    evaluate(config)
    assert json.loads((config.run_dir / RESULT).read_text())["split"] == "val"
    # A point without a step is one at step 0: on the curve of `val/loss` it would jump back to the beginning.
    assert tracker.figures
    assert not {"val/accuracy", "val/loss"} & set(tracker.figures)
