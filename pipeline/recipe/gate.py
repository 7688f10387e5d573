"""`shardline check`: every check in turn, its verdict in RUN/check/verdicts.json, and a page of what was seen.

A check whose ground is red does not run: a network with a dead layer cannot learn a batch by heart, and saying so twice would
hide which of the two is the cause.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import accelerator
from pipeline.config import Config
from pipeline.console import say
from pipeline.errors import ConfigError, GateError, nearest
from pipeline.files import write_bytes, write_json
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.recipe.baselines import BASELINES, measure_baselines
from pipeline.recipe.gradients import check_gradients
from pipeline.recipe.init_loss import check_init_loss
from pipeline.recipe.labels import check_labels
from pipeline.recipe.leakage import check_leakage
from pipeline.recipe.overfit import check_overfit
from pipeline.recipe.page import PAGE, write_check_page
from pipeline.recipe.pixels import check_pixels, draw_first_batch
from pipeline.recipe.pretrained import check_pretrained
from pipeline.recipe.seed import check_seed
from pipeline.recipe.verdict import Subject, Verdict
from pipeline.recipe.zero_input import check_zero_input
from pipeline.tracking.run import RunTracker

# In this order: the data, then the network, then both.
CHECKS: dict[str, Callable[[Subject], Verdict]] = {
    "seed": check_seed,
    "pixels": check_pixels,
    "labels": check_labels,
    "leakage": check_leakage,
    "gradients": check_gradients,
    "init_loss": check_init_loss,
    "zero_input": check_zero_input,
    "overfit": check_overfit,
    "pretrained": check_pretrained,
}
# What a check takes for granted: it is not run where one of these is red.
GROUNDS = {
    "init_loss": ("pixels",),
    "zero_input": ("pixels", "gradients"),
    "overfit": ("pixels", "gradients"),
    "pretrained": ("pixels",),
}
VERDICTS = Path("check/verdicts.json")
PICTURE = Path("check/first_batch.png")
OUTPUTS = (VERDICTS, PICTURE, BASELINES, PAGE)
SKIP, ONLY = "named in check.skip", "not named in --only"


@dataclass(frozen=True)
class Timed:
    """A verdict and how long it took."""

    verdict: Verdict
    seconds: float


def left_out(skip: Collection[str], only: Collection[str] = ()) -> dict[str, str]:
    """The checks not to run, and why: those in `skip`, and, where `only` names any, all others. Raises ConfigError."""
    for option, names in (("check.skip", skip), ("--only", only)):
        for name in names:
            if name not in CHECKS:
                suggestion = nearest(name, CHECKS) or f" Known: {', '.join(CHECKS)}."
                raise ConfigError(f"`{option}` names '{name}', which is no check.{suggestion}")
    both = [name for name in only if name in skip]
    if both:
        raise ConfigError(f"`--only` names '{both[0]}', which check.skip leaves out.")
    return {name: SKIP if name in skip else ONLY for name in CHECKS if name in skip or (only and name not in only)}


def run_checks(
    config: Config,
    manifest: DatasetManifest,
    spec: PreprocessSpec,
    without: Mapping[str, str],
    tracker: RunTracker | None = None,
) -> list[Verdict]:
    """Run every check that is not among `without`, print and save its verdict, and draw the page.

    Torch's generator and its choice of algorithms are changed.
    """
    # A GPU adds gradients in any order unless told not to, and the seed check would blame the seed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not config.trainer.deterministic)
    subject = Subject(config, manifest, spec, accelerator.device())
    timed = examine(subject, without)
    verdicts = [entry.verdict for entry in timed]
    baselines = measure_baselines(subject)
    picture = draw_first_batch(subject)
    write_json(config.run_dir / VERDICTS, [verdict.as_json() for verdict in verdicts])
    write_json(config.run_dir / BASELINES, baselines)
    write_bytes(config.run_dir / PICTURE, picture)
    write_check_page(config, manifest, [(entry.verdict, entry.seconds) for entry in timed], baselines)
    if tracker is not None:
        _log(tracker, config.run_dir, verdicts, baselines)
    return verdicts


def examine(subject: Subject, without: Mapping[str, str]) -> list[Timed]:
    """The verdict of every check, in order; those among `without`, and those whose ground is red, are skipped."""
    timed: list[Timed] = []
    for name, check in CHECKS.items():
        started = time.monotonic()
        red = [entry.verdict.check for entry in timed if entry.verdict.verdict == "red"]
        fallen = [ground for ground in GROUNDS.get(name, ()) if ground in red]
        if name in without:
            verdict = Verdict(name, "skipped", None, "", without[name])
        elif fallen:
            verdict = Verdict(name, "skipped", None, "", f"it takes for granted what is red: {', '.join(fallen)}")
        else:
            verdict = check(subject)
        timed.append(Timed(verdict, time.monotonic() - started))
        say(f"{verdict.verdict:<8} {verdict.check:<10} {timed[-1].seconds:5.1f} s  {verdict.why}")
    return timed


def _log(tracker: RunTracker, run_dir: Path, verdicts: list[Verdict], baselines: dict[str, Any]) -> None:
    """Keep what the checks left as artifacts of the run, which then waits for its training."""
    for path in OUTPUTS:
        tracker.log_file(run_dir / path, "check")
    figures = {f"baseline/{name}": values["val"] for name, values in baselines["accuracy"].items() if "val" in values}
    tracker.log_final({"check/red": float(sum(verdict.verdict == "red" for verdict in verdicts)), **figures})


def require_green(verdicts: list[Verdict]) -> None:
    """Pass when no check is red. Raises GateError with the reasons."""
    red = [verdict for verdict in verdicts if verdict.verdict == "red"]
    if red:
        reasons = "; ".join(f"{verdict.check}: {verdict.why}" for verdict in red)
        skip = ",".join(verdict.check for verdict in red)
        raise GateError(f"{reasons}. Mend it (check.html shows more), or go on regardless with --check.skip=[{skip}].")
