"""RUN/run.json: what a run is, how far it got, and which files each stage left there.

A stage whose inputs are unchanged is skipped; a run whose configuration or data changed is moved aside, never deleted.
"""

import dataclasses
import datetime
import os
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pipeline.config import Config, changed_settings
from pipeline.console import say
from pipeline.errors import RunError
from pipeline.files import digest_of, move_aside, sha256_of, write_bytes, write_json
from pipeline.manifest import FORMAT_VERSION, DatasetManifest, read_versioned_json
from pipeline.preprocess import PreprocessSpec
from pipeline.pretraining import spec_for, weights_sha256

RUN_NAME = "run.json"
CONFIG_NAME = "config.yaml"
LAST = Path("checkpoints/last.ckpt")
BEST = Path("checkpoints/best.ckpt")
EVALUATION = "evaluation/test.json"
Outcome = Literal["running", "done", "stopped", "failed"]
Stage = Literal["check", "train", "evaluate", "export", "targets"]


@dataclass
class RunRecord:
    """run.json. `config_digest` covers the settings that can change the trained weights."""

    name: str
    job_id: str
    config_digest: str
    data_digest: str
    preprocess_hash: str
    git: dict[str, Any]
    weights_sha256: str | None = None  # of the file of pretrained weights
    mlflow: dict[str, str | None] = field(default_factory=lambda: {"uri": None, "experiment": None, "run_id": None})
    world_size: int | None = None
    outcome: Outcome = "running"
    steps: int = 0
    best: dict[str, Any] | None = None
    earlier: list[list[str]] = field(default_factory=list)  # identities that --allow-changes left behind
    stages: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    folder: Path = Path()

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read RUN/run.json; None where there is none."""
        path = folder / RUN_NAME
        if not path.is_file():
            return None
        try:
            return cls(**{**read_versioned_json(path), "folder": folder})
        except TypeError as error:
            raise RunError(f"{path}: not a run record ({error}). Move the folder away and start again.") from error

    @classmethod
    def require(cls, folder: Path) -> Self:
        """Read RUN/run.json. Raises RunError where there is none."""
        record = cls.load(folder)
        if record is None:
            raise RunError(f"{folder}: no run there (no {RUN_NAME}). Run `shardline train` first.")
        return record

    def save(self) -> None:
        """Write run.json atomically."""
        values = dataclasses.asdict(self)
        del values["folder"]
        write_json(self.folder / RUN_NAME, values)

    def finish_stage(self, stage: Stage, inputs_digest: str, outputs: list[Path]) -> None:
        """Record a stage as done, with the sha256 of every file that it left, and save."""
        self.stages[stage] = {
            "inputs_digest": inputs_digest,
            "outputs": {os.fspath(path.relative_to(self.folder)): sha256_of(path) for path in outputs},
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self.save()

    def stage_is_done(self, stage: Stage, inputs_digest: str) -> bool:
        """Whether the stage ran on exactly these inputs and its files are still what it left."""
        entry = self.stages.get(stage)
        if entry is None or entry["inputs_digest"] != inputs_digest:
            return False
        outputs = {self.folder / name: sha256 for name, sha256 in entry["outputs"].items()}
        return all(path.is_file() and sha256_of(path) == sha256 for path, sha256 in outputs.items())

    @property
    def identity(self) -> tuple[str, str, str]:
        """What makes this run another than all others: configuration, data and preprocessing."""
        return self.config_digest, self.data_digest, self.preprocess_hash

    def inputs_of(self, stage: Stage, config: Config, evaluation_split: str) -> str:
        """Digest of everything that the stage's outcome depends on."""
        export = dataclasses.asdict(config.export)
        evaluated = self.stages.get("evaluate", {}).get("outputs", {}).get(EVALUATION)  # the file holds its figures
        targets = sorted(set(export.pop("targets")))  # copies of what is exported, which they do not change
        inputs: dict[Stage, list[Any]] = {
            "check": [self.identity, config.check.skip],
            "train": [self.identity],
            "evaluate": [self.best, evaluation_split],
            "export": [self.best, evaluation_split, export, evaluated],
            "targets": [self.stages.get("export", {}).get("outputs"), targets],
        }
        return digest_of(inputs[stage])

    def best_checkpoint(self) -> Path:
        """Path of the best checkpoint of a finished training. Raises RunError when there is none or it was changed."""
        if self.outcome != "done" or self.best is None:
            raise RunError(f"{self.folder}: training has not finished ({self.outcome}). Run `shardline train`.")
        path = self.folder / str(self.best["path"])
        if not path.is_file():
            raise RunError(f"{path}: the best checkpoint is gone. Run `shardline train --fresh`.")
        if sha256_of(path) != self.best["sha256"]:
            raise RunError(f"{path}: is not the file that training left. Run `shardline train --fresh`.")
        return path


def open_run(
    config: Config, manifest: DatasetManifest, *, fresh: bool = False, allow_changes: bool = False
) -> tuple[RunRecord, PreprocessSpec]:
    """Return the record of this configuration's run on this data, and its preprocessing.

    A finished run of another configuration or data set, or any when `fresh`, is moved aside first. One that has checkpoints
    and is not finished is not: raises RunError with what changed, unless `allow_changes`, which goes on with it. The caller
    holds RUN's lock.
    """
    spec = spec_for(config, manifest)
    wanted = wanted_identity(config, manifest, spec)
    record = RunRecord.load(config.run_dir)
    if record is not None and record.identity != wanted and not fresh:
        if allow_changes:
            _require_fitting(config)
            record.earlier.append(list(record.identity))
            record.config_digest, record.data_digest, record.preprocess_hash = wanted
            record.weights_sha256 = weights_sha256(config.model)
            record.outcome, record.stages = "running", {}
            record.save()
        elif record.outcome != "done" and any((config.run_dir / LAST.parent).glob("step-*.ckpt")):
            raise RunError(
                f"{config.run_dir}: is not finished, and {_what_changed(record.identity, wanted)} since it began: "
                f"{_differences(config, record, wanted)}. Go on as it was, start anew with --fresh (the earlier run is kept), "
                "or go on with the changes with --allow-changes."
            )
    if record is not None:
        if fresh or record.identity != wanted:
            why = "--fresh was given" if fresh else _what_changed(record.identity, wanted)
            say(f"{config.run_dir}: {why}; the earlier run is kept as {move_aside(config.run_dir)}")
            record = None
    elif config.run_dir.is_dir() and any(_is_somebodys(path) for path in config.run_dir.iterdir()):
        raise RunError(f"{config.run_dir}: is not a run (no {RUN_NAME}) and not empty. Choose another --name.")
    if record is None:
        record = RunRecord(config.name, uuid.uuid4().hex, *wanted, git=git_state(), folder=config.run_dir)
        record.weights_sha256 = weights_sha256(config.model)
        record.save()
    save_config(config)
    return record, spec


# What the tensors of a checkpoint are made for. The rest of a network's settings says how it trains.
FITTED = ("model.", "optimizer.name", "scheduler.name", "loss.name")
NOT_FITTED = ("dropout", "feature_dropout", "stochastic_depth", "freeze", "unfreeze", "prior_bias", "weights")


def _require_fitting(config: Config) -> None:
    """Refuse to go on where the checkpoint's weights or optimizer state could not be loaded. Raises RunError."""
    changed = changed_settings(config.run_dir / CONFIG_NAME, config)
    keys = {line: line.split("`")[1] for line in changed}
    unfit = [line for line, key in keys.items() if key.startswith(FITTED) and key.rpartition(".")[2] not in NOT_FITTED]
    if unfit and any((config.run_dir / LAST.parent).glob("step-*.ckpt")):
        raise RunError(
            f"{config.run_dir}: its checkpoints do not fit: {'; '.join(unfit)}. Go on as it was, or start anew with --fresh "
            "(`model.weights` may name one of its checkpoints)."
        )


def _is_somebodys(path: Path) -> bool:
    # A kill in the middle of the first save leaves a hidden file; the launchers of several machines come before any rank.
    return not path.name.startswith(".") and path.name != "exit"


def require_run(config: Config, manifest: DatasetManifest) -> tuple[RunRecord, PreprocessSpec]:
    """Return the record of this configuration's run on this data, and its preprocessing. Raises RunError for another's."""
    spec = spec_for(config, manifest)
    record = RunRecord.require(config.run_dir)
    wanted = wanted_identity(config, manifest, spec)
    if record.identity != wanted:
        raise RunError(
            f"{config.run_dir}: {_what_changed(record.identity, wanted)} since this run was trained. "
            "Run `shardline train` with the same arguments first."
        )
    return record, spec


def wanted_identity(config: Config, manifest: DatasetManifest, spec: PreprocessSpec) -> tuple[str, str, str]:
    """What the run of this configuration, its pretrained weights and this data set is called in run.json and checkpoints."""
    weights = weights_sha256(config.model)
    settings = config.identity() if weights is None else digest_of([config.identity(), weights])
    return settings, manifest.digest, spec.hash()


def _what_changed(found: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    names = ("the configuration", "the data set", "the preprocessing")
    changed = [name for name, before, now in zip(names, found, wanted, strict=True) if before != now]
    return f"{' and '.join(changed)} changed"


def _differences(config: Config, record: RunRecord, wanted: tuple[str, ...]) -> str:
    """What the run was made with and what is asked for now, setting by setting."""
    lines = changed_settings(config.run_dir / CONFIG_NAME, config)
    weights = weights_sha256(config.model)
    if record.weights_sha256 != weights:
        lines.append(f"weights {(record.weights_sha256 or 'none')[:12]} -> {(weights or 'none')[:12]}")
    if record.data_digest != wanted[1]:
        lines.append(f"data set {record.data_digest[:12]} -> {wanted[1][:12]}")
    if record.preprocess_hash != wanted[2]:
        lines.append(f"preprocessing {record.preprocess_hash[:12]} -> {wanted[2][:12]}")
    return "; ".join(lines)


def save_config(config: Config) -> None:
    """Write the resolved configuration into the run folder."""
    import yaml

    path = config.run_dir / CONFIG_NAME
    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    if not path.is_file() or path.read_text() != text:
        write_bytes(path, text.encode())


def git_state() -> dict[str, Any]:
    """Commit and dirtiness of the checkout that Shardline runs from; nulls outside a checkout."""
    folder = Path(__file__).parent
    # Installed into an environment inside somebody's repository, the package is not tracked by it.
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": bool(status) if commit else None}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
