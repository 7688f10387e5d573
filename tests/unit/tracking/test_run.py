"""importing mlflow costs seconds and making its database as many, so all tests share one file; each test has its own job."""

import dataclasses
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import Config, ModelConfig, OptimizerConfig, TrackingConfig
from pipeline.run import Outcome, RunRecord
from pipeline.tracking.run import MAX_HELD_POINTS, RunTracker, open_client, open_tracker, tracking_uri
from tests.processes import wait_until

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run in a runs folder of its own, with some settings that are not the defaults."""
    runs_dir = tmp_path_factory.mktemp("tracked") / "runs"
    runs_dir.mkdir()
    return Config(
        name="tracked",
        runs_dir=str(runs_dir),
        model=ModelConfig(channels=[8, 16]),
        optimizer=OptimizerConfig(args={"momentum": 0.5}),
    )


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """A new job."""
    git = {"commit": "0" * 40, "dirty": True}
    return RunRecord("tracked", uuid.uuid4().hex, "c" * 64, "d" * 64, "p" * 64, git=git, folder=tmp_path)


def history(tracker: RunTracker, key: str) -> list[tuple[int, float]]:
    """(step, value) of every point that the database holds, oldest first."""
    points = tracker.client.get_metric_history(tracker.run_id, key)
    return [(point.step, point.value) for point in points]


def runs_of(client: "MlflowClient", config: Config, record: RunRecord) -> list[str]:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    query = f"tags.`shardline.job_id` = '{record.job_id}'"
    return [run.info.run_id for run in client.search_runs([experiment.experiment_id], filter_string=query)]


def test_a_job_has_one_run_however_often_it_is_opened(config: Config, record: RunRecord) -> None:
    first = open_tracker(config, record)
    first.finish("KILLED")
    # A job that was killed before run.json knew the run finds it by its job_id.
    forgetful = dataclasses.replace(record, mlflow={"uri": None, "experiment": None, "run_id": None})
    second = open_tracker(config, forgetful)
    assert first.run_id == second.run_id
    assert runs_of(first.client, config, record) == [first.run_id]
    assert second.client.get_run(second.run_id).info.status == "RUNNING"
    saved = RunRecord.require(record.folder)
    assert saved.mlflow == {"uri": tracking_uri(config), "experiment": "shardline", "run_id": first.run_id}
    other = open_tracker(config, dataclasses.replace(record, job_id=uuid.uuid4().hex))
    assert other.run_id != first.run_id


def test_replayed_steps_are_not_written_again(config: Config, record: RunRecord) -> None:
    killed = open_tracker(config, record)
    for step in (10, 20, 30):
        killed.log({"train/loss": 1.0 / step, "train/accuracy": step / 100}, step)
    killed.flush()
    resumed = open_tracker(config, record)  # goes on after step 10
    for step in (20, 30, 40):
        resumed.log({"train/loss": -1.0, "train/accuracy": -1.0}, step)
    resumed.flush()
    assert history(resumed, "train/loss") == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30), (40, -1.0)]
    assert history(resumed, "train/accuracy") == [(10, 0.1), (20, 0.2), (30, 0.3), (40, -1.0)]


def test_a_figure_that_the_killed_try_had_not_reached_is_written(config: Config, record: RunRecord) -> None:
    open_tracker(config, record).log({"train/loss": 1.0}, 20)
    open_tracker(config, record).log({"train/loss": 2.0, "val/loss": 3.0}, 20)
    tracker = open_tracker(config, record)
    assert history(tracker, "train/loss") == [(20, 1.0)]
    assert history(tracker, "val/loss") == [(20, 3.0)]


def test_one_tracker_writes_a_step_once(config: Config, record: RunRecord) -> None:
    tracker = open_tracker(config, record)
    for step in (5, 5, 10):
        tracker.log({"val/loss": float(step)}, step)
    tracker.flush()
    assert history(tracker, "val/loss") == [(5, 5.0), (10, 10.0)]


def test_points_are_written_together_and_the_last_ones_at_the_end(config: Config, record: RunRecord) -> None:
    tracker = open_tracker(config, record)
    for step in (1, 2, 3):
        tracker.log({"train/loss": float(step)}, step)
    assert history(tracker, "train/loss") == [(1, 1.0)], "the first at once, so that somebody who looks sees that it works"
    tracker.finish()
    assert history(tracker, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_write_does_not_wait_for_more_points_than_mlflow_takes(config: Config, record: RunRecord) -> None:
    tracker = open_tracker(config, record)
    for step in range(MAX_HELD_POINTS + 1):
        tracker.log({"train/loss": float(step)}, step)
    assert len(history(tracker, "train/loss")) == MAX_HELD_POINTS + 1


def test_final_figures_are_one_point_and_the_headline(config: Config, record: RunRecord) -> None:
    for _ in range(2):
        tracker = open_tracker(config, record)
        tracker.log_final({"test/accuracy": 0.75, "test/loss": 0.5}, headline="**test accuracy 0.7500**")
        tracker.finish()
    assert history(tracker, "test/accuracy") == [(0, 0.75)]
    run = tracker.client.get_run(tracker.run_id)
    assert run.data.metrics == {"test/accuracy": 0.75, "test/loss": 0.5}
    assert run.data.tags["mlflow.note.content"] == "**test accuracy 0.7500**"
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("outcome", "status"), [("running", "SCHEDULED"), ("done", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_a_run_that_was_only_checked_waits_for_its_training_and_another_keeps_its_end(
    config: Config, record: RunRecord, outcome: Outcome, status: str
) -> None:
    tracker = open_tracker(config, record)
    tracker.leave(outcome)
    assert tracker.client.get_run(tracker.run_id).info.status == status
    trained = open_tracker(config, record)
    assert trained.run_id == tracker.run_id
    assert trained.client.get_run(trained.run_id).info.status == "RUNNING"


def test_a_run_says_what_was_trained_on_what(config: Config, record: RunRecord, tmp_path: Path) -> None:
    tracker = open_tracker(config, record)
    (tmp_path / "note.txt").write_text("kept")
    tracker.log_file(tmp_path / "note.txt", "evaluation")
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.run_name == "tracked"
    assert run.data.params["model.channels"] == "[8, 16]"
    assert run.data.params["optimizer.args.momentum"] == "0.5"
    assert run.data.params["seed"] == "1999"
    assert run.data.tags["shardline.data_digest"] == "d" * 64
    assert (run.data.tags["mlflow.source.git.commit"], run.data.tags["git.dirty"]) == ("0" * 40, "true")
    artifacts = Path(config.runs_dir) / "mlartifacts" / tracker.run_id / "artifacts"
    assert (artifacts / "evaluation/note.txt").read_text() == "kept"
    assert "channels" in (artifacts / "config.yaml").read_text()


def test_runs_are_tracked_in_the_runs_folder_unless_a_server_is_named(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(dataclasses.replace(config, runs_dir="runs")) == f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"
    server = dataclasses.replace(config, tracking=TrackingConfig(uri="http://127.0.0.1:5000"))
    assert tracking_uri(server) == "http://127.0.0.1:5000"


MAKES_THE_DATABASE = """
import sys
from pipeline.config import Config
from pipeline.tracking.run import open_client
print("begins", flush=True)
open_client(Config(runs_dir=sys.argv[1]))
"""


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKES_THE_DATABASE, str(tmp_path)]
    half_made = tmp_path / ".mlflow.db.tmp"
    with subprocess.Popen(command) as process:
        wait_until(lambda: half_made.exists() and half_made.stat().st_size > 0, "the database to be begun", seconds=60)
        process.kill()
    assert not (tmp_path / "mlflow.db").exists()
    client = open_client(Config(runs_dir=str(tmp_path)))
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_run_that_was_killed_before_its_parameters_gets_them(config: Config, record: RunRecord) -> None:
    client = open_client(config)
    experiment = client.get_experiment_by_name("shardline") or client.get_experiment(client.create_experiment("shardline"))
    client.create_run(experiment.experiment_id, tags={"shardline.job_id": record.job_id})
    tracker = open_tracker(config, record)
    assert tracker.client.get_run(tracker.run_id).data.params["model.channels"] == "[8, 16]"
