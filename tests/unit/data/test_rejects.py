import json
from pathlib import Path

import pytest

from pipeline.data.rejects import REASONS_NAMED, Rejects, summary_of


def test_rejects_are_one_line_each_by_name(tmp_path: Path) -> None:
    with Rejects(tmp_path / "rejected.sqlite") as rejects:
        rejects.add([("b.jpg", "cut"), ("caf\udce9.jpg", "empty")])
        rejects.add([("a.jpg", "cut")])
        rejects.write(tmp_path / "rejected.jsonl")
        assert len(rejects) == 3
        assert rejects.first(2) == [("a.jpg", "cut"), ("b.jpg", "cut")]
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(line["path"], line["reason"]) for line in lines] == [
        ("a.jpg", "cut"),
        ("b.jpg", "cut"),
        ("caf\udce9.jpg", "empty"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["rejected.jsonl"]


@pytest.mark.parametrize(
    ("reason", "summary"),
    [
        ("image file is truncated (12 bytes not processed)", "image file is truncated (N bytes not processed)"),
        ("20000 x 9 pixels are more than 100,000,000", "N x N pixels are more than N"),
        ("x" * 200, "x" * 80),
    ],
)
def test_reasons_that_differ_in_numbers_are_one(reason: str, summary: str) -> None:
    assert summary_of(reason) == summary


def test_the_summary_counts_the_frequent_reasons_and_the_rest_together(tmp_path: Path) -> None:
    with Rejects(tmp_path / "rejected.sqlite") as rejects:
        rejects.add((f"{letter}{number}", f"reason {letter}") for letter in "abcdefghijklmnopqrstuvwxyz" for number in (1, 2))
        rejects.add([("z3", "reason z")])
        reasons = rejects.by_reason()
    assert next(iter(reasons.items())) == ("reason z", 3)
    assert len(reasons) == REASONS_NAMED + 1
    assert reasons["other reasons"] == 2 * (26 - REASONS_NAMED)
