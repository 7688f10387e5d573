"""Checkpoints on disk: what one says about itself, how one is proved whole, and which one a run goes on from.

RUN/checkpoints/step-N.ckpt has its sha256 beside it (`sha256sum -c` reads it), written before the checkpoint gets its name.
`last.ckpt` and `best.ckpt` are links for people; nothing here follows them. Files are read as tensors and plain values only,
never code. Nothing here needs Lightning, whose import takes ten seconds, so that `export` does not wait for it.
"""

from pathlib import Path
from typing import Any

import torch

from pipeline.console import say
from pipeline.errors import RunError
from pipeline.files import sha256_of
from pipeline.manifest import FORMAT_VERSION
from pipeline.run import LAST, RunRecord

IDENTITY = ("config_digest", "data_digest", "preprocess_hash")
NETWORK_PREFIX = "network."
NAME = "step-{:08d}.ckpt"


def identity_of(record: RunRecord) -> dict[str, str | None]:
    """What a checkpoint must share with the run that it is resumed in, and the run that it came from."""
    return {
        "config_digest": record.config_digest,
        "data_digest": record.data_digest,
        "preprocess_hash": record.preprocess_hash,
        "job_id": record.job_id,
        "run_id": record.mlflow["run_id"],
    }


# ---- the files ----


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after a global step lies."""
    return run_dir / LAST.parent / NAME.format(step)


def checksum_path(path: Path) -> Path:
    """The file beside a checkpoint that holds its sha256, as `sha256sum` writes it."""
    return path.with_name(f"{path.name}.sha256")


def step_of(path: Path) -> int:
    """The global step in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def checkpoints_in(run_dir: Path) -> list[Path]:
    """Every checkpoint of a run, the newest first."""
    return sorted((run_dir / LAST.parent).glob("step-*[0-9].ckpt"), key=step_of, reverse=True)


def require_intact(path: Path) -> None:
    """Compare a checkpoint's bytes with the sha256 beside it. Raises RunError."""
    beside = checksum_path(path)
    if not beside.is_file():
        raise RunError(f"{path}: has no {beside.name} beside it, so it is none of this run's.")
    expected = beside.read_text().split(" ", 1)[0]
    found = sha256_of(path)
    if found != expected:
        raise RunError(
            f"{path}: is damaged: its sha256 is {found[:12]}, but {expected[:12]} was saved "
            f"({path.stat().st_size:,} bytes are there)."
        )


def newest_checkpoint(run_dir: Path, record: RunRecord) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole and of this run, and what it says of itself; each one refused is said by name.

    Returns None where there is none. Raises RunError where there are some and all are refused.
    """
    refused = []
    for path in checkpoints_in(run_dir):
        try:
            require_intact(path)
            facts = load_checkpoint(path, record)["shardline"]
        except (RunError, OSError) as error:
            say(f"refused {error}")
            refused.append(path.name)
            continue
        if refused:
            say(f"{path}: the one before is whole; going on from it")
        return path, {**facts, "lost": _lost_of(run_dir, facts.get("ranking", []))}
    if refused:
        raise RunError(
            f"{run_dir / LAST.parent}: none of its checkpoints can be used ({', '.join(refused)}). "
            "Put one back, or start anew with --fresh."
        )
    return None


def _lost_of(run_dir: Path, ranking: list[list[float]]) -> list[int]:
    """Steps of the best checkpoints so far that are no longer whole; each is said by name."""
    lost = []
    for _, step in ranking:
        try:
            require_intact(checkpoint_path(run_dir, int(step)))
        except (RunError, OSError) as error:
            say(f"refused {error} It was among the best; the next validations choose another.")
            lost.append(int(step))
    return lost


def remove_temporary(run_dir: Path) -> None:
    """Remove what a kill in the middle of a save left; the caller is the run's only writer."""
    for path in (run_dir / LAST.parent).glob(".step-*.tmp"):
        path.unlink()


# ---- the content ----


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
    found = [facts[name] for name in IDENTITY]
    if found in ([*record.identity], *record.earlier):
        return checkpoint
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
    return {key.removeprefix(NETWORK_PREFIX): tensor for key, tensor in weights.items() if key.startswith(NETWORK_PREFIX)}
