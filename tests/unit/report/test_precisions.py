from typing import Any

from pipeline.files import write_json
from pipeline.report.model_card import render_card
from pipeline.report.precisions import precision_sentences, precision_table
from pipeline.report.run_files import PRECISIONS, RunFiles
from pipeline.report.run_page import build_sections
from tests.unit.report.given import CHECKPOINT


def row(precision: str, why: str, times: float = 1.0, **changes: Any) -> dict[str, Any]:
    latency = [
        {"batch": batch, "threads": 1, "median_ms": batch * times, "p90_ms": 2 * batch * times, "times_fp32": times}
        for batch in (1, 16)
    ]
    found = {"precision": precision, "published": True, "why": why, "num_bytes": 1_500_000, "sha256": "c" * 64}
    found |= {"num_samples": 12, "accuracy": 0.9, "drop": 0.0, "top1_agreement": 1.0, "latency": latency}
    return found | changes


UNKNOWN: dict[str, Any] = dict.fromkeys(("num_bytes", "sha256", "num_samples", "accuracy", "drop", "top1_agreement"))
RESULTS = [
    row("fp32", "proved equal to the trained network"),
    row("fp16", "the weight w reaches 1e9", published=False, latency=[], **UNKNOWN),
    row("int8", "3.7 x smaller", 0.25, accuracy=0.8967, drop=0.0033, top1_agreement=0.9958),
]


def test_each_form_is_a_row_beside_fp32() -> None:
    heads, rows = precision_table(RESULTS)
    assert heads == [
        *("precision", "published", "MB", "accuracy", "lost", "same answers", "1 image, ms (p90)", "16 images, ms (p90)")
    ]
    assert rows[2] == [*("int8", "yes", "1.50", "0.8967", "0.0033", "0.9958", "0.25 (0.50), 0.25 x", "4.00 (8.00), 0.25 x")]


def test_a_form_that_could_not_be_made_has_no_figures() -> None:
    heads, rows = precision_table(RESULTS)
    assert rows[1][:2] == ["fp16", "REFUSED"]
    assert len(rows[1]) == len(heads)
    assert set(rows[1][2:]) == {"\N{EN DASH}"}
    assert precision_sentences(RESULTS) == {"fp16": "refused: the weight w reaches 1e9", "int8": "3.7 x smaller"}


def test_nothing_is_said_where_no_form_was_asked_for(finished: RunFiles) -> None:
    assert precision_table([])[1] == []
    assert "Smaller and faster" not in {section.title for section in build_sections(finished)}
    assert "Smaller and faster" not in render_card(finished)


def test_page_and_card_show_the_forms_of_this_checkpoint_only(finished: RunFiles) -> None:
    folder = finished.config.run_dir
    write_json(folder / PRECISIONS, RESULTS)
    files = RunFiles.read(finished.config, finished.manifest, finished.record)
    assert "Smaller and faster" in {section.title for section in build_sections(files)}
    card = render_card(files)
    assert "| int8 | yes | 1.50 | 0.8967 | 0.0033 | 0.9958 | 0.25 (0.50), 0.25 x | 4.00 (8.00), 0.25 x |" in card
    assert "- fp16: refused: the weight w reaches 1e9." in card
    assert finished.record.best is not None and finished.record.best["sha256"] == CHECKPOINT
    finished.record.best = finished.record.best | {"sha256": "f" * 64}
    assert RunFiles.read(finished.config, finished.manifest, finished.record).precisions == []
