"""Everything that would make a rank fail is tried here first, in one process, without Lightning."""

import torch

from pipeline.config import Config
from pipeline.data.order import local_batch_size
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DatasetManifest, open_index
from pipeline.models.sequential import build_network, require_forward
from pipeline.preprocess import build_spec
from pipeline.task import require_supported
from pipeline.training.optim import build_optimizer, build_scheduler


def require_trainable(config: Config, manifest: DatasetManifest, world_size: int) -> None:
    """Refuse, before any rank starts, everything that would make one fail. Raises ConfigError or DataError."""
    require_supported(manifest.task)
    spec = build_spec(config.preprocess, manifest.image_stats)
    local_batch_size(config.data.global_batch_size, world_size)
    for split in ("train", "val", manifest.evaluation_split):
        open_index(manifest, split)
    num_samples = manifest.split("train").num_samples
    if config.data.drop_last and num_samples < config.data.global_batch_size:
        raise DataError(
            f"{manifest.folder}: its train split has {num_samples} samples, fewer than `data.global_batch_size` "
            f"({config.data.global_batch_size}). Use a smaller batch or `data.drop_last: false`."
        )
    if config.trainer.precision == "16-mixed" and not torch.cuda.is_available():
        raise ConfigError("`trainer.precision` 16-mixed needs a GPU. Use 32-true.")
    network = build_network(config.model, len(manifest.class_names), spec)
    require_forward(network, spec)
    optimizer = build_optimizer(network, config.optimizer)
    build_scheduler(optimizer, config.scheduler, total_steps=1000, monitor=config.trainer.monitor)
