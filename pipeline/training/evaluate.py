"""`shardline evaluate`: the best checkpoint on every sample of the test split, exactly once over all ranks."""

import csv
import io
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from pipeline import distributed
from pipeline.config import Config
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.dataset import ShardDataset
from pipeline.files import write_bytes, write_json
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.metrics import Metrics
from pipeline.models.sequential import network_for
from pipeline.pretraining import spec_for
from pipeline.recipe.baselines import compare_with_baselines
from pipeline.run import RunRecord, require_run
from pipeline.task import LABEL_SEPARATOR, label_text, task_of
from pipeline.tracking.run import open_tracker
from pipeline.training.checkpoint import load_network_weights
from pipeline.training.classifier import Classifier
from pipeline.training.fit import build_trainer

RESULT = Path("evaluation/test.json")
PREDICTIONS = Path("evaluation/predictions.csv")


def evaluate(config: Config) -> None:
    """Evaluate as one rank; rank 0 writes test.json and predictions.csv and tells MLflow."""
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
        assert module.metrics is not None
        _save(config, manifest, record, module.metrics, module.predictions[0])


def _save(config: Config, manifest: DatasetManifest, record: RunRecord, metrics: Metrics, predictions: torch.Tensor) -> None:
    assert record.best is not None
    split = manifest.evaluation_split
    result = {
        "split": split,
        "num_samples": metrics.num_samples,
        "num_bad_samples": metrics.num_bad,
        **metrics.figures(),
        "baselines": compare_with_baselines(config.run_dir, manifest.digest, split, metrics.accuracy),
        "recall": dict(zip(manifest.class_names, metrics.recall, strict=True)),
        "data_digest": manifest.digest,
        "checkpoint_sha256": record.best["sha256"],
    }
    dataset = ShardDataset(manifest, split, spec_for(config, manifest), config=config.data)
    write_bytes(config.run_dir / PREDICTIONS, _predictions_table(dataset, manifest.class_names, predictions))
    write_json(config.run_dir / RESULT, result)
    outputs = [config.run_dir / RESULT, config.run_dir / PREDICTIONS]
    tracker = open_tracker(config, record, status=None)
    # A figure without a step would be a point at step 0 of the validation curve.
    prefix = "test" if split == "test" else f"final_{split}"
    figures = {f"{prefix}/{name}": value for name, value in metrics.figures().items()}
    tracker.log_final(figures)
    tracker.set_tags({"mlflow.note.content": f"**{split} accuracy {metrics.accuracy:.4f}** on {metrics.num_samples:,} images"})
    for path in outputs:
        tracker.log_file(path, "evaluation")
    tracker.finish()
    record.finish_stage("evaluate", record.inputs_of("evaluate", config, split), outputs)


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
