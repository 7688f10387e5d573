"""What a checkpoint says about itself, and how one is read again: tensors and plain values only, never code.

Nothing here needs Lightning, whose import takes ten seconds, so that `export` does not wait for it.
"""

from pathlib import Path
from typing import Any

import torch

from pipeline.errors import RunError
from pipeline.manifest import FORMAT_VERSION
from pipeline.run import RunRecord

IDENTITY = ("config_digest", "data_digest", "preprocess_hash")
NETWORK_PREFIX = "network."


def identity_of(record: RunRecord) -> dict[str, str | None]:
    """What a checkpoint must share with the run that it is resumed in, and the run that it came from."""
    return {
        "config_digest": record.config_digest,
        "data_digest": record.data_digest,
        "preprocess_hash": record.preprocess_hash,
        "job_id": record.job_id,
        "run_id": record.mlflow["run_id"],
    }


def load_checkpoint(path: Path, record: RunRecord) -> dict[str, Any]:
    """Read a checkpoint of this run, tensors and plain values only. Raises RunError for a broken or foreign one."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        facts = {name: checkpoint["shardline"][name] for name in ("format_version", *IDENTITY)}
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise RunError(f"{path}: cannot be read as a Shardline checkpoint ({reason}). Use --fresh to start anew.") from error
    if facts["format_version"] > FORMAT_VERSION:
        raise RunError(f"{path}: format_version {facts['format_version']} is newer than this Shardline reads. Upgrade it.")
    for name in IDENTITY:
        if facts[name] != getattr(record, name):
            raise RunError(
                f"{path}: its {name} is {facts[name][:12]}, but the run's is {getattr(record, name)[:12]}. "
                "It belongs to another run: move it away, or use --fresh."
            )
    return checkpoint


def load_network_weights(path: Path, record: RunRecord) -> dict[str, torch.Tensor]:
    """The network's part of a checkpoint of this run, as its state dict. Raises RunError."""
    weights: dict[str, torch.Tensor] = load_checkpoint(path, record)["state_dict"]
    return {key.removeprefix(NETWORK_PREFIX): tensor for key, tensor in weights.items()}
