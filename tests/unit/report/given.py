"""Run folders made by hand: what every stage leaves there, in a small size."""

import json
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.files import write_bytes, write_json
from pipeline.manifest import DatasetManifest
from pipeline.run import RunRecord, open_run

CHECKPOINT = "b" * 64
ONNX = "e" * 64
BAD = {"step": 3, "split": "train", "shard": "train-000001.tar", "key": "k", "reason": "cut short"}


def predictions(label_and_answer: list[tuple[str, str]]) -> bytes:
    lines = [f"{n},k{n},{label},{answer},0.{90 + n}0000" for n, (label, answer) in enumerate(label_and_answer)]
    return "\n".join(["index,key,label,predicted,confidence", *lines, ""]).encode()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def train(config: Config, manifest: DatasetManifest) -> RunRecord:
    """A run whose training is done."""
    record, _ = open_run(config, manifest)
    record.outcome, record.steps, record.world_size = "done", 40, 2
    record.best = {"path": "checkpoints/step-00000030.ckpt", "sha256": CHECKPOINT, "monitor": "val/loss", "value": 0.25}
    record.save()
    lines: list[dict[str, Any]] = [
        {"begin": {"tags": {"mlflow.source.name": "shardline train", "hardware": "2 cores of a toaster"}}}
    ]
    for step in range(10, 50, 10):
        points = {"train/loss": 2.0 / step, "train/learning_rate": 0.01 * step, "val/loss": 3.0 / step}
        lines.append({"points": [[key, value, 0, step] for key, value in points.items()]})
    lines.append({"begin": {"tags": {"mlflow.source.name": "shardline evaluate", "hardware": "another machine"}}})
    write_bytes(record.folder / "tracking/points.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return record


def evaluate(record: RunRecord, manifest: DatasetManifest, answers: list[tuple[str, str]], **changes: Any) -> None:
    """The evaluation of a run that gave these answers (label, predicted)."""
    right = {name: [label == answer for label, answer in answers if label == name] for name in manifest.class_names}
    result = {
        "split": "test",
        "num_samples": len(answers),
        "num_bad_samples": 0,
        "accuracy": sum(label == answer for label, answer in answers) / len(answers),
        "loss": 0.5,
        "ece": 0.02,
        "baselines": {"majority": 1 / 3, "logistic_regression": 0.5, "beaten": True},
        "recall": {name: sum(hits) / len(hits) if hits else None for name, hits in right.items()},
        "data_digest": manifest.digest,
        "checkpoint_sha256": CHECKPOINT,
    }
    write_json(record.folder / "evaluation/test.json", result | changes)
    write_bytes(record.folder / "evaluation/predictions.csv", predictions(answers))


def publish(record: RunRecord) -> None:
    """The export of a run."""
    cases = [
        {"batch": batch, "optimization": "off", "run": 1, "max_abs": max_abs, "tolerance": tolerance}
        for batch, max_abs, tolerance in ((1, 1e-6, 5e-5), (2, 2e-6, 1e-4), (3, 1e-7, 2e-4))
    ]
    parity = {"passed": True, "cases": cases, "top1_agreement": 1.0, "num_samples": 12, "sha256": ONNX}
    write_json(record.folder / "export/parity.json", parity)
    write_bytes(record.folder / "export/model.onnx", b"weights" + CHECKPOINT.encode())


def check(record: RunRecord) -> None:
    """The checks of a run: one green, one skipped, and one that had nothing to check."""
    verdicts = [("seed", "green", "equal twice"), ("leakage", "skipped", "named in check.skip"), ("pretrained", "skipped", "-")]
    entries = [{"check": c, "verdict": v, "value": 1.0, "expected": "", "why": why} for c, v, why in verdicts]
    write_json(record.folder / "check/verdicts.json", entries)


ANSWERS = [("red", "red")] * 3 + [("green", "green")] * 4 + [("blue", "blue")] * 4 + [("red", "blue")]
