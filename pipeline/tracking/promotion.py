"""`shardline promote`: whether the candidate takes the champion's place, by their answers to the same test images, in pairs.

The rule: the alias `champion` moves to the candidate where there is no champion yet; where the candidate's accuracy is the
same or higher; and where it is lower, if that can be chance (the 95 % interval of the difference includes 0) and a loss of
more than `tracking.max_drop` cannot (the interval lies above it). Every decision stays on the candidate's version as tags.
"""

import datetime
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.comparison import Comparison, compare_paired, read_correct
from pipeline.errors import RunError, ShardlineError
from pipeline.tracking.provenance import user_name
from pipeline.tracking.registry import CANDIDATE, CHAMPION, alias_version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# As `evaluate` leaves them in the run's artifacts.
RESULT, PREDICTIONS = "evaluation/test.json", "evaluation/predictions.csv"
OTHERWISE = "Train and evaluate both on the same data set, or give --force."
SAME = ("data_digest", "split", "num_samples")


@dataclass(frozen=True)
class Evaluation:
    """What a version's run says of it: test.json, and whether each sample, by its key, was answered rightly."""

    result: dict[str, Any]
    correct: dict[str, bool]


@dataclass(frozen=True)
class Decision:
    """`kind`: nothing (it is the champion), first, promoted, refused or forced; `reason` is a sentence with the numbers."""

    kind: str
    version: str
    champion: str | None
    reason: str
    comparison: Comparison | None = None

    @property
    def moves(self) -> bool:
        """Whether the alias goes to the candidate."""
        return self.kind in ("first", "promoted", "forced")


def promote(client: "MlflowClient", name: str, max_drop: float, *, force: bool = False) -> Decision:
    """Decide on the candidate of the registered model `name`, record the decision, and move the alias if it is yes.

    Raises RunError where there is no candidate, or the two were not evaluated on the same samples; `force` moves it then, too.
    """
    candidate, champion = alias_version(client, name, CANDIDATE), alias_version(client, name, CHAMPION)
    if candidate is None:
        raise RunError(
            f"{name}: no version is the candidate. Run `shardline export`, or `shardline sync RUN` if it was exported "
            "while the server was away."
        )
    if champion is not None and int(champion.version) == int(candidate.version):
        return Decision("nothing", str(candidate.version), str(champion.version), "the candidate is the champion already")
    try:
        decision = _decide(client, candidate, champion, max_drop)
    except ShardlineError as error:
        if not force:
            raise
        decision = _decision("refused", candidate, champion, str(error))
    if force and decision.kind == "refused":
        decision = _decision("forced", candidate, champion, decision.reason, decision.comparison)
    if decision.moves:
        _require_unmoved(client, name, champion)
    _record(client, candidate, decision)
    if decision.moves:
        client.set_registered_model_alias(name, CHAMPION, candidate.version)
    return decision


def _require_unmoved(client: "MlflowClient", name: str, champion: "ModelVersion | None") -> None:
    """Refuse to replace a champion that the candidate was not compared with. Raises RunError."""
    now = alias_version(client, name, CHAMPION)
    if (now and int(now.version)) != (champion and int(champion.version)):
        raise RunError(f"{name}: somebody else moved the champion in the meantime. Run `shardline promote` again.")


def _decision(
    kind: str, candidate: "ModelVersion", champion: "ModelVersion | None", reason: str, comparison: Comparison | None = None
) -> Decision:
    return Decision(kind, str(candidate.version), None if champion is None else str(champion.version), reason, comparison)


def _decide(client: "MlflowClient", candidate: "ModelVersion", champion: "ModelVersion | None", max_drop: float) -> Decision:
    ours = read_evaluation(client, candidate)
    if champion is None:
        accuracy = ours.result["accuracy"]
        reason = f"there is no champion yet; accuracy {accuracy:.4f} on {len(ours.correct):,} samples of {ours.result['split']}"
        return _decision("first", candidate, None, reason)
    theirs = read_evaluation(client, champion)
    require_comparable(ours, theirs)
    keys = sorted(ours.correct)
    comparison = compare_paired([ours.correct[key] for key in keys], [theirs.correct[key] for key in keys])
    why = objection(comparison, max_drop)
    kind = "refused" if why else "promoted"
    return _decision(kind, candidate, champion, f"{describe(comparison)}{why and f'; {why}'}", comparison)


def describe(comparison: Comparison) -> str:
    """Candidate and champion in numbers."""
    c = comparison
    return (
        f"accuracy {c.ours:.4f}, the champion's {c.theirs:.4f}, on the same {c.num_samples:,} samples: "
        f"{c.difference:+.4f}, 95 % interval {c.low:+.4f} to {c.high:+.4f}, McNemar p = {c.p_value:.3g} "
        f"({c.only_ours:,} right with the candidate alone, {c.only_theirs:,} with the champion alone)"
    )


def objection(comparison: Comparison, max_drop: float) -> str:
    """What speaks against the first of the two; nothing if it may take the other's place. Equal accuracies speak for it."""
    if comparison.difference >= 0:
        return ""
    if comparison.high < 0:
        return "it is worse, and that is not chance"
    if comparison.low <= -max_drop:
        return f"it is lower, and a loss of more than {max_drop:g} (`tracking.max_drop`) cannot be ruled out"
    return ""


def read_evaluation(client: "MlflowClient", version: "ModelVersion") -> Evaluation:
    """The evaluation of a version's checkpoint, from its run's artifacts. Raises RunError where there is none, or another's."""
    run_id = str(version.run_id)
    where = f"version {version.version} of {version.name}"
    again = f"Run `shardline evaluate` for its run ({version.tags.get('run_name', run_id)}), or give --force."
    there = _evaluation_files(client, run_id, where)
    for name in (RESULT, PREDICTIONS):
        if name not in there:
            raise RunError(f"{where}: its run has no {name} in MLflow. {again}")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(client.download_artifacts(run_id, name, folder)) for name in (RESULT, PREDICTIONS)]
        try:
            result, text = json.loads(paths[0].read_text()), paths[1].read_text()
        except ValueError as error:
            raise RunError(f"{where}: its evaluation in MLflow is damaged ({error}). {again}") from error
    if result.get("checkpoint_sha256") != version.tags.get("checkpoint_sha256"):
        raise RunError(f"{where}: its run was evaluated with another checkpoint than it was exported from. {again}")
    correct = read_correct(text)
    if len(correct) != result["num_samples"]:
        found = f"{PREDICTIONS} has {len(correct):,} samples and {RESULT} says {result['num_samples']:,}"
        raise RunError(f"{where}: {found}. {again}")
    return Evaluation(result, correct)


def _evaluation_files(client: "MlflowClient", run_id: str, where: str) -> set[str]:
    from mlflow.exceptions import MlflowException

    try:
        return {info.path for info in client.list_artifacts(run_id, "evaluation")}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RunError(f"{where}: its run ({run_id}) is not in MLflow, so it cannot be compared. Give --force.") from error


def require_comparable(ours: Evaluation, theirs: Evaluation) -> None:
    """Refuse to compare what was not measured on the same samples. Raises RunError."""
    for name in SAME:
        mine, yours = str(ours.result.get(name)), str(theirs.result.get(name))
        if mine != yours:
            raise RunError(
                f"the candidate was evaluated with {name} {mine[:12]} and the champion with {yours[:12]}. {OTHERWISE}"
            )
    if number := len(ours.correct.keys() ^ theirs.correct.keys()):
        raise RunError(f"{number:,} samples were evaluated with only one of candidate and champion. {OTHERWISE}")


def _record(client: "MlflowClient", candidate: "ModelVersion", decision: Decision) -> None:
    """Put the decision on the version; what an earlier one left there is replaced."""
    comparison = decision.comparison
    numbers = {"difference": "", "interval": "", "p_value": ""}
    if comparison is not None:
        numbers = {
            "difference": f"{comparison.difference:+.6f}",
            "interval": f"{comparison.low:+.6f} to {comparison.high:+.6f}",
            "p_value": f"{comparison.p_value:.3g}",
        }
    facts = {
        "decision": decision.kind,
        "reason": decision.reason,
        "champion_version": decision.champion or "",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "by": user_name(),
        **numbers,
    }
    for key, value in facts.items():
        client.set_model_version_tag(candidate.name, candidate.version, f"promotion.{key}", value)
