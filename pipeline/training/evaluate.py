"""`shardline evaluate`: the best checkpoint on every sample of the test split, exactly once over all ranks."""

import csv
import io
from datetime import timedelta
from pathlib import Path

import torch

from pipeline import distributed
from pipeline.config import Config
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.dataset import ShardDataset
from pipeline.files import write_bytes, write_json
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.models.sequential import build_network
from pipeline.preprocess import spec_for
from pipeline.recipe.baselines import compare_with_baselines
from pipeline.run import RunRecord, require_run
from pipeline.task import Metrics
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
    network = build_network(config.model, len(manifest.class_names), spec)
    network.load_state_dict(load_network_weights(record.best_checkpoint(), record))
    module = Classifier(network, config, len(manifest.class_names), total_steps=0)
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
        "accuracy": metrics.accuracy,
        "loss": metrics.loss,
        "baselines": compare_with_baselines(config.run_dir, manifest.digest, split, metrics.accuracy),
        "recall": dict(zip(manifest.class_names, metrics.recall, strict=True)),
        "data_digest": manifest.digest,
        "checkpoint_sha256": record.best["sha256"],
    }
    dataset = ShardDataset(manifest, split, spec_for(config.preprocess, manifest), config=config.data)
    write_bytes(config.run_dir / PREDICTIONS, _predictions_table(dataset, manifest.class_names, predictions))
    write_json(config.run_dir / RESULT, result)
    outputs = [config.run_dir / RESULT, config.run_dir / PREDICTIONS]
    tracker = open_tracker(config, record)
    # A figure without a step would be a point at step 0 of the validation curve.
    prefix = "test" if split == "test" else f"final_{split}"
    figures = {f"{prefix}/accuracy": metrics.accuracy, f"{prefix}/loss": metrics.loss}
    tracker.log_final(figures, f"**{split} accuracy {metrics.accuracy:.4f}** on {metrics.num_samples:,} images")
    for path in outputs:
        tracker.log_file(path, "evaluation")
    tracker.finish()
    record.finish_stage("evaluate", record.inputs_of("evaluate", config, split), outputs)


def _predictions_table(dataset: ShardDataset, class_names: list[str], predictions: torch.Tensor) -> bytes:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["index", "key", "label", "predicted", "confidence"])
    for index, label, predicted, confidence in predictions.tolist():  # (N, 4)
        row = [int(index), dataset.key(int(index)), class_names[int(label)], class_names[int(predicted)]]
        writer.writerow([*row, f"{confidence:.6f}"])
    return table.getvalue().encode()
