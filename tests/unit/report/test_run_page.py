import dataclasses
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.config import Config, DatasetConfig, TrackingConfig
from pipeline.files import write_json
from pipeline.manifest import DatasetManifest
from pipeline.report.html import render_page
from pipeline.report.model_card import CARD
from pipeline.report.run_files import RunFiles
from pipeline.report.run_page import PAGE, build_sections, changed_from_default, write_report
from pipeline.tracking.journal import FILES, FOLDER, read_entries
from pipeline.tracking.run import RunTracker
from pipeline.tracking.server import server_of
from tests.unit.report.given import CHECKPOINT, evaluate, train


class Words(HTMLParser):
    """The text of a page, without its markup."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def text_of(files: RunFiles) -> str:
    return " ".join(Words(render_page("title", build_sections(files)).partition("<body>")[2]).words)


def titles_of(files: RunFiles) -> list[str]:
    return [section.title for section in build_sections(files)]


def again(files: RunFiles) -> RunFiles:
    return RunFiles.read(files.config, files.manifest, files.record)


def test_the_result_comes_first_and_everything_is_there(finished: RunFiles) -> None:
    assert titles_of(finished) == [
        "Result", "Training", "Classes", "Confusion", "Reliability", "Mistakes", "Checks before training", "Data set",
        "Settings", "Where it comes from",
    ]  # fmt: skip
    text = text_of(finished)
    assert text.index("Accuracy 0.9167 (95 % interval 0.6461 to 0.9851): 11 of 12 images of the test split.") < 900
    assert "Beats logistic regression on pixels: 0.9167 beside 0.5000." in text
    assert "agreement 1.0000 on 12 images, largest difference 2.0e-06 (allowed 1.0e-04)" in text
    assert "Checks before training: 1 green, none red, skipped: leakage." in text
    assert "2 samples could not be decoded in training" in text
    assert "red \N{LEFT-TO-RIGHT MARK}\N{RIGHTWARDS ARROW} blue" in text
    assert "2 cores of a toaster" in text
    assert "another machine" not in text
    for digest in (CHECKPOINT, finished.manifest.digest, finished.record.job_id, finished.parity["sha256"]):
        assert digest in text


def test_a_run_that_has_only_begun_shows_what_it_is(untrained: RunFiles) -> None:
    assert titles_of(untrained) == ["Data set", "Settings", "Where it comes from"]
    assert untrained.record.job_id in text_of(untrained)


def test_no_request_leaves_the_page(finished: RunFiles) -> None:
    page = render_page("title", build_sections(finished))
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 3


def test_curves_are_drawn_by_step_with_the_best_checkpoint(finished: RunFiles) -> None:
    page = render_page("title", build_sections(finished))
    charts = re.findall(r"<h3>([^<]+)</h3><div class=\"legend\">", page)
    assert charts == ["Loss", "Learning rate"]
    assert "val/loss, last 0.075" in page
    assert page.count(">best checkpoint<") == 2


def test_another_checkpoints_results_and_export_are_not_shown(finished: RunFiles) -> None:
    assert finished.record.best is not None
    finished.record.best["sha256"] = "c" * 64
    files = again(finished)
    assert (files.test, files.parity) == ({}, {})
    assert "Accuracy 0.9167" not in text_of(files)


def test_a_baseline_that_was_not_beaten_is_a_problem(finished: RunFiles) -> None:
    finished.test["baselines"] |= {"beaten": False, "logistic_regression": 0.95}
    page = render_page("title", build_sections(finished))
    assert re.search(r'<li class="problem">.{0,80}Does NOT beat logistic regression on pixels: 0.9167 beside 0.9500', page)


def test_a_comparison_is_among_the_results_only_for_its_checkpoint(finished: RunFiles) -> None:
    comparison = {"run": "runs/o", "theirs": 0.5, "difference": 0.4, "low": 0.1, "high": 0.7, "p_value": 0.01}
    comparison |= {"only_ours": 5, "only_theirs": 0, "sentence": "tiny beats runs/o"}
    path = finished.config.run_dir / "evaluation/against.json"
    write_json(path, {"checkpoint_sha256": CHECKPOINT, "comparisons": [comparison]})
    assert titles_of(again(finished))[-1] == "Beside other runs"
    assert "tiny beats runs/o" in text_of(again(finished))
    write_json(path, {"checkpoint_sha256": "c" * 64, "comparisons": [comparison]})
    assert "tiny beats runs/o" not in text_of(again(finished))


def test_several_labels_an_image(tiny_config: Config, multi_dataset: DatasetManifest) -> None:
    config = dataclasses.replace(tiny_config, dataset=DatasetConfig(path=str(multi_dataset.folder)))
    record = train(config, multi_dataset)
    per_class = [{"class": "blue", "support": 4, "precision": 0.25, "recall": 0.125, "f1": None}]
    changes: dict[str, Any] = {"recall": {"blue": 0.125, "green": None, "red": 1.0}, "baselines": None}
    evaluate(record, multi_dataset, [("red|blue", "blue"), ("", "")], label_accuracy=0.9, per_class=per_class, **changes)
    text = text_of(RunFiles.read(config, multi_dataset, record))
    assert "1 of 2 images of the test split with every label right" in text
    assert "0.9000 accuracy of single labels" in text
    assert "0.1250 0.2500" in text
    assert "any number of labels an image" in text


def test_only_settings_that_are_not_the_default_are_listed() -> None:
    changed = changed_from_default(Config(seed=7, tracking=TrackingConfig(uri="http://u:secret@host")))
    assert changed == [("seed", 7, 1999), ("tracking.uri", "http://u:secret@host", "")]


def test_no_password_is_on_the_page(finished: RunFiles) -> None:
    config = dataclasses.replace(finished.config, tracking=TrackingConfig(uri="http://user:secret@host"))
    text = text_of(dataclasses.replace(finished, config=config))
    assert "http://***@host" in text
    assert "secret" not in text


def test_page_and_card_are_written_and_kept_as_artifacts(finished: RunFiles) -> None:
    tracker = RunTracker(finished.config.run_dir, server_of(finished.config))
    write_report(finished.config, finished.manifest, finished.record, tracker)
    assert "Accuracy 0.9167" in (finished.config.run_dir / PAGE).read_text()
    assert "Accuracy 0.9167" in (finished.config.run_dir / CARD).read_text()
    kept = [entry for entry, _ in read_entries(finished.config.run_dir / FOLDER / FILES)]
    assert kept == [{"file": "report.html", "folder": ""}, {"file": "model_card.md", "folder": ""}]


@pytest.mark.parametrize("cut", ['{"step": 9, "spl', ""])
def test_half_a_line_of_a_killed_process_is_no_bad_sample(finished: RunFiles, cut: str) -> None:
    path = finished.config.run_dir / "bad_samples/rank-1.jsonl"
    path.write_text(json.dumps({"split": "val", "index": 1, "reason": "gone"}) + "\n" + cut)
    assert again(finished).bad_samples == {("train", "cut short"): 2, ("val", "gone"): 1}


def test_the_worst_mistakes_come_first(finished: RunFiles) -> None:
    lines = [
        "index,key,label,predicted,confidence",
        "3,three,a|b,a,0.99",
        "5,five,a,b|c,0.6|0.7",
        "9,nine,a,,",
        "7,seven,a,a,0.5",
    ]
    (finished.config.run_dir / "evaluation/predictions.csv").write_text("\n".join(lines))
    multi = dataclasses.replace(finished, manifest=dataclasses.replace(finished.manifest, task="multi"))
    assert [answer.key for answer in multi.answers({3, 5, 9})] == ["five", "nine", "three"]
    assert multi.answers({5})[0].confidences == [0.6, 0.7]


def test_a_bar_in_the_name_of_a_class_makes_no_mistake_a_worse_one(finished: RunFiles) -> None:
    lines = ["index,key,label,predicted,confidence", "3,three,x|y,z,0.6", "5,five,x,y,0.7"]
    (finished.config.run_dir / "evaluation/predictions.csv").write_text("\n".join(lines))
    assert [answer.key for answer in finished.answers({3, 5})] == ["five", "three"]


def test_reliability_is_a_table_where_there_is_no_picture(finished: RunFiles) -> None:
    bins = [{"count": 0, "confidence": None, "accuracy": None}, {"count": 12, "confidence": 0.875, "accuracy": 0.9167}]
    finished.test["reliability"] = bins
    assert "mean confidence right answers 0.875 0.917 12" not in text_of(finished)
    (finished.config.run_dir / "evaluation/reliability.png").unlink()
    assert "mean confidence right answers 0.875 0.917 12" in text_of(finished)
