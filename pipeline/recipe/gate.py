"""`shardline check`: every check in turn, its verdict in RUN/check/verdicts.json, and a picture of what the network is fed."""

import dataclasses
import os
from pathlib import Path

import torch

from pipeline import accelerator
from pipeline.config import Config
from pipeline.console import say
from pipeline.data.dataset import Batch
from pipeline.errors import ConfigError, GateError, nearest
from pipeline.files import write_bytes, write_json
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.recipe.init_loss import check_init_loss
from pipeline.recipe.overfit import check_overfit
from pipeline.recipe.seed import check_seed
from pipeline.recipe.verdict import Subject, Verdict
from pipeline.report.grid import draw_grid
from pipeline.task import label_text

CHECKS = {"seed": check_seed, "init_loss": check_init_loss, "overfit": check_overfit}
VERDICTS = Path("check/verdicts.json")
PICTURE = Path("check/first_batch.png")
TILES = 32


def require_known_checks(skip: list[str]) -> None:
    """Refuse a name in `check.skip` that is no check. Raises ConfigError."""
    for name in skip:
        if name not in CHECKS:
            suggestion = nearest(name, CHECKS) or f" Known: {', '.join(CHECKS)}."
            raise ConfigError(f"`check.skip` names '{name}', which is no check.{suggestion}")


def run_checks(config: Config, manifest: DatasetManifest, spec: PreprocessSpec) -> list[Verdict]:
    """Run every check that is not skipped, print and save its verdict.

    Torch's generator and its choice of algorithms are changed.
    """
    # A GPU adds gradients in any order unless told not to, and the seed check would blame the seed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    device = accelerator.device()
    subject = Subject(config, manifest, spec, device)
    picture = draw_batch(subject.first_batch(augmented=True, size=TILES), manifest.class_names)
    write_bytes(config.run_dir / PICTURE, picture)
    verdicts = []
    for name, check in CHECKS.items():
        skipped = Verdict(name, "skipped", None, "", "named in check.skip")
        verdict = skipped if name in config.check.skip else check(subject)
        say(f"{verdict.verdict:<8} {verdict.check:<10} {verdict.why}")
        verdicts.append(verdict)
    write_json(config.run_dir / VERDICTS, [dataclasses.asdict(verdict) for verdict in verdicts])
    return verdicts


def require_green(verdicts: list[Verdict]) -> None:
    """Pass when no check is red. Raises GateError with the reasons."""
    red = [verdict for verdict in verdicts if verdict.verdict == "red"]
    if red:
        reasons = "; ".join(f"{verdict.check}: {verdict.why}" for verdict in red)
        skip = ",".join(verdict.check for verdict in red)
        raise GateError(f"{reasons}. Mend it, or go on regardless with --check.skip=[{skip}].")


def draw_batch(batch: Batch, class_names: list[str]) -> bytes:
    """A PNG of the images exactly as the network gets them, each over its class name."""
    images = batch["image"].cpu().permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    return draw_grid(images, [label_text(label, class_names) for label in batch["label"]])
