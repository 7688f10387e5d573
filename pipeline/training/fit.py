"""`shardline train` as one rank: Lightning's Trainer around the classifier, from the last checkpoint if there is one."""

import contextlib
import logging
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from pipeline import accelerator, distributed
from pipeline.config import Config
from pipeline.console import say
from pipeline.data import native
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.dataset import MAX_OPEN
from pipeline.data.labels import TRADE_OFFS
from pipeline.data.order import training_steps_per_epoch
from pipeline.data.pixel_changes import build_pixel_changes
from pipeline.errors import RunError, StoppedError
from pipeline.files import allow_open_files, locked, sha256_of
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.models.sequential import count_parameters, network_for
from pipeline.preprocess import PreprocessSpec
from pipeline.pretraining import spec_for
from pipeline.recipe.dynamics import Dynamics
from pipeline.run import RunRecord, open_run
from pipeline.task import task_of
from pipeline.tracking.run import RunTracker, open_tracker
from pipeline.tracking.system import start_sampling
from pipeline.training.bad_samples import BadSampleLedger
from pipeline.training.callbacks import ShowProgress, TrainingCurves, WarmUpBuckets
from pipeline.training.checkpoint import identity_of, newest_checkpoint, remove_temporary, require_intact
from pipeline.training.checkpoint_writer import CheckpointWriter, DurableCheckpointIO
from pipeline.training.classifier import Classifier
from pipeline.training.compiling import choose_compiled
from pipeline.training.every_step import EveryStep
from pipeline.training.monitors import StepMonitor
from pipeline.training.performance import NoProfiler, StepTimes
from pipeline.training.pictures import Pictures
from pipeline.training.preemption import StopOnSignal
from pipeline.training.resume import MoveCursor, say_what_differs
from pipeline.training.unfreezing import Unfreezing

# A network file system gives up the lock of a dead node only after a lease.
WRITER_WAIT_SECONDS = 120.0


def build_trainer(config: Config, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A Lightning Trainer, with DDP over the ranks that a launcher started, which have met in `distributed.join_group`.

    One process alone has nothing to average, and does without DDP's 130 us a step and its copy of the gradients.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    # Deterministic algorithms also fill each new tensor with nan, to show who reads what nobody wrote: that only takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    clocks = [callback.clock for callback in callbacks if isinstance(callback, StepTimes)]
    local, storage = distributed.local_world_size(), DurableCheckpointIO()
    strategy: Strategy = SingleDeviceStrategy(accelerator.device(), checkpoint_io=storage)
    if distributed.world_size() > 1:
        strategy = DDPStrategy(checkpoint_io=storage, find_unused_parameters=bool(config.model.unfreeze))
    return L.Trainer(
        accelerator=accelerator.kind(),
        devices=local,
        num_nodes=distributed.world_size() // local,
        strategy=strategy,
        sync_batchnorm=config.trainer.sync_batchnorm,
        precision=config.trainer.precision,
        deterministic=config.trainer.deterministic,
        callbacks=[*callbacks, EveryStep(callbacks)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        profiler=clocks[0] if clocks else NoProfiler(),
        default_root_dir=config.run_dir,
        **options,
    )


def prepare_network(network: nn.Module, config: Config, size: tuple[int, int], before: dict[str, Any] | None = None) -> bool:
    """Lay the weights out as the settings say, and have the network compiled at its first step if that wins: whether it is.

    Images (H, W) of `size` come from the loader with their channels together in any case, and each layer keeps the layout of
    its input where its weights have it too. `Module.compile` keeps the names in checkpoints, which torch.compile would change.
    """
    if config.trainer.channels_last:
        network.to(memory_format=torch.channels_last)
    is_compiled = choose_compiled(config, network, size, before)
    if is_compiled:
        network.compile()
    return is_compiled


def describe_world(trainer: L.Trainer) -> str:
    """How many processes on what, in words: `2 DDP processes (gloo, cpu)`."""
    device = trainer.strategy.root_device.type
    if trainer.world_size == 1:
        return f"1 process ({device})"
    return f"{trainer.world_size} DDP processes ({'nccl' if device == 'cuda' else 'gloo'}, {device})"


def fit(config: Config, *, allow_changes: bool = False) -> None:
    """Train as one rank, from the newest whole checkpoint of the run if there is one."""
    distributed.join_group(timedelta(seconds=config.trainer.timeout_seconds))
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    if distributed.rank():
        with watched_machine(config.run_dir):
            _fit_rank(config, manifest, None, tracker=None)
        return
    # A killed predecessor's rank may take a moment to die; it must not write beside this one.
    with locked(config.run_dir.with_name(f"{config.name}.writer"), wait_seconds=WRITER_WAIT_SECONDS):
        record, _ = open_run(config, manifest, allow_changes=allow_changes)
        record.world_size, record.outcome = distributed.world_size(), "running"
        record.save()
        _fit_recorded(config, manifest, record)


def watched_machine(run_dir: Path) -> contextlib.AbstractContextManager[Any]:
    """The first rank of each further machine has that one's load written down; rank 0's deliverer does so for its own."""
    is_first_here = distributed.rank() and not distributed.local_rank()
    return start_sampling(run_dir) if is_first_here else contextlib.nullcontext()


def _fit_recorded(config: Config, manifest: DatasetManifest, record: RunRecord) -> None:
    """Rank 0's part: the same training, with its outcome in run.json and MLflow."""
    tracker = open_tracker(config, record, manifest=manifest)
    try:
        steps, writer = _fit_rank(config, manifest, record, tracker)
    except BaseException as error:
        is_stop = isinstance(error, StoppedError)
        record.outcome = "stopped" if is_stop else "failed"
        # What ended the training may refuse these as well, a full disk for one, and is what has to be told.
        with contextlib.suppress(Exception):
            record.save()
        with contextlib.suppress(Exception):
            tracker.finish("KILLED" if is_stop else "FAILED")
        raise
    if not writer.ranking:
        raise RunError(f"{config.run_dir}: its best checkpoint was damaged, and no validation was left. Train with --fresh.")
    best = writer.best_path
    require_intact(best)
    record.steps, record.outcome = steps, "done"
    record.best = {
        "path": str(best.relative_to(config.run_dir)),
        "sha256": sha256_of(best),
        "monitor": config.trainer.monitor,
        "value": writer.best_value,
    }
    inputs = record.inputs_of("train", config, manifest.evaluation_split)
    record.finish_stage("train", inputs, [best])
    tracker.finish()


def _fit_rank(
    config: Config, manifest: DatasetManifest, record: RunRecord | None, tracker: RunTracker | None
) -> tuple[int, CheckpointWriter]:
    """Build everything, train to the end, and return the global step and what is known of the best. Rank 0 has the record."""
    allow_open_files(1024 + MAX_OPEN * config.data.num_workers)
    identity, resume, before = _agree_on_start(config, record)
    spec = spec_for(config, manifest)
    assert spec.fixed_size is not None
    L.seed_everything(config.seed, verbose=False)
    task = task_of(manifest, config)
    network = network_for(config, manifest, spec)
    steps_per_epoch = training_steps_per_epoch(manifest, config.data)
    changes = build_pixel_changes(config.data.augment, spec)
    module = Classifier(network, config, task, steps_per_epoch * config.trainer.max_epochs, changes)
    writer = CheckpointWriter(config, manifest, identity, config.run_dir, before["lost"] if before else ())
    trainer = build_trainer(config, build_callbacks(config, manifest, spec, writer, tracker), **training_options(config))
    # The trainer has made torch deterministic or not, and with that other programs.
    writer.is_compiled = prepare_network(network, config, spec.fixed_size, before)
    if trainer.is_global_zero:
        place = f", going on after step {before['global_step']}" if before else ""
        say(f"training {config.name} on {describe_world(trainer)}{place}: {count_parameters(network):,} parameters")
        say_what_differs(config, before, trainer.world_size)
        if config.data.augment.crop_scale < 1:
            say(f"crops are decoded by {native.describe(config.data.decoder)}")
        if manifest.streams:
            say(f"{manifest.folder}: {TRADE_OFFS}")
    data = ShardDataModule(manifest, spec, config.data, config.seed)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer.global_step, writer


def build_callbacks(
    config: Config, manifest: DatasetManifest, spec: PreprocessSpec, writer: CheckpointWriter, tracker: RunTracker | None
) -> list[L.Callback]:
    """What happens around the steps, in the order in which Lightning calls it: measure, average, report, save, stop."""
    assert spec.fixed_size is not None
    ledger, monitor = BadSampleLedger(config.run_dir, config.data), StepMonitor(config)
    dynamics = Dynamics(config, manifest, spec, task_of(manifest, config), tracker)
    return [
        *([WarmUpBuckets(spec.fixed_size)] if distributed.world_size() > 1 else []),
        *([Unfreezing(config.model, config.trainer.max_epochs)] if config.model.freeze or config.model.unfreeze else []),
        ledger,
        monitor,
        *([EMAWeightAveraging(decay=config.trainer.ema_decay)] if config.trainer.ema_decay else []),
        dynamics,
        *([Pictures(dynamics, tracker)] if tracker is not None else []),
        TrainingCurves(tracker, manifest.class_names, config.trainer.log_every_steps, ledger, monitor),
        ShowProgress(),
        MoveCursor(config, training_steps_per_epoch(manifest, config.data)),
        writer,
        StopOnSignal(writer),
        *([StepTimes(config, tracker)] if tracker is not None else []),
    ]


def training_options(config: Config) -> dict[str, Any]:
    """What a Lightning Trainer is told of the training itself."""
    every = config.trainer.validate_every_steps
    return {
        "max_epochs": config.trainer.max_epochs,
        "gradient_clip_val": config.trainer.gradient_clip_norm,
        "accumulate_grad_batches": config.data.accumulate,
        "val_check_interval": every * config.data.accumulate if every else None,
        "check_val_every_n_epoch": None if every else 1,
    }


def _agree_on_start(
    config: Config, record: RunRecord | None
) -> tuple[dict[str, str | None], Path | None, dict[str, Any] | None]:
    """The run's identity, the checkpoint to go on from, and what that says of itself: rank 0 decides for all.

    Each rank choosing for itself could choose another file where the file system shows them at different times.
    """
    decision: list[Any] = [None]
    if record is not None:
        remove_temporary(config.run_dir)
        newest = newest_checkpoint(config.run_dir, record)
        decision = [(identity_of(record), *(newest or (None, None)))]
    if dist.is_initialized():
        dist.broadcast_object_list(decision, src=0)
    identity, path, facts = decision[0]
    return identity, path, facts
