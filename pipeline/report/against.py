"""A run beside others on the same test images, paired: RUN/evaluation/against.json.

Two accuracies from the same images are not independent, so what counts is where exactly one of both is right.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline.comparison import Comparison, compare_paired, read_correct
from pipeline.errors import DataError, RunError
from pipeline.files import write_json
from pipeline.report.run_files import AGAINST, EVALUATION, PREDICTIONS, TEST

SIGNIFICANT = 0.05


def require_evaluated(run_dir: Path) -> dict[str, Any]:
    """Read what the evaluation of a run left. Raises RunError where there is none, or none that is whole."""
    path = run_dir / TEST
    if not path.is_file() or not (run_dir / PREDICTIONS).is_file():
        raise RunError(f"{run_dir}: no evaluation to compare with (no {TEST}). Run `shardline evaluate` for that run first.")
    try:
        result = json.loads(path.read_text())
    except ValueError:
        result = {}
    if not isinstance(result, dict) or not {"data_digest", "split", "checkpoint_sha256"} <= result.keys():
        raise RunError(f"{path}: is damaged. Run `shardline evaluate` for that run again.")
    return result


def compare_runs(run_dir: Path, others: list[Path]) -> list[dict[str, Any]]:
    """Compare an evaluated run with others and write against.json. Raises RunError where the images are not the same."""
    result, ours = require_evaluated(run_dir), _read_correct(run_dir)
    comparisons = [_compare(run_dir, result, ours, other) for other in others]
    write_json(
        run_dir / AGAINST,
        {"checkpoint_sha256": result["checkpoint_sha256"], "split": result["split"], "comparisons": comparisons},
    )
    return comparisons


def _compare(run_dir: Path, result: dict[str, Any], ours: dict[str, bool], other: Path) -> dict[str, Any]:
    found = require_evaluated(other)
    for key, words in (("data_digest", "data set"), ("split", "split")):
        if found[key] != result[key]:
            raise RunError(
                f"{other}: was evaluated on the {words} {found[key][:12]}, {run_dir} on {result[key][:12]}. Only runs on the "
                "same images can be compared: evaluate both on one data set."
            )
    theirs = _read_correct(other)
    if theirs.keys() != ours.keys():
        alone = sorted(theirs.keys() ^ ours.keys())
        raise RunError(
            f"{other}: {len(alone):,} images were answered in one of both runs only, for example '{alone[0]}'. "
            "Run `shardline evaluate` for both again."
        )
    comparison = compare_paired([*ours.values()], [theirs[key] for key in ours])
    return {
        "run": str(other),
        "data_digest": found["data_digest"],
        "checkpoint_sha256": found["checkpoint_sha256"],
        **dataclasses.asdict(comparison),
        "sentence": describe(run_dir.name, str(other), comparison),
    }


def describe(name: str, other: str, comparison: Comparison) -> str:
    """One sentence that says who is better, by how much, and whether it could be chance."""
    c = comparison
    figures = f"95 % interval {c.low:+.3f} to {c.high:+.3f}; p = {c.p_value:.2g}, {c.num_samples:,} images"
    if c.p_value >= SIGNIFICANT:
        return f"{name} cannot be told from {other}: {c.ours:.4f} beside {c.theirs:.4f}, {c.difference:+.3f} ({figures})."
    verb = "beats" if c.difference > 0 else "falls behind"
    return f"{name} {verb} {other} by {abs(c.difference):.3f}: {c.ours:.4f} beside {c.theirs:.4f} ({figures})."


def _read_correct(run_dir: Path) -> dict[str, bool]:
    try:
        return read_correct((run_dir / PREDICTIONS).read_text())
    except DataError as error:
        raise RunError(f"{run_dir / EVALUATION}: {error}") from error
