"""Everything that would make a rank fail is tried here first, in one process, without Lightning."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline import accelerator
from pipeline.config import Config
from pipeline.data import native
from pipeline.data.cache import require_room
from pipeline.data.mixing import require_mixable
from pipeline.data.order import local_batch_size, training_steps_per_epoch
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DatasetManifest, require_labels
from pipeline.metrics import TOP
from pipeline.models.freezing import freeze_parameters, frozen
from pipeline.models.sequential import network_for, require_forward
from pipeline.preprocess import PreprocessSpec
from pipeline.pretraining import spec_for
from pipeline.task import Task, task_of
from pipeline.training.optim import build_optimizer, build_scheduler, may_fuse, scheduler_length


def require_trainable(config: Config, manifest: DatasetManifest, world_size: int) -> None:
    """Refuse, before any rank starts, everything that would make one fail. Raises ConfigError or DataError."""
    native.chosen(config.data.decoder)
    require_room(manifest, config.data)
    spec = spec_for(config, manifest)
    require_mixable(config.data.augment, local_batch_size(config.data.micro_batch_size, world_size))
    if "val" not in manifest.splits:
        raise DataError(
            f"{manifest.folder}: has no `val` split, which chooses the best checkpoint. "
            "Shard again with `dataset.val_fraction` above 0."
        )
    indexed = {"train", "val", manifest.evaluation_split} - set(manifest.streams)
    for split in sorted(indexed):
        if not manifest.split(split).num_samples:
            raise DataError(f"{manifest.folder}: its `{split}` split has no sample. Leave its shards out, or fill them.")
        require_labels(manifest, split)
    task = task_of(manifest, config)
    require_monitored(config, task)
    batches = training_steps_per_epoch(manifest, config.data)
    if not batches:
        raise DataError(
            f"{manifest.folder}: its train split has {manifest.split('train').samples_per_epoch} samples, fewer than "
            f"`data.global_batch_size` ({config.data.global_batch_size}). "
            "Use a smaller batch or `data.drop_last: false`."
        )
    accelerator.require_possible(config.trainer)
    steps, every = batches * config.trainer.max_epochs, config.trainer.validate_every_steps
    if every and every > steps:
        raise ConfigError(f"`trainer.validate_every_steps` is {every}, but the training takes {steps} steps: no validation.")
    if config.trainer.timeout_seconds <= config.data.timeout_seconds and config.data.num_workers:
        raise ConfigError(
            f"`trainer.timeout_seconds` ({config.trainer.timeout_seconds:g}) must be longer than `data.timeout_seconds` "
            f"({config.data.timeout_seconds:g}), or a slow loader is taken for a lost process."
        )
    network = network_for(config, manifest, spec)
    require_forward(network, spec)
    require_consistent(config, network)
    _require_parts_that_train(config, network)
    length = scheduler_length(config.scheduler, batches * config.trainer.max_epochs, config.trainer.max_epochs)
    _require_steps(config, network, spec, length)


def require_consistent(config: Config, network: nn.Module) -> None:
    """Refuse settings that work alone and not together, and a compiler that does not work here. Raises ConfigError."""
    if config.trainer.sync_batchnorm and not any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise ConfigError("`trainer.sync_batchnorm` has no BatchNorm to synchronise in this network. Leave it out.")
    trainer, is_fused = config.trainer, config.optimizer.args.get("fused")
    if is_fused and trainer.precision == "16-mixed":
        raise ConfigError(
            "`optimizer.args.fused` hides the true gradients of `trainer.precision` 16-mixed from the watch for what is not "
            "finite. Leave `fused` out, or use bf16-mixed."
        )
    if is_fused and trainer.precision != "32-true" and trainer.gradient_clip_norm:
        raise ConfigError(
            f"`optimizer.args.fused` excludes `trainer.gradient_clip_norm` where `trainer.precision` is {trainer.precision} "
            "(Lightning's rule). Leave one of them out."
        )
    if config.trainer.compile:
        require_compiler()


def _require_parts_that_train(config: Config, network: nn.Module) -> None:
    """Freeze what never trains. Raises ConfigError when an epoch would train nothing, or a part would begin after the last."""
    model, num_epochs = config.model, config.trainer.max_epochs
    for part, epoch in model.unfreeze.items():
        if epoch >= num_epochs:
            raise ConfigError(
                f"`model.unfreeze` lets {part} train from epoch {epoch} on, counted from 0, but there are {num_epochs} epochs. "
                "Begin earlier, or leave it to `model.freeze`."
            )
    for epoch in sorted({0, *model.unfreeze.values()}):
        freeze_parameters(network, frozen(model, epoch))
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ConfigError(f"`model.freeze` and `model.unfreeze` leave nothing to train in epoch {epoch}.")


def require_compiler() -> None:
    """Compile a sum. Raises ConfigError with the reason where that does not work."""
    try:
        torch.compile(torch.add)(torch.ones(8, device=accelerator.device()), 1.0)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"`trainer.compile` does not work on this machine: {reason}. Set it to false.") from error


def require_monitored(config: Config, task: Task) -> None:
    """Refuse a monitor that this task does not have. Raises ConfigError."""
    if config.trainer.monitor == "val/top5" and (task.kind != "single" or task.num_classes <= TOP):
        raise ConfigError("`trainer.monitor` is val/top5, which needs more than 5 classes and one label an image.")


def _require_steps(config: Config, network: nn.Sequential, spec: PreprocessSpec, length: int) -> None:
    """Let optimizer and scheduler take a step or two where training will: some only then say what they cannot do."""
    assert spec.fixed_size is not None
    device = accelerator.device()
    network.to(device)
    optimizer = build_optimizer(network, config.optimizer, fuse=may_fuse(config.trainer, config.model))
    scheduler = build_scheduler(optimizer, config.scheduler, length, config.trainer.monitor)
    images = torch.zeros(2, 3, *spec.fixed_size, dtype=torch.uint8, device=device)
    for _ in range(min(2, length)):
        optimizer.zero_grad()
        torch.autograd.backward(network(images).square().sum())
        try:
            optimizer.step()
        except Exception as error:
            raise ConfigError(f"`optimizer`: {config.optimizer.name} cannot take a step: {error}.") from error
        try:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(1.0)
            elif scheduler is not None:
                scheduler.step()
        except Exception as error:
            raise ConfigError(f"`scheduler`: {config.scheduler.name} cannot take a step: {error}.") from error
