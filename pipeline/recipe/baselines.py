"""What needs no network, and what a network has to beat: the largest class, and logistic regression on pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.recipe.verdict import Subject
from pipeline.report.html import Table

BASELINES = Path("check/baselines.json")
MAX_ITERATIONS = 200
# Multiplications of one fit: about 10 seconds of one core, whatever the number of classes.
BUDGET = 3e10
NAMES = {"majority": "the largest class", "logistic_regression": "logistic regression on pixels"}


def measure_baselines(subject: Subject) -> dict[str, Any]:
    """Accuracy of each baseline on every split that can be judged on, for baselines.json; the reason where there are none.

    Logistic regression learns from random samples of train, shrunk to 16 x 16 pixels, and is judged on samples of the others.
    """
    manifest = subject.manifest
    if subject.is_streamed or manifest.task == "multi":
        why = "streamed shards cannot be sampled" if subject.is_streamed else "they are defined for one label an image"
        return {"data_digest": manifest.digest, "why_none": why, "accuracy": {}}
    splits = [split for split in manifest.splits if split != "train" and manifest.split(split).num_samples]
    largest = int(np.argmax(manifest.split("train").class_counts))
    train = subject.described("train")
    accuracy: dict[str, dict[str, float]] = {"majority": {}, "logistic_regression": {}}
    model = _fit(train.pixels, train.labels)
    for split in splits:
        entry, held_out = manifest.split(split), subject.described(split)
        accuracy["majority"][split] = entry.class_counts[largest] / entry.num_samples
        accuracy["logistic_regression"][split] = float((model.predict(held_out.pixels) == held_out.labels).mean())
    return {
        "data_digest": manifest.digest,
        "largest_class": manifest.class_names[largest],
        "num_train": len(train),
        "num_samples": {split: len(subject.described(split)) for split in splits},
        "accuracy": accuracy,
    }


def _fit(pixels: Any, labels: Any) -> Any:
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    num_classes = len(np.unique(labels))
    if num_classes < 2:
        return DummyClassifier().fit(pixels, labels)
    iterations = int(BUDGET / (6 * pixels.size * num_classes))
    # A penalty on the many pixels of few images, and no search for its best value: it is a baseline.
    model = LogisticRegression(C=0.01, max_iter=min(MAX_ITERATIONS, max(5, iterations)), tol=1e-3)
    return make_pipeline(StandardScaler(), model).fit(pixels, labels)


def baselines_table(baselines: dict[str, Any]) -> Table:
    """The accuracies, a row a baseline and a column a split."""
    splits = list(baselines["accuracy"]["majority"])
    rows = [[NAMES[name], *(accuracy[split] for split in splits)] for name, accuracy in baselines["accuracy"].items()]
    largest = baselines["largest_class"]
    return Table(["accuracy of", *splits], rows, f"Largest class: {largest}; regression on {baselines['num_train']:,} images")


def compare_with_baselines(run_dir: Path, data_digest: str, split: str, accuracy: float) -> dict[str, Any] | None:
    """Accuracy of each baseline on a split, and whether a network's beats them all; None where `check` left none."""
    path = run_dir / BASELINES
    if not path.is_file():
        return None
    measured = json.loads(path.read_text())
    found = {name: values[split] for name, values in measured["accuracy"].items() if split in values}
    if measured["data_digest"] != data_digest or not found:
        return None
    return {**found, "beaten": accuracy > max(found.values())}
