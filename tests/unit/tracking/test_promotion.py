import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pipeline import cli
from pipeline.comparison import Comparison, compare_paired
from pipeline.errors import DataError, RunError
from pipeline.tracking import promotion
from pipeline.tracking.promotion import describe, objection, promote
from pipeline.tracking.registry import alias_version
from tests.unit.tracking.conftest import Registry

HEADER = "index,key,label,predicted,confidence\n"
AddVersion = Callable[..., str]


@pytest.fixture
def name() -> str:
    """A registered model of this test alone."""
    return f"promoted-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def add_version(registry: Registry, name: str) -> AddVersion:
    """A function that adds a version and makes it the candidate: `right` says which samples it answers rightly."""
    registry.client.create_registered_model(name)

    def add(right: Sequence[bool] | None, checkpoint: str = "c" * 64, **changes: Any) -> str:
        run_id = registry.run()
        if right is not None:
            rows = [f"{number},k{number},cat,{'cat' if hit else 'dog'},0.9\n" for number, hit in enumerate(right)]
            result = {
                "split": "test",
                "num_samples": len(right),
                "accuracy": sum(right) / len(right),
                "data_digest": "d" * 64,
                "checkpoint_sha256": "c" * 64,
            }
            registry.client.log_text(run_id, HEADER + "".join(rows), "evaluation/predictions.csv")
            registry.client.log_text(run_id, json.dumps({**result, **changes}), "evaluation/test.json")
        tags = {"checkpoint_sha256": checkpoint, "run_name": "digits"}
        version = registry.client.create_model_version(name, f"runs:/{run_id}/model", run_id, tags=tags)
        registry.client.set_registered_model_alias(name, "candidate", version.version)
        return str(version.version)

    return add


def champion(registry: Registry, name: str) -> str | None:
    version = alias_version(registry.client, name, "champion")
    return None if version is None else str(version.version)


def tags(registry: Registry, name: str, version: str) -> dict[str, str]:
    found = registry.client.get_model_version(name, version).tags
    return {key.removeprefix("promotion."): value for key, value in found.items() if key.startswith("promotion.")}


def answers(wrong: int, number: int = 1000, first: int = 0) -> list[bool]:
    """`number` answers, of which `wrong` in a row from `first` on are not right."""
    return [not first <= place < first + wrong for place in range(number)]


def test_the_first_candidate_becomes_champion_and_then_there_is_nothing_to_do(
    registry: Registry, name: str, add_version: AddVersion
) -> None:
    add_version(answers(100))
    decision = promote(registry.client, name, 0.005)
    assert (decision.kind, decision.moves) == ("first", True)
    assert champion(registry, name) == "1"
    assert tags(registry, name, "1")["decision"] == "first"
    assert promote(registry.client, name, 0.005).kind == "nothing"


@pytest.mark.parametrize(
    ("wrong", "first", "kind"),
    [
        (90, 0, "promoted"),  # better
        (100, 0, "promoted"),  # the same answers
        (100, 500, "promoted"),  # the same accuracy with other answers
        (103, 0, "refused"),  # lower; the interval reaches below -0.005
        (140, 0, "refused"),  # worse
    ],
)
def test_the_alias_moves_unless_the_same_images_speak_against_it(
    registry: Registry, name: str, add_version: AddVersion, wrong: int, first: int, kind: str
) -> None:
    add_version(answers(100))
    promote(registry.client, name, 0.005)
    add_version(answers(wrong, first=first))
    decision = promote(registry.client, name, 0.005)
    assert decision.kind == kind
    assert champion(registry, name) == ("2" if kind == "promoted" else "1")
    recorded = tags(registry, name, "2")
    assert recorded["decision"] == kind
    assert recorded["champion_version"] == "1"
    assert float(recorded["difference"]) == pytest.approx((100 - wrong) / 1000, abs=1e-6)
    assert decision.comparison is not None
    assert recorded["interval"] == f"{decision.comparison.low:+.6f} to {decision.comparison.high:+.6f}"
    assert float(recorded["p_value"]) == pytest.approx(decision.comparison.p_value, rel=0.01)


def compared(difference: float, low: float, high: float) -> Comparison:
    return Comparison(1000, 0.9 + difference, 0.9, difference, low, high, 0.5, 1, 2)


def test_a_lower_accuracy_passes_only_where_it_can_be_chance_and_no_more_than_the_drop_that_is_allowed() -> None:
    assert objection(compared(0.0, -0.02, 0.02), 0.005) == ""
    assert objection(compared(-0.001, -0.004, 0.002), 0.005) == ""
    assert "cannot be ruled out" in objection(compared(-0.001, -0.005, 0.002), 0.005)
    assert "not chance" in objection(compared(-0.003, -0.004, -0.002), 0.005)


def test_many_images_with_few_differences_allow_a_drop_of_chance() -> None:
    comparison = compare_paired(answers(1001, 20_000), answers(1000, 20_000))
    assert comparison.difference < 0
    assert objection(comparison, 0.005) == ""


def test_the_sentence_tells_candidate_and_champion_apart() -> None:
    said = describe(compare_paired([True, True, True, False], [True, False, True, False]))
    assert said.startswith("accuracy 0.7500, the champion's 0.5000, on the same 4 samples: +0.2500, 95 % interval ")
    assert "McNemar p = 1 (1 right with the candidate alone, 0 with the champion alone)" in said


def test_force_moves_it_and_leaves_word_of_who_and_why(registry: Registry, name: str, add_version: AddVersion) -> None:
    add_version(answers(100))
    promote(registry.client, name, 0.005)
    add_version(answers(200))
    decision = promote(registry.client, name, 0.005, force=True)
    assert (decision.kind, champion(registry, name)) == ("forced", "2")
    recorded = tags(registry, name, "2")
    assert recorded["decision"] == "forced"
    assert recorded["reason"].endswith("it is worse, and that is not chance")
    assert recorded["by"]
    assert recorded["time"].endswith("+00:00")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data_digest": "e" * 64}, "evaluated with data_digest eeeeeeeeeeee and the champion with dddddddddddd"),
        ({"split": "val"}, "evaluated with split val and the champion with test"),
        ({"checkpoint_sha256": "0" * 64}, "with another checkpoint than it was exported from. Run `shardline evaluate`"),
        ({"num_samples": 999}, "predictions.csv has 1,000 samples and evaluation/test.json says 999"),
    ],
)
def test_what_was_not_measured_alike_is_not_compared(
    registry: Registry, name: str, add_version: AddVersion, changes: dict[str, Any], complaint: str
) -> None:
    add_version(answers(100))
    promote(registry.client, name, 0.005)
    add_version(answers(90), **changes)
    with pytest.raises(RunError, match=complaint):
        promote(registry.client, name, 0.005)
    assert champion(registry, name) == "1"
    assert tags(registry, name, "2") == {}
    assert promote(registry.client, name, 0.005, force=True).kind == "forced"
    assert complaint[:20] in tags(registry, name, "2")["reason"]


def test_other_samples_of_the_same_number_are_not_compared(registry: Registry, name: str, add_version: AddVersion) -> None:
    add_version(answers(100))
    promote(registry.client, name, 0.005)
    add_version(answers(90))
    run_id = str(registry.client.get_model_version(name, "2").run_id)
    rows = "".join(f"{number},k{number + 1},cat,cat,0.9\n" for number in range(1000))
    registry.client.log_text(run_id, HEADER + rows, "evaluation/predictions.csv")
    with pytest.raises(RunError, match="2 samples were evaluated with only one of candidate and champion"):
        promote(registry.client, name, 0.005)


def test_a_champion_whose_run_is_gone_cannot_be_compared_with_but_replaced_by_force(
    registry: Registry, name: str, add_version: AddVersion
) -> None:
    add_version(answers(100))
    registry.client.create_model_version(name, "file:///elsewhere")
    registry.client.set_registered_model_alias(name, "champion", "2")
    with pytest.raises(RunError, match=r"version 2 of .*: its run \(None\) is not in MLflow, .* Give --force"):
        promote(registry.client, name, 0.005)
    assert promote(registry.client, name, 0.005, force=True).kind == "forced"
    assert champion(registry, name) == "1"


@pytest.mark.parametrize("force", [False, True])
def test_a_champion_that_another_promotion_made_in_the_meantime_stays(
    registry: Registry, name: str, add_version: AddVersion, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    add_version(answers(100))
    add_version(answers(50))
    decide = promotion._decide

    def slowly(*arguments: Any) -> promotion.Decision:
        decision = decide(*arguments)
        registry.client.set_registered_model_alias(name, "champion", "1")
        return decision

    monkeypatch.setattr(promotion, "_decide", slowly)
    with pytest.raises(RunError, match="somebody else moved the champion in the meantime"):
        promote(registry.client, name, 0.005, force=force)
    assert champion(registry, name) == "1"
    assert tags(registry, name, "2") == {}


def test_a_damaged_result_is_one_line_and_yields_to_force(registry: Registry, name: str, add_version: AddVersion) -> None:
    add_version(answers(100))
    version = registry.client.get_model_version(name, "1")
    registry.client.log_text(str(version.run_id), '{"split": "te', "evaluation/test.json")
    with pytest.raises(RunError, match=r"version 1 of .*: its evaluation in MLflow is damaged .* Run `shardline evaluate`"):
        promote(registry.client, name, 0.005)
    assert promote(registry.client, name, 0.005, force=True).kind == "forced"


def test_without_predictions_there_is_a_remedy(registry: Registry, name: str, add_version: AddVersion) -> None:
    add_version(None)
    with pytest.raises(
        RunError, match=r"has no evaluation/test\.json in MLflow\. Run `shardline evaluate` for its run \(digits\)"
    ):
        promote(registry.client, name, 0.005)
    assert champion(registry, name) is None


def test_a_table_that_was_cut_short_is_not_compared(registry: Registry, name: str, add_version: AddVersion) -> None:
    add_version(answers(0))
    run_id = str(registry.client.get_model_version(name, "1").run_id)
    registry.client.log_text(run_id, HEADER + "0,k0,cat", "evaluation/predictions.csv")
    with pytest.raises(DataError, match="row 1 is cut short"):
        promote(registry.client, name, 0.005)


def test_the_verb_says_no_with_the_numbers_and_exit_3(
    registry: Registry, name: str, add_version: AddVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["promote", "--config", "digits", "--tracking.uri", registry.uri, "--tracking.model", name]
    assert cli.main(arguments) == 2
    assert f"{name}: no version is the candidate. Run `shardline export`" in capsys.readouterr().err
    add_version(answers(100))
    assert cli.main(arguments) == 0
    assert f"next      shardline lineage models:/{name}@champion" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "nothing to do, version 1" in capsys.readouterr().out
    add_version(answers(140))
    assert cli.main(arguments) == 3
    said = capsys.readouterr().err
    assert (
        f"version 2 of {name} is not promoted: accuracy 0.8600, the champion's 0.9000, on the same 1,000 samples: -0.0400"
        in said
    )
    assert said.count("\n") == 1
    assert cli.main([*arguments, "--force"]) == 0
    assert "is version 2, by --force" in capsys.readouterr().out


def test_a_server_that_is_away_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["promote", "--config", "digits", "--tracking.uri", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert "MLflow at http://127.0.0.1:9 cannot be reached" in said
    assert said.count("\n") == 1


def test_nothing_is_made_where_nothing_was_tracked(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["promote", "--config", "digits"]) == 2
    assert "nothing was tracked there. Give --tracking.uri" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["a/b", "a:b", "..", "  "])
def test_a_name_that_mlflow_does_not_take_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["promote", "--config", "digits", "--tracking.model", model]) == 2
    assert "`tracking.model` is" in capsys.readouterr().err
