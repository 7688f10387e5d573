"""`shardline train` as one rank: Lightning's Trainer around the classifier, from the last checkpoint if there is one."""

import logging
import time
import warnings
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from pipeline import distributed
from pipeline.config import Config
from pipeline.console import say
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.labels import TRADE_OFFS
from pipeline.data.order import training_steps_per_epoch
from pipeline.errors import RunError, StoppedError
from pipeline.files import locked, sha256_of
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.models.sequential import build_network, count_parameters
from pipeline.preprocess import PreprocessSpec, spec_for
from pipeline.run import BEST, LAST, RunRecord, open_run
from pipeline.tracking.run import RunTracker, open_tracker
from pipeline.training.bad_samples import BadSampleLedger
from pipeline.training.callbacks import ShowProgress, TrainingCurves, WarmUpBuckets
from pipeline.training.checkpoint import identity_of, load_checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter, DurableCheckpointIO
from pipeline.training.classifier import Classifier
from pipeline.training.preemption import StopOnSignal

# A rank that waits longer than this for another will never see it again.
COLLECTIVE_TIMEOUT = timedelta(minutes=5)
WRITER_WAIT_SECONDS = 30.0


def build_trainer(config: Config, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A Lightning Trainer with DDP over the ranks that a launcher started: NCCL and GPUs where there are any, else gloo.

    Everything of the training that differs by accelerator is decided here or by Lightning.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    local = distributed.local_world_size()
    return L.Trainer(
        accelerator="cuda" if torch.cuda.device_count() else "cpu",
        devices=local,
        num_nodes=distributed.world_size() // local,
        strategy=DDPStrategy(timeout=COLLECTIVE_TIMEOUT, checkpoint_io=DurableCheckpointIO()),
        precision=config.trainer.precision,
        deterministic=config.trainer.deterministic,
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=config.run_dir,
        **options,
    )


def describe_world(trainer: L.Trainer) -> str:
    """How many processes on what, in words: `2 DDP processes (gloo, cpu)`."""
    device = trainer.strategy.root_device.type
    backend = "nccl" if device == "cuda" else "gloo"
    number = trainer.world_size
    return f"{number} DDP process{'es' if number > 1 else ''} ({backend}, {device})"


def fit(config: Config) -> None:
    """Train as one rank, from the last checkpoint of the run if there is one."""
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    if distributed.rank() == 0:
        # A killed predecessor's rank may take a moment to die; it must not write beside this one.
        with locked(config.run_dir.with_name(f"{config.name}.writer"), wait_seconds=WRITER_WAIT_SECONDS):
            record, spec = open_run(config, manifest)
            record.world_size, record.outcome = distributed.world_size(), "running"
            record.save()
            _fit_recorded(config, manifest, spec, record)
    else:
        record, spec = wait_for_run(config, manifest)
        _fit_rank(config, manifest, spec, record, tracker=None)


def wait_for_run(config: Config, manifest: DatasetManifest) -> tuple[RunRecord, PreprocessSpec]:
    """On ranks other than 0: the record, once rank 0 has it in place for this configuration and data."""
    spec = spec_for(config.preprocess, manifest)
    wanted = (config.identity(), manifest.digest, spec.hash())
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        record = RunRecord.load(config.run_dir)
        if record is not None and record.identity == wanted:
            return record, spec
        time.sleep(0.2)
    raise RunError(f"{config.run_dir}: rank 0 made no run there in {COLLECTIVE_TIMEOUT}. Do all ranks see one file system?")


def _fit_recorded(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, record: RunRecord) -> None:
    """Rank 0's part: the same training, with its outcome in run.json and MLflow."""
    tracker = open_tracker(config, record)
    try:
        steps, best_value = _fit_rank(config, manifest, spec, record, tracker)
    except StoppedError:
        record.outcome = "stopped"
        record.save()
        tracker.finish("KILLED")
        raise
    except BaseException:
        record.outcome = "failed"
        record.save()
        tracker.finish("FAILED")
        raise
    best = config.run_dir / BEST
    record.steps, record.outcome = steps, "done"
    record.best = {
        "path": str(BEST),
        "sha256": sha256_of(best),
        "monitor": config.trainer.monitor,
        "value": best_value,
    }
    inputs = record.inputs_of("train", config, manifest.evaluation_split)
    record.finish_stage("train", inputs, [best])
    tracker.finish()


def _fit_rank(
    config: Config, manifest: DatasetManifest, spec: PreprocessSpec, record: RunRecord, tracker: RunTracker | None
) -> tuple[int, float | None]:
    """Build everything, train to the end, and return (global step, best value of the monitor)."""
    assert spec.fixed_size is not None
    L.seed_everything(config.seed, verbose=False)
    network = build_network(config.model, len(manifest.class_names), spec)
    batches = training_steps_per_epoch(manifest, config.data)
    module = Classifier(network, config, len(manifest.class_names), total_steps=batches * config.trainer.max_epochs)
    writer = CheckpointWriter(config, manifest, identity_of(record), config.run_dir)
    ledger = BadSampleLedger(config.run_dir, config.data)
    callbacks = [
        WarmUpBuckets(spec.fixed_size),
        ledger,
        TrainingCurves(tracker, manifest.class_names, config.trainer.log_every_steps, ledger),
        ShowProgress(),
        writer,
        StopOnSignal(writer),
    ]
    trainer = build_trainer(
        config,
        callbacks,
        max_epochs=config.trainer.max_epochs,
        gradient_clip_val=config.trainer.gradient_clip_norm,
    )
    last = config.run_dir / LAST
    resume = load_checkpoint(last, record)["shardline"] if last.is_file() else None
    if trainer.is_global_zero:
        place = f", going on after step {resume['global_step']}" if resume else ""
        say(f"training {config.name} on {describe_world(trainer)}{place}: {count_parameters(network):,} parameters")
        if manifest.streams:
            say(f"{manifest.folder}: {TRADE_OFFS}")
    data = ShardDataModule(manifest, spec, config.data, config.seed)
    trainer.fit(module, datamodule=data, ckpt_path=last if resume else None, weights_only=True)
    return trainer.global_step, writer.best_value
