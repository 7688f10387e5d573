import resource
import signal
from pathlib import Path

import pytest

from pipeline.tracking.journal import Journal, final_figures, last_steps, read_entries


def entries(path: Path, start: int = 0) -> list[dict[str, object]]:
    return [entry for entry, _ in read_entries(path, start)]


def test_what_is_added_can_be_read_from_any_entry_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "tracking/points.jsonl")
    journal.add({"a": 1}, {"b": "zwölf"})
    journal.add({"c": None})
    found = list(read_entries(journal.path))
    assert [entry for entry, _ in found] == [{"a": 1}, {"b": "zwölf"}, {"c": None}]
    assert entries(journal.path, found[0][1]) == [{"b": "zwölf"}, {"c": None}]
    assert found[-1][1] == journal.path.stat().st_size


def test_a_line_that_a_kill_cut_short_is_not_read_and_makes_room_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":2')
    assert entries(path) == [{"a": 1}]
    Journal(path).add({"c": 3})
    assert entries(path) == [{"a": 1}, {"c": 3}]


def test_a_cut_line_of_any_length_is_found(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":"' + b"x" * (3 << 20))
    Journal(path).add({"c": 3})
    assert entries(path) == [{"a": 1}, {"c": 3}]
    alone = tmp_path / "alone.jsonl"
    alone.write_bytes(b"y" * (2 << 20))
    Journal(alone).add({"c": 3})
    assert entries(alone) == [{"c": 3}]


def test_a_journal_goes_on_after_what_is_there(tmp_path: Path) -> None:
    Journal(tmp_path / "points.jsonl").add({"a": 1})
    again = Journal(tmp_path / "points.jsonl")
    again.add({"b": 2})
    again.make_durable()
    again.close()
    assert entries(tmp_path / "points.jsonl") == [{"a": 1}, {"b": 2}]


def test_no_file_has_no_entries(tmp_path: Path) -> None:
    assert entries(tmp_path / "points.jsonl") == []


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "points.jsonl")
    journal.add({"a": 1})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.add({"b": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert journal.path.read_bytes() == b'{"a":1}\n'
    journal.add({"c": 3})
    assert entries(journal.path) == [{"a": 1}, {"c": 3}]


def test_the_last_step_of_each_curve_and_the_final_figures_are_known(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "points.jsonl")
    journal.add({"points": [["loss", 1.0, 7, 10], ["accuracy", 0.5, 7, 10]]}, {"points": [["loss", 0.5, 8, 20]]})
    journal.add({"final": [["test/loss", 0.4, 9, 0]]}, {"tags": {"a": "b"}}, {"final": [["test/loss", 0.3, 9, 0]]})
    assert last_steps(journal.path) == {"loss": 20, "accuracy": 10}
    assert final_figures(journal.path) == {"test/loss": 0.3}


def test_a_line_without_its_content_says_nothing_and_does_not_stand_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_bytes(b'{"points":[["loss",1.0,7,10]]}\n' + b"\0" * 40 + b'\n7\n{"final":[["test/loss",0.4,9,0]]}\n')
    assert entries(path) == [{"points": [["loss", 1.0, 7, 10]]}, {}, {}, {"final": [["test/loss", 0.4, 9, 0]]}]
    assert list(read_entries(path))[-1][1] == path.stat().st_size
    assert (last_steps(path), final_figures(path)) == ({"loss": 10}, {"test/loss": 0.4})
