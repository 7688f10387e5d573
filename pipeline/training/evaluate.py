"""`shardline evaluate`: the best checkpoint on every sample of the test split, exactly once over all ranks."""

import csv
import io
import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import distributed
from pipeline.answers import Answers, confusion_of
from pipeline.config import Config
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.dataset import ShardDataset
from pipeline.files import write_bytes, write_json
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.metrics import Metrics
from pipeline.models.sequential import network_for
from pipeline.pretraining import spec_for
from pipeline.recipe.baselines import compare_with_baselines
from pipeline.report.drawing import thumbnail, to_png
from pipeline.report.reliability import draw_reliability
from pipeline.report.run_page import write_report
from pipeline.run import EVALUATION, RunRecord, require_run
from pipeline.task import LABEL_SEPARATOR, label_text, task_of
from pipeline.tracking.run import open_tracker
from pipeline.training.checkpoint import load_network_weights
from pipeline.training.classifier import Classifier
from pipeline.training.fit import build_trainer
from pipeline.training.pictures import answer_texts, draw_mistakes_by_class

RESULT = Path(EVALUATION)
PREDICTIONS = Path("evaluation/predictions.csv")
PER_CLASS = Path("evaluation/per_class.csv")
CONFUSION = Path("evaluation/confusion_matrix.png")
RELIABILITY = Path("evaluation/reliability.png")
MISTAKES = Path("evaluation/misclassified")
MISTAKES_TABLE = "tables/misclassified.json"
MOST_MISTAKES, THUMBNAIL_SIDE = 100, 128
MOST_CLASSES_LISTED = 50  # in the matrix of test.json


def evaluate(config: Config) -> None:
    """Evaluate as one rank; rank 0 writes figures, tables and pictures, and tells MLflow."""
    distributed.join_group(timedelta(seconds=config.trainer.timeout_seconds))
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    record, spec = require_run(config, manifest)
    task = task_of(manifest, config)
    network = network_for(config, manifest, spec, pretrained=False)
    network.load_state_dict(load_network_weights(record.best_checkpoint(), record))
    module = Classifier(network, config, task, total_steps=0)
    trainer = build_trainer(config, callbacks=[])
    trainer.test(module, datamodule=ShardDataModule(manifest, spec, config.data, config.seed), verbose=False)
    if distributed.rank() == 0:
        _save(config, manifest, record, module)


def _save(config: Config, manifest: DatasetManifest, record: RunRecord, module: Classifier) -> None:
    assert module.metrics is not None
    split, metrics = manifest.evaluation_split, module.metrics
    dataset, answers = ShardDataset(manifest, split, spec_for(config, manifest), config=config.data), module.sums.answers()
    write_bytes(config.run_dir / PREDICTIONS, _predictions_table(dataset, manifest.class_names, module.predictions[0]))
    write_json(config.run_dir / RESULT, _result(config, manifest, record, metrics, answers))
    plots, tables = _draw_plots(config.run_dir, dataset, metrics, answers), [config.run_dir / PER_CLASS]
    write_bytes(tables[0], _per_class_table(metrics.per_class(manifest.class_names)))
    mistakes = save_mistakes(config.run_dir, dataset, answers)
    pictures = [config.run_dir / name for name in mistakes["image"]]
    tracker = open_tracker(config, record, status=None)
    # A figure without a step would be a point at step 0 of the validation curve.
    prefix = "test" if split == "test" else f"final_{split}"
    tracker.log_final({f"{prefix}/{name}": value for name, value in metrics.figures().items()})
    tracker.set_tags(describe(config, manifest, metrics))
    files = {"evaluation": [config.run_dir / RESULT, config.run_dir / PREDICTIONS], "plots": plots, "tables": tables}
    for folder, paths in files.items():
        for path in paths:
            tracker.log_file(path, folder)
    if pictures:
        tracker.log_table(MISTAKES_TABLE, mistakes, images=["image"])
    write_report(config, manifest, record, tracker)
    tracker.finish()
    outputs = [*itertools.chain.from_iterable(files.values()), *pictures]
    record.finish_stage("evaluate", record.inputs_of("evaluate", config, split), outputs)


def _result(config: Config, manifest: DatasetManifest, record: RunRecord, metrics: Metrics, answers: Answers) -> dict[str, Any]:
    """What test.json says."""
    assert record.best is not None
    split, names = manifest.evaluation_split, manifest.class_names
    has_matrix = manifest.task != "multi" and len(names) <= MOST_CLASSES_LISTED
    return {
        "split": split,
        "num_samples": metrics.num_samples,
        "num_bad_samples": metrics.num_bad,
        **metrics.figures(),
        "baselines": compare_with_baselines(config.run_dir, manifest.digest, split, metrics.accuracy),
        "recall": dict(zip(names, metrics.recall, strict=True)),
        "per_class": metrics.per_class(names),
        "reliability": metrics.reliability(),
        "confusion": confusion_of(answers, len(names), most=len(names)).counts.tolist() if has_matrix else None,
        "data_digest": manifest.digest,
        "checkpoint_sha256": record.best["sha256"],
    }


def _draw_plots(run_dir: Path, dataset: ShardDataset, metrics: Metrics, answers: Answers) -> list[Path]:
    of_what = f"{dataset.split_name} images"
    unit = "labels" if dataset.manifest.task == "multi" else "images"
    title = f"Reliability: ECE {metrics.ece:.4f} over {sum(metrics.confidences[0]):,} answers to {unit} of {dataset.split_name}"
    plots = {
        CONFUSION: draw_mistakes_by_class(dataset, answers, of_what),
        RELIABILITY: draw_reliability(metrics.reliability(), title),
    }
    for path, picture in plots.items():
        write_bytes(run_dir / path, picture)
    return [run_dir / path for path in plots]


def save_mistakes(run_dir: Path, dataset: ShardDataset, answers: Answers) -> dict[str, list[Any]]:
    """Leave thumbnails of the worst mistakes, and return a table of them, the worst first; those of before are removed."""
    worst, names = answers.most_wrong(MOST_MISTAKES), dataset.manifest.class_names
    paths = [MISTAKES / f"{index:07d}.png" for index in worst.index.tolist()]
    for old in set((run_dir / MISTAKES).glob("*.png")) - {run_dir / path for path in paths}:
        old.unlink()
    for index, path in zip(worst.index.tolist(), paths, strict=True):
        pixels = dataset.image(index).permute(1, 2, 0).numpy()  # (H, W, 3), as the network sees it
        write_bytes(run_dir / path, to_png(thumbnail(pixels, THUMBNAIL_SIDE)))
    return {
        "image": [str(path) for path in paths],
        "true": answer_texts(worst.label, names),
        "predicted": answer_texts(worst.predicted, names),
        "confidence": [round(value, 6) for value in worst.confidence.tolist()],
        "key": [dataset.key(index) for index in worst.index.tolist()],
    }


def describe(config: Config, manifest: DatasetManifest, metrics: Metrics) -> dict[str, str]:
    """The name and the description of the MLflow run: the result first, since its table of runs shows no figure."""
    split = manifest.evaluation_split
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.figures().items())
    return {
        "mlflow.runName": f"{metrics.accuracy:.4f} {config.name}",
        "mlflow.note.content": (
            f"**{split} accuracy {metrics.accuracy:.4f}** on {metrics.num_samples:,} images\n\n"
            f"| {split} | |\n|---|---:|\n{figures}\n\n"
            f"Data set: {manifest.folder.name}, {len(manifest.class_names)} classes, digest `{manifest.digest[:12]}`. "
            f"Pictures are in `plots/`, the mistakes in `tables/`, everything in the folder `{config.run_dir}`."
        ),
    }


def _per_class_table(rows: list[dict[str, Any]]) -> bytes:
    """One line a class; a cell is empty where there is nothing to divide by."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        row = {name: value for name, value in row.items() if value == value}  # nan is not itself
        writer.writerow({name: f"{value:.6f}" if isinstance(value, float) else value for name, value in row.items()})
    return table.getvalue().encode()


def _predictions_table(dataset: ShardDataset, class_names: list[str], predictions: torch.Tensor) -> bytes:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["index", "key", "label", "predicted", "confidence"])
    for number, *answer in predictions.tolist():  # (N, 3), or (N, 1 + K) with several labels an image
        index = int(number)
        label = label_text(dataset.labels(np.array([index]))[0], class_names)
        writer.writerow([index, dataset.key(index), label, *_answer_cells(dataset.manifest, answer)])
    return table.getvalue().encode()


def _answer_cells(manifest: DatasetManifest, answer: list[float]) -> tuple[str, str]:
    """What was predicted and how surely: a class, or every label of probability 0.5 or more."""
    if manifest.task != "multi":
        predicted, confidence = answer
        return manifest.class_names[int(predicted)], f"{confidence:.6f}"
    chosen = [number for number, probability in enumerate(answer) if probability >= 0.5]
    cells = [manifest.class_names[number] for number in chosen], [f"{answer[number]:.6f}" for number in chosen]
    return LABEL_SEPARATOR.join(cells[0]), LABEL_SEPARATOR.join(cells[1])
