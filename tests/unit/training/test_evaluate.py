import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.answers import Answers
from pipeline.config import Config, PreprocessConfig
from pipeline.data.dataset import ShardDataset
from pipeline.data.sources import open_source
from pipeline.data.writer import write_dataset
from pipeline.files import sha256_of
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import build_spec
from pipeline.run import BEST, RunRecord
from pipeline.training import evaluate as evaluate_module
from pipeline.training.checkpoint import identity_of
from pipeline.training.classifier import Classifier
from pipeline.training.evaluate import CONFUSION, MISTAKES, PER_CLASS, PREDICTIONS, RELIABILITY, RESULT, evaluate, save_mistakes
from tests.unit.training.conftest import Listener, change, make_trainer


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
        "report.html",
        "model_card.md",
    ]
    saved = RunRecord.require(tiny_config.run_dir)
    assert saved.stage_is_done("evaluate", saved.inputs_of("evaluate", tiny_config, "test"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_evaluation_leaves_what_it_took_for_what_and_its_surest_mistakes(
    tiny_config: Config, tiny_dataset: DatasetManifest, make_classifier: Callable[[Config], Classifier], tracker: Listener
) -> None:
    finish_training(tiny_config, tiny_dataset, make_classifier(tiny_config))
    stale = tiny_config.run_dir / MISTAKES / "0000099.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier evaluation")
    evaluate(tiny_config)
    run_dir, names = tiny_config.run_dir, tiny_dataset.class_names
    rows = read_csv(run_dir / PREDICTIONS)
    result = json.loads((run_dir / RESULT).read_text())
    counted = [[sum(row["label"] == true and row["predicted"] == said for row in rows) for said in names] for true in names]
    assert result["confusion"] == counted
    per_class = read_csv(run_dir / PER_CLASS)
    for number, (row, said) in enumerate(zip(per_class, result["per_class"], strict=True)):
        assert (row["class"], int(row["support"])) == (said["class"], said["support"]) == (names[number], 4)
        assert float(row["recall"]) == said["recall"] == counted[number][number] / 4
        answered = sum(line[number] for line in counted)
        assert said["precision"] == (counted[number][number] / answered if answered else None)
        assert (row["precision"] == "") == (not answered)
    assert [each["count"] for each in result["reliability"]] == [
        sum(low < float(row["confidence"]) <= low + 1 / 15 for row in rows) for low in (number / 15 for number in range(15))
    ]
    wrong = [row for row in rows if row["label"] != row["predicted"]]
    wrong.sort(key=lambda row: -float(row["confidence"]))
    table = tracker.tables["tables/misclassified.json"]
    assert wrong and [table[name] for name in ("true", "predicted", "key")] == [
        [row[name] for row in wrong] for name in ("label", "predicted", "key")
    ]
    assert table["confidence"] == pytest.approx([float(row["confidence"]) for row in wrong], abs=1e-5)
    assert table["image"] == [f"evaluation/misclassified/{int(row['index']):07d}.png" for row in wrong]
    for name in (*table["image"], CONFUSION, RELIABILITY):
        with Image.open(run_dir / name) as picture:
            assert max(picture.size) == 128 if "misclassified" in str(name) else min(picture.size) > 100
    assert not stale.exists()
    outputs = RunRecord.require(run_dir).stages["evaluate"]["outputs"]
    assert {*table["image"], *map(str, (CONFUSION, RELIABILITY, PER_CLASS, RESULT, PREDICTIONS))} == set(outputs)


def test_the_mlflow_run_is_named_and_described_by_its_result(
    tiny_config: Config, tiny_dataset: DatasetManifest, make_classifier: Callable[[Config], Classifier], tracker: Listener
) -> None:
    finish_training(tiny_config, tiny_dataset, make_classifier(tiny_config))
    evaluate(tiny_config)
    accuracy = f"{json.loads((tiny_config.run_dir / RESULT).read_text())['accuracy']:.4f}"
    assert tracker.tags["mlflow.runName"] == f"{accuracy} tiny"
    note = tracker.tags["mlflow.note.content"]
    assert note.startswith(f"**test accuracy {accuracy}** on 12 images\n\n| test | |\n|---|---:|\n| accuracy | {accuracy} |\n")
    assert f"Data set: tiny, 3 classes, digest `{tiny_dataset.digest[:12]}`" in note


def test_several_labels_have_figures_by_label_and_mistakes_in_words(
    tiny_config: Config, multi_dataset: DatasetManifest, make_classifier: Callable[..., Classifier], tracker: Listener
) -> None:
    config = change(change(tiny_config, "dataset", path=str(multi_dataset.folder)), "loss", name="bce")
    finish_training(config, multi_dataset, make_classifier(config, multi_dataset))
    evaluate(config)
    result = json.loads((config.run_dir / RESULT).read_text())
    rows = read_csv(config.run_dir / PREDICTIONS)
    assert result["confusion"] is None
    assert sum(each["count"] for each in result["reliability"]) == 3 * len(rows), "each label is an answer"
    for each in result["per_class"]:
        true, said = ([each["class"] in row[name].split("|") for row in rows] for name in ("label", "predicted"))
        assert each["support"] == sum(true)
        hits = sum(a and b for a, b in zip(true, said, strict=True))
        assert each["precision"] == (hits / sum(said) if sum(said) else None)
    table = tracker.tables["tables/misclassified.json"]
    by_key = {row["key"]: row for row in rows}
    assert len(table["key"]) == sum(row["label"] != row["predicted"] for row in rows) > 0
    for key, true, said in zip(table["key"], table["true"], table["predicted"], strict=True):
        assert (true, said) == (by_key[key]["label"] or "(none)", by_key[key]["predicted"] or "(none)")


def test_yes_and_no_have_a_matrix_of_two(
    tiny_config: Config,
    image_folder: Callable[[Path, dict[str, int]], Path],
    make_classifier: Callable[..., Classifier],
    tracker: Listener,
    tmp_path: Path,
) -> None:
    source = image_folder(tmp_path / "two", {"blue": 10, "red": 10})
    dataset = dataclasses.replace(tiny_config.dataset, source=str(source), path=str(tmp_path / "binary"))
    config = change(dataclasses.replace(tiny_config, dataset=dataset), "loss", name="bce")
    manifest = write_dataset(open_source(dataset), dataset, config.dataset_dir)
    finish_training(config, manifest, make_classifier(config, manifest))
    evaluate(config)
    result, rows = json.loads((config.run_dir / RESULT).read_text()), read_csv(config.run_dir / PREDICTIONS)
    pairs = [(row["label"], row["predicted"]) for row in rows]
    assert result["confusion"] == [[pairs.count((true, said)) for said in ("blue", "red")] for true in ("blue", "red")]
    assert [each["support"] for each in result["per_class"]] == [2, 2]


def test_an_evaluation_without_a_mistake_leaves_no_table_of_them(tmp_path: Path, tiny_dataset: DatasetManifest) -> None:
    right = Answers(torch.arange(3), torch.arange(3), torch.arange(3), torch.ones(3).double())
    dataset = ShardDataset(tiny_dataset, "test", build_spec(PreprocessConfig(resize=[16, 16]), tiny_dataset.image_stats))
    assert save_mistakes(tmp_path, dataset, right)["image"] == []


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
