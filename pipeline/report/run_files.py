"""What a run's folder says of it, read once: the ground of its page and of its model card.

Every part may be missing, because its stage has not run yet. A newcomer would show what is there; but after a training that
went on with changes, results and exports of the checkpoint before may still lie in the folder. They are not this model's.
"""

import csv
import itertools
import json
import math
import mmap
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.comparison import wilson_interval
from pipeline.config import Config
from pipeline.manifest import DatasetManifest
from pipeline.run import RunRecord
from pipeline.tracking.journal import FOLDER, POINTS, read_entries
from pipeline.tracking.server import place_of, without_credentials

TEST, AGAINST, EVALUATION = Path("evaluation/test.json"), Path("evaluation/against.json"), Path("evaluation")
MODEL, PARITY, PARITY_REFUSED = Path("export/model.onnx"), Path("export/parity.json"), Path("export/parity-refused.json")
PRECISIONS = Path("export/precisions.json")
VERDICTS, BASELINES = Path("check/verdicts.json"), Path("check/baselines.json")
DYNAMICS, WATCHED = Path("dynamics.json"), Path("dynamics.png")
PREDICTIONS, MISTAKES = EVALUATION / "predictions.csv", EVALUATION / "misclassified"
BAD_SAMPLES = Path("bad_samples")
# As `pipeline.task` joins the labels of an image; importing it takes torch.
LABEL_SEPARATOR = "|"

Curve = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class ClassResult:
    """How one class fared on the evaluation split; None is what has no value there."""

    name: str
    num_train: int | None
    num_samples: int | None
    recall: float | None
    precision: float | None = None
    f1: float | None = None


@dataclass(frozen=True)
class Answer:
    """A line of predictions.csv; of several labels an image all are in one string."""

    index: int
    key: str
    label: str
    predicted: str
    confidence: str

    @property
    def num_wrong(self) -> int:
        """Labels that are missing or too many."""
        return len(set(self.label.split(LABEL_SEPARATOR)) ^ set(self.predicted.split(LABEL_SEPARATOR)))

    @property
    def confidences(self) -> list[float]:
        """The probability of the answer, or of each label in it."""
        return [float(value) for value in self.confidence.split(LABEL_SEPARATOR) if value]


@dataclass(frozen=True)
class RunFiles:
    """A run, by its folder. Empty where a stage left nothing, or left it for another checkpoint than the best one now."""

    config: Config
    manifest: DatasetManifest
    record: RunRecord
    test: dict[str, Any] = field(default_factory=dict)
    against: list[dict[str, Any]] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    precisions: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, Any] = field(default_factory=dict)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    baselines: dict[str, Any] = field(default_factory=dict)
    dynamics: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)  # tags of the training's machine and code
    bad_samples: Counter[tuple[str, str]] = field(default_factory=Counter)  # by split and reason

    @classmethod
    def read(cls, config: Config, manifest: DatasetManifest, record: RunRecord) -> "RunFiles":
        """Read what is there."""
        run_dir, best = config.run_dir, (record.best or {}).get("sha256")
        test = _read(run_dir / TEST, {})
        test = test if best and test.get("checkpoint_sha256") == best else {}
        against = _read(run_dir / AGAINST, {})
        is_exported = bool(best) and _carries(run_dir / MODEL, str(best))
        curves, origin = _read_journal(run_dir / FOLDER / POINTS)
        return cls(
            config,
            manifest,
            record,
            test=test,
            against=against.get("comparisons", []) if test and against.get("checkpoint_sha256") == best else [],
            parity=_read(run_dir / PARITY, {}) if is_exported else {},
            precisions=_read(run_dir / PRECISIONS, []) if is_exported else [],
            refused=_read(run_dir / PARITY_REFUSED, {}),
            verdicts=_read(run_dir / VERDICTS, []),
            baselines=_read(run_dir / BASELINES, {}),
            dynamics=_read(run_dir / DYNAMICS, {}),
            curves=curves,
            origin=origin,
            bad_samples=_count_bad_samples(run_dir / BAD_SAMPLES),
        )

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson), for an evaluated run."""
        number = int(self.test["num_samples"])
        return wilson_interval(round(self.test["accuracy"] * number), number)

    @property
    def classes(self) -> list[ClassResult]:
        """Every class, the lowest recall first; classes that the split lacks come last."""
        recall = self.test.get("recall", {})
        counts = {name: self.counts_of(name) for name in ("train", self.test.get("split", ""))}
        details = {row["class"]: row for row in self.test.get("per_class", [])}
        rows = []
        for number, name in enumerate(self.manifest.class_names):
            train, samples = (split[number] if split else None for split in counts.values())
            found = details.get(name, {})
            samples = found.get("support", samples)  # without those that cannot be decoded
            rows.append(ClassResult(name, train, samples, recall.get(name), found.get("precision"), found.get("f1")))
        return sorted(rows, key=lambda row: (row.recall is None, row.recall))

    def counts_of(self, split: str) -> list[int]:
        """Samples of each class in a split; none where it is streamed or missing."""
        if split not in self.manifest.splits or split in self.manifest.streams:
            return []
        return self.manifest.split(split).class_counts

    @property
    def gap(self) -> dict[str, Any] | None:
        """What the end of the training said of training and validation images."""
        return self.dynamics.get("gap")

    @property
    def worst_difference(self) -> tuple[float, float]:
        """The largest difference of the ONNX file's answers, and what was allowed there, for an exported run."""
        worst = max(self.parity["cases"], key=lambda case: case["max_abs"])
        return worst["max_abs"], worst["tolerance"]

    @property
    def skipped_checks(self) -> list[str]:
        """Checks that did not run although there was something to check."""
        return [verdict["check"] for verdict in self.verdicts if verdict["verdict"] == "skipped" and self.applies(verdict)]

    def applies(self, verdict: dict[str, Any]) -> bool:
        """Whether there was something to check: a network from scratch has no pretrained weights."""
        return verdict["check"] != "pretrained" or self.config.model.weights is not None

    @property
    def location(self) -> str:
        """Where the shards are, as it may be shown."""
        return without_credentials(self.config.dataset_location)

    @property
    def mlflow(self) -> dict[str, str | None]:
        """Server, experiment and id of the MLflow run, as far as they are known."""
        place = place_of(self.config.run_dir)
        known = {name: getattr(place, name) or self.record.mlflow.get(name) for name in ("uri", "experiment", "run_id")}
        return {name: without_credentials(value) if value else None for name, value in known.items()}

    def answers(self, indices: Collection[int]) -> list[Answer]:
        """The answers to some samples, the worst first: those with the most wrong labels, and of equally many the surest."""
        path = self.config.run_dir / PREDICTIONS
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            lines = itertools.islice(csv.reader(file), 1, None)
            found = [Answer(int(index), *cells) for index, *cells in lines if int(index) in indices]
        is_multi = self.manifest.task == "multi"  # else a bar is part of a class's name
        return sorted(found, key=lambda answer: (-answer.num_wrong * is_multi, -max(answer.confidences, default=0.0)))

    def picture(self, path: Path) -> bytes:
        """The bytes of a picture in the run folder; none where it is not there."""
        whole = self.config.run_dir / path
        return whole.read_bytes() if whole.is_file() else b""


def accuracy_sentence(files: RunFiles) -> str:
    """The headline of an evaluated run."""
    test, (low, high) = files.test, files.interval
    right = round(test["accuracy"] * test["num_samples"])
    bad = f"; {test['num_bad_samples']:,} more cannot be decoded" if test.get("num_bad_samples") else ""
    whole = " with every label right" if files.manifest.task == "multi" else ""
    return (
        f"Accuracy {test['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}): {right:,} of {test['num_samples']:,} images "
        f"of the {test['split']} split{whole}{bad}."
    )


BASELINE_NAMES = {"majority": "the largest class", "logistic_regression": "logistic regression on pixels"}


def baseline_accuracies(test: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each baseline on the evaluation split, by its name in words; none where `check` left none."""
    found = test.get("baselines") or {}
    return {words: found[name] for name, words in BASELINE_NAMES.items() if name in found}


def baseline_sentence(test: dict[str, Any]) -> str:
    """How the network stands beside what needs no network."""
    accuracies = baseline_accuracies(test)
    best = max(accuracies, key=lambda name: accuracies[name])
    verb = "Beats" if test["baselines"]["beaten"] else "Does NOT beat"
    return f"{verb} {best}: {test['accuracy']:.4f} beside {accuracies[best]:.4f}."


def parity_sentence(files: RunFiles) -> str:
    """What was proved of the exported file."""
    (difference, tolerance), parity = files.worst_difference, files.parity
    return (
        f"The ONNX file answers as the trained network does: agreement {parity['top1_agreement']:.4f} on "
        f"{parity['num_samples']:,} images, largest difference {difference:.1e} (allowed {tolerance:.1e})."
    )


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else default


def _carries(path: Path, digest: str) -> bool:
    """Whether a model file names this checkpoint; its metadata is plain text in it, so no ONNX package is needed."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(digest.encode()) >= 0  # metadata stands behind the weights


def _read_journal(path: Path) -> tuple[dict[str, Curve], dict[str, str]]:
    """Curves by global step, and the tags of the last training, or of the last stage where there was none."""
    curves: dict[str, Curve] = {}
    origins: dict[bool, dict[str, str]] = {}
    for entry, _ in read_entries(path):
        for key, value, _, step in entry.get("points", ()):
            curves.setdefault(key, []).append((step, math.nan if value is None else value))
        tags = entry.get("begin", {}).get("tags")
        if tags:
            origins[tags.get("mlflow.source.name", "").startswith("shardline train")] = tags
    return curves, origins.get(True) or origins.get(False) or {}


def _count_bad_samples(folder: Path) -> Counter[tuple[str, str]]:
    """Samples that did not decode in training, by split and reason; each counts once, however often it was met."""
    found: dict[tuple[str, int], str] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if line.endswith("}"):  # the last one of a killed process may be cut short
                bad = json.loads(line)
                found[bad["split"], bad["index"]] = bad["reason"]
    return Counter((split, reason) for (split, _), reason in found.items())
