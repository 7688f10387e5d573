import socket
import threading
from pathlib import Path

import pytest

from pipeline.tracking.journal import last_steps, read_entries
from pipeline.tracking.system import node_name, sample_until


class Ends(threading.Event):
    """Set after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def wait(self, timeout: float | None = None) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_machine_is_sampled_and_a_later_try_goes_on(tmp_path: Path) -> None:
    sample_until(Ends(2), tmp_path)
    (path,) = (tmp_path / "tracking").glob("system-*.jsonl")
    keys = last_steps(path).keys()
    assert {"system/cpu_utilization_percentage", "system/network_receive_megabytes", "system/disk_available_megabytes"} < keys
    assert set(last_steps(path).values()) == {1}
    sample_until(Ends(1), tmp_path)
    assert set(last_steps(path).values()) == {2}
    memory = [value for entry, _ in read_entries(path) for key, value, _, _ in entry["points"] if "memory_usage_perc" in key]
    assert all(0 < value < 100 for value in memory)


def test_of_several_machines_each_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert node_name() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    name = node_name()
    assert name == socket.gethostname()
    sample_until(Ends(1), tmp_path, name)
    (path,) = (tmp_path / "tracking").glob("system-*.jsonl")
    assert f"system/{name}/cpu_utilization_percentage" in last_steps(path)


def test_a_job_that_goes_on_on_another_machine_has_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pod-a", "pod-b", "pod-a"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        sample_until(Ends(2), tmp_path)
    found = [entry["points"][0][3] for path in (tmp_path / "tracking").iterdir() for entry, _ in read_entries(path)]
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
