"""One MLflow run a job, found again by its job_id, with each (metric, step) written once.

A killed job replays the steps since its last checkpoint. The replay is bit-identical, so points that are already there are
simply not written again.
"""

import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.files import locked, publish, temporary_name
from pipeline.run import Outcome, RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

DATABASE = "mlflow.db"
DATABASE_WAIT_SECONDS = 120.0
JOB_TAG = "shardline.job_id"
# A write takes 10 ms of CPU and each of its points 0.1 ms, so points are kept for a while; MLflow takes 1,000 at once.
SECONDS_BETWEEN_WRITES = 10.0
MAX_HELD_POINTS = 700
STATUS: dict[Outcome, str] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
NAMES = ("seed", "data", "model", "optimizer", "scheduler", "trainer", "preprocess")


class RunTracker:
    """Writes to one MLflow run. `train/*` and `val/*` go by global step, final figures without one."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._last_step: dict[str, int] = {}
        self._held: list[Metric] = []
        self._written_at = -math.inf

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Keep the metrics of a global step to be written soon, unless an earlier try of the job has written them."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(key, value, now, step) for key, value in metrics.items() if step > self._written_until(key)]
        self._last_step |= {point.key: step for point in points}
        self._held += points
        if len(self._held) >= MAX_HELD_POINTS or time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Write what is kept. A checkpoint must come after it: the steps before that are not taken again."""
        held, self._held, self._written_at = self._held, [], time.monotonic()
        if held:
            self.client.log_batch(self.run_id, metrics=held)

    def _written_until(self, key: str) -> int:
        if key not in self._last_step:
            history = self.client.get_metric_history(self.run_id, key)
            self._last_step[key] = max((point.step for point in history), default=-1)
        return self._last_step[key]

    def log_final(self, metrics: dict[str, float], headline: str = "") -> None:
        """Write figures that have no step; `headline` becomes the run's description."""
        written = self.client.get_run(self.run_id).data.metrics
        for key, value in metrics.items():
            if written.get(key) != value:
                self.client.log_metric(self.run_id, key, value)
        if headline:
            self.client.set_tag(self.run_id, "mlflow.note.content", headline)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file as an artifact of the run."""
        self.client.log_artifact(self.run_id, str(path), folder or None)

    def finish(self, status: str = "FINISHED") -> None:
        """Mark the run FINISHED, FAILED or KILLED."""
        self.flush()
        self.client.set_terminated(self.run_id, status)

    def leave(self, outcome: Outcome) -> None:
        """Give the run the status that its training has: SCHEDULED where that is still to come."""
        if outcome == "running":
            self.client.update_run(self.run_id, status="SCHEDULED")
        else:
            self.finish(STATUS[outcome])


def tracking_uri(config: Config) -> str:
    """Where runs are tracked: the configured server, or a sqlite file in the runs folder."""
    return config.tracking.uri or f"sqlite:///{(Path(config.runs_dir) / DATABASE).resolve()}"


def open_tracker(config: Config, record: RunRecord) -> RunTracker:
    """Return the tracker of the record's job: its MLflow run is found by job_id, or made.

    run.json holds the job_id before the run is made, so a kill between the two cannot make a second run.
    """
    client = open_client(config)
    experiment_id = _experiment(client, config)
    query = f"tags.`{JOB_TAG}` = '{record.job_id}'"
    found = client.search_runs([experiment_id], filter_string=query, max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        if not found[0].data.params:  # killed right after the run was made
            _log_parameters(client, run_id, config)
    else:
        tags = {JOB_TAG: record.job_id, "shardline.data_digest": record.data_digest}
        if record.git["commit"]:
            tags |= {"mlflow.source.git.commit": record.git["commit"], "git.dirty": str(record.git["dirty"]).lower()}
        run_id = client.create_run(experiment_id, run_name=record.name, tags=tags).info.run_id
        _log_parameters(client, run_id, config)
    record.mlflow = {"uri": tracking_uri(config), "experiment": config.tracking.experiment, "run_id": run_id}
    record.save()
    return RunTracker(client, run_id)


def open_client(config: Config) -> "MlflowClient":
    """MLflow's client for where this configuration's runs are tracked, quiet and without telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # importing mlflow sets them back
        logging.getLogger(name).setLevel(logging.WARNING)
    if not config.tracking.uri:
        _make_database(Path(config.runs_dir) / DATABASE)
    return MlflowClient(tracking_uri(config))


def _make_database(path: Path) -> None:
    """See to it that MLflow's sqlite file is there, whole: making it takes seconds, and what a kill left half-made stays so."""
    from mlflow import MlflowClient

    with locked(path, wait_seconds=DATABASE_WAIT_SECONDS):
        if path.exists():
            return
        temporary = temporary_name(path)
        for left_over in path.parent.glob(f"{temporary.name}*"):
            left_over.unlink()
        MlflowClient(f"sqlite:///{temporary.resolve()}").search_experiments()
        publish(temporary, path)


def _experiment(client: "MlflowClient", config: Config) -> str:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None if config.tracking.uri else (Path(config.runs_dir) / "mlartifacts").resolve().as_uri()
    return str(client.create_experiment(config.tracking.experiment, artifact_location=location))


def _log_parameters(client: "MlflowClient", run_id: str, config: Config) -> None:
    from mlflow.entities import Param

    values = config.as_dict()
    flat = _flatten({name: values[name] for name in NAMES})
    client.log_batch(run_id, params=[Param(key, str(value)[:250]) for key, value in flat.items()])
    client.log_dict(run_id, values, "config.yaml")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
