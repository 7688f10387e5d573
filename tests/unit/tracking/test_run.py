import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.run import Outcome, RunRecord
from pipeline.tracking import deliver as deliver_module
from pipeline.tracking import run as run_module
from pipeline.tracking.journal import read_entries
from pipeline.tracking.run import RunTracker, metric_key, open_tracker, settle
from pipeline.tracking.server import PLACE, Place, Server
from tests.processes import wait_until

Open = Callable[[], RunTracker]


def written(config: Config, journal: str, kind: str) -> list[Any]:
    """What the entries of one kind say."""
    path = config.run_dir / f"tracking/{journal}.jsonl"
    return [entry[kind] for entry, _ in read_entries(path) if kind in entry]


def points(config: Config) -> list[tuple[str, float, int]]:
    return [(key, value, step) for entry in written(config, "points", "points") for key, value, _, step in entry]


def test_replayed_steps_are_not_written_again(config: Config, open_here: Open) -> None:
    killed = open_here()
    for step in (10, 20, 30):
        killed.log({"train/loss": 1.0 / step}, step)
    resumed = open_here()  # goes on after step 10
    for step in (20, 30, 40):
        resumed.log({"train/loss": -1.0}, step)
    assert points(config) == [("train/loss", 1 / step, step) for step in (10, 20, 30)] + [("train/loss", -1.0, 40)]


def test_a_figure_that_the_killed_try_had_not_reached_is_written(config: Config, open_here: Open) -> None:
    open_here().log({"train/loss": 1.0}, 20)
    open_here().log({"train/loss": 2.0, "val/loss": 3.0}, 20)
    assert points(config) == [("train/loss", 1.0, 20), ("val/loss", 3.0, 20)]


def test_final_figures_are_written_once_and_again_when_they_change(config: Config, open_here: Open) -> None:
    for value in (0.75, 0.75, 0.5):
        open_here().log_final({"test/accuracy": value, "test/loss": 0.25})
    found = [[(key, value, step) for key, value, _, step in entry] for entry in written(config, "points", "final")]
    assert found == [[("test/accuracy", 0.75, 0), ("test/loss", 0.25, 0)], [("test/accuracy", 0.5, 0)]]


def test_a_picture_of_a_step_is_kept_once(config: Config, open_here: Open) -> None:
    open_here().log_image("val/samples", b"first", 0)
    again = open_here()
    again.log_image("val/samples", b"replayed", 0)
    again.log_image("val/samples", b"second", 8)
    paths = written(config, "files", "image")
    assert [(config.run_dir / path).read_bytes() for path in paths] == [b"first", b"second"]


@pytest.mark.parametrize(
    ("outcome", "status"), [("running", "SCHEDULED"), ("done", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_a_run_that_was_only_checked_waits_for_its_training_and_another_keeps_its_end(
    config: Config, open_here: Open, outcome: Outcome, status: str
) -> None:
    open_here().leave(outcome)
    assert written(config, "points", "status") == ["RUNNING", status]


def test_names_become_what_mlflow_takes_and_stay_apart() -> None:
    assert metric_key("val/recall/sea lion") == "val/recall/sea lion"
    assert metric_key("val/recall/größe") == "val/recall/größe"
    assert metric_key("val/recall/a&b") == "val/recall/a_b.fb2720ec"
    assert metric_key("val/recall/a|b") != metric_key("val/recall/a&b")
    assert metric_key("val/recall/..").startswith("val/recall/_.")
    assert metric_key("val//x").startswith("val/_/x.")
    assert len(metric_key("x" * 999)) <= 250


def test_a_full_disk_costs_points_and_not_the_training(
    config: Config, open_here: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = open_here()

    def refuse(*entries: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracker._points, "add", refuse)
    for step in (1, 2):
        tracker.log({"train/loss": 1.0}, step)
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 1
    assert "Training goes on" in said


def test_a_deliverer_that_was_killed_is_started_again(config: Config, open_here: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    started: list[subprocess.Popen[bytes]] = []

    def start(self: RunTracker) -> None:
        started.append(subprocess.Popen(["sleep", "60"]))
        self._deliverer = started[-1]

    monkeypatch.setattr(RunTracker, "start_delivery", start)
    tracker = open_here()
    tracker.start_delivery()
    tracker.log({"train/loss": 1.0}, 1)
    assert len(started) == 1
    started[0].kill()
    started[0].wait()
    tracker.log({"train/loss": 1.0}, 2)
    assert len(started) == 2
    started[1].kill()
    started[1].wait()


def test_what_keeps_a_run_from_being_delivered_is_said_once(
    config: Config, server: Server, open_here: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    tracker = open_here()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        tracker._deliverer = sleeper
        Place(server.uri, server.experiment, trouble="MLflow at here cannot be reached (why)").save(config.run_dir)
        for step in (1, 2, 3):
            tracker.log({"train/loss": 1.0}, step)
        sleeper.kill()
    assert capsys.readouterr().out.count("MLflow at here cannot be reached (why). Training goes on") == 1


def test_saying_something_takes_microseconds(open_here: Open) -> None:
    tracker = open_here()
    metrics = {f"train/{name}": 0.5 for name in ("loss", "accuracy", "learning_rate", "gradient_norm")}
    before = time.thread_time()
    for step in range(500):
        tracker.log(metrics, step)
    assert (time.thread_time() - before) / 500 < 300e-6


def test_a_run_is_delivered_by_a_process_of_its_own_and_known_afterwards(config: Config, record: RunRecord) -> None:
    tracker = open_tracker(config, record)
    tracker.log({"train/loss": 0.5}, 1)
    folder = config.run_dir / "tracking"
    wait_until(lambda: any(path.stat().st_size for path in folder.glob("system-*.jsonl")), "a sample of the machine")
    tracker.finish("FINISHED")
    assert settle(config, record) == {}
    client = tracker.server.client()
    run = client.get_run(str(RunRecord.require(config.run_dir).mlflow["run_id"]))
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 0.5)
    assert run.data.metrics.keys() > {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"}
    assert record.mlflow == {"uri": tracker.server.uri, "experiment": "shardline", "run_id": run.info.run_id}


def test_what_is_still_local_is_said(config: Config, record: RunRecord, open_here: Open) -> None:
    tracker = open_here()
    tracker.log({"train/loss": 0.5, "train/accuracy": 1.0}, 1)
    tracker.log_image("val/samples", b"png", 1)
    said = settle(config, record, seconds=0.0)["still local"]
    assert said == f"2 points, 1 files, 2 facts; deliver them with `shardline sync {config.run_dir}`"
    assert not (Path(config.run_dir) / PLACE).exists()


def test_a_thousand_names_of_signs_that_mlflow_refuses_stay_apart() -> None:
    assert len({metric_key(f"val/recall/{chr(0x1F300 + number)}") for number in range(1000)}) == 1000


def test_a_figure_that_is_no_number_is_written_once(config: Config, open_here: Open) -> None:
    for _ in range(2):
        open_here().log_final({"test/loss": float("nan")})
    assert len(written(config, "points", "final")) == 1


def test_a_note_of_the_delivery_that_cannot_be_read_does_not_end_the_training(
    open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run_dir: Path) -> Place:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(run_module, "place_of", refuse)
    tracker = open_here()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        tracker._deliverer = sleeper
        tracker.log({"train/loss": 1.0}, 1)
        sleeper.kill()


def test_who_waits_for_the_delivery_is_told_and_may_leave(
    config: Config, record: RunRecord, open_here: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_here()
    monkeypatch.setattr(deliver_module, "QUIET_SECONDS", 0.1)

    def interrupt(path: Path) -> None:
        if "waiting for MLflow to take the rest, at most 60 s" in capsys.readouterr().out:
            raise KeyboardInterrupt
        raise RunError("locked: somebody delivers")

    monkeypatch.setattr(deliver_module, "locked", interrupt)
    assert settle(config, record, seconds=60.0)["still local"].startswith("2 facts")
