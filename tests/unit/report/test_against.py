import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.manifest import DatasetManifest
from pipeline.report.against import compare_runs, require_evaluated
from tests.unit.report.given import CHECKPOINT, evaluate, train

LABELS = ["red", "green", "blue"] * 10


def answers(num_right: int) -> list[tuple[str, str]]:
    return [(label, label if number < num_right else "none") for number, label in enumerate(LABELS)]


@pytest.fixture
def runs(tiny_config: Config, tiny_dataset: DatasetManifest) -> tuple[Path, Path]:
    """Two runs on the same 30 images: 29 right, and 20 right."""
    folders = []
    for name, num_right in (("tuned", 29), ("scratch", 20)):
        record = train(dataclasses.replace(tiny_config, name=name), tiny_dataset)
        evaluate(record, tiny_dataset, answers(num_right))
        folders.append(record.folder)
    return folders[0], folders[1]


def test_a_better_run_beats_another_and_says_by_how_much(runs: tuple[Path, Path]) -> None:
    tuned, scratch = runs
    (comparison,) = compare_runs(tuned, [scratch])
    assert comparison["sentence"].startswith(f"tuned beats {scratch} by 0.300: 0.9667 beside 0.6667 (95 % interval +0.1")
    assert (comparison["only_ours"], comparison["only_theirs"], comparison["num_samples"]) == (9, 0, 30)
    assert comparison["p_value"] == pytest.approx(2 * 0.5**9, rel=1e-9)  # nine throws of a fair coin, all the same
    written = json.loads((tuned / "evaluation/against.json").read_text())
    assert written == {"checkpoint_sha256": CHECKPOINT, "split": "test", "comparisons": [comparison]}


def test_a_worse_run_falls_behind_and_an_equal_one_cannot_be_told_apart(runs: tuple[Path, Path]) -> None:
    tuned, scratch = runs
    assert "scratch falls behind" in compare_runs(scratch, [tuned])[0]["sentence"]
    text = (tuned / "evaluation/predictions.csv").read_text()
    (scratch / "evaluation/predictions.csv").write_text(text.replace("red,red", "red,none", 2))
    (comparison,) = compare_runs(tuned, [scratch])
    assert "tuned cannot be told from" in comparison["sentence"]
    assert comparison["only_ours"] == 2


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("data_digest", "f" * 64, "the data set ffffffffffff"), ("split", "val", "the split val")],
)
def test_other_images_are_refused(runs: tuple[Path, Path], key: str, value: str, words: str) -> None:
    path = runs[1] / "evaluation/test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RunError, match=rf"scratch: was evaluated on {words}, .* evaluate both on one data set"):
        compare_runs(runs[0], [runs[1]])
    assert not (runs[0] / "evaluation/against.json").exists()


def test_answers_to_other_samples_are_refused(runs: tuple[Path, Path]) -> None:
    path = runs[1] / "evaluation/predictions.csv"
    path.write_text(path.read_text().replace("k29,", "k99,"))
    with pytest.raises(RunError, match=r"2 images were answered in one of both runs only, for example 'k29'"):
        compare_runs(runs[0], [runs[1]])


def test_a_damaged_table_is_named_with_its_run(runs: tuple[Path, Path]) -> None:
    path = runs[1] / "evaluation/predictions.csv"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RunError, match=r"scratch/evaluation: predictions.csv: row 30 is cut short"):
        compare_runs(runs[0], [runs[1]])


def test_a_run_without_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no evaluation to compare with .* Run `shardline evaluate` for that run first"):
        require_evaluated(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"split": "test"}'])
def test_a_damaged_result_is_named(runs: tuple[Path, Path], content: str) -> None:
    (runs[1] / "evaluation/test.json").write_text(content)
    with pytest.raises(RunError, match=r"scratch/evaluation/test.json: is damaged. Run `shardline evaluate`"):
        compare_runs(runs[0], [runs[1]])
