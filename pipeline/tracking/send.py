"""What each entry of a journal becomes in MLflow. Everything here may be sent twice: it is there once afterwards.

Points keep the time at which they were taken, and MLflow takes the same point of a run once; pictures and tables, which it
would add again, are looked for first.
"""

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunError
from pipeline.tracking.journal import Entry
from pipeline.tracking.provenance import JOB_TAG
from pipeline.tracking.server import Place, Server

if TYPE_CHECKING:
    from mlflow import MlflowClient

KINDS = ("begin", "tags", "status", "text", "file", "image", "table", "model")


def points_of(entries: list[Entry]) -> list[list[Any]]:
    """Every point of the entries, [key, value, milliseconds, step]; figures without a step are points at step 0."""
    return [point for entry in entries for point in [*entry.get("points", ()), *entry.get("final", ())]]


class Sender:
    """Sends to the run that `place` names, and names the run there once it is found or made."""

    def __init__(self, run_dir: Path, server: Server, place: Place) -> None:
        self.run_dir, self.server, self.place = run_dir, server, place
        self._client: MlflowClient | None = None

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client, made when it is first needed."""
        if self._client is None:
            self._client = self.server.client()
        return self._client

    @property
    def run_id(self) -> str:
        """The MLflow run, which the first entry of every journal of points makes."""
        assert self.place.run_id is not None
        return self.place.run_id

    def send(self, entries: list[Entry]) -> None:
        """Send entries: any number with points in one call, or one of another kind. Raises whatever the client does."""
        points = points_of(entries)
        if points:
            self._send_points(points)
        for entry in entries:
            for kind in KINDS:
                if kind in entry:
                    getattr(self, f"_send_{kind}")(entry)

    def is_there(self) -> bool:
        """Whether the run can take anything at all: somebody may have deleted it, and may restore it."""
        return self.place.run_id is None or self.client.get_run(self.run_id).info.lifecycle_stage == "active"

    def set_status(self, status: str, milliseconds: int) -> None:
        """Show the run as RUNNING, SCHEDULED, FINISHED, FAILED or KILLED."""
        if status in ("RUNNING", "SCHEDULED"):
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, end_time=milliseconds)

    def _send_points(self, points: list[list[Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, moment, step) for key, value, moment, step in points]
        self.client.log_batch(self.run_id, metrics=metrics)

    def _send_begin(self, entry: Entry) -> None:
        """Find the job's run, or make it; then say what it is. A parameter that MLflow has is not changed there."""
        from mlflow.entities import Param, RunTag

        begin = entry["begin"]
        if self.place.run_id is None:
            self._find_or_make_run(begin["job_id"], begin["name"])
        known = self.client.get_run(self.run_id).data.params
        changed = {key: value for key, value in begin["params"].items() if known.get(key, value) != value}
        tags = begin["tags"] | {f"changed.{key}": f"{known[key]} -> {value}" for key, value in changed.items()}
        new = {key: value for key, value in begin["params"].items() if key not in known}
        self.client.log_batch(
            self.run_id,
            params=[Param(key, value) for key, value in new.items()],
            tags=[RunTag(key, str(value)) for key, value in tags.items()],
        )
        self._send_inputs(entry["inputs"])

    def _find_or_make_run(self, job_id: str, name: str) -> None:
        self.place.experiment_id = self._experiment()
        found = self._runs_of(job_id)
        if not found:
            made = self.client.create_run(self.place.experiment_id, run_name=name, tags={JOB_TAG: job_id}).info.run_id
            found = self._runs_of(job_id) or [made]
            if found[0] != made:  # a request that had timed out here was served in the end
                self.client.delete_run(made)
        self.place.run_id = found[0]
        self.place.save(self.run_dir)

    def _runs_of(self, job_id: str) -> list[str]:
        """The job's runs, the first that was asked for first."""
        assert self.place.experiment_id is not None
        query, order = f"tags.`{JOB_TAG}` = '{job_id}'", ["attributes.start_time ASC"]
        return [run.info.run_id for run in self.client.search_runs([self.place.experiment_id], query, order_by=order)]

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        # Without the kind, MLflow's pages show columns for language models.
        tags = {"mlflow.experimentKind": "custom_model_development", "mlflow.experiment.primaryMetric.name": "val/accuracy"}
        if (experiment := self.client.get_experiment_by_name(self.server.experiment)) is None:
            # Another job may make it at the same moment.
            with contextlib.suppress(MlflowException):
                return str(self.client.create_experiment(self.server.experiment, self.server.artifacts, tags))
            experiment = self.client.get_experiment_by_name(self.server.experiment)
        if experiment is None:
            raise RunError(f"the experiment {self.server.experiment} is not there and cannot be made")
        return str(experiment.experiment_id)

    def _send_inputs(self, inputs: list[Entry]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        there = self.client.get_run(self.run_id).inputs
        known = {(each.dataset.name, each.dataset.digest) for each in there.dataset_inputs} if there else set()
        datasets = []
        for each in inputs:
            facts = {key: value for key, value in each.items() if key != "context"}
            if (each["name"], each["digest"]) not in known:
                datasets.append(DatasetInput(Dataset(**facts), [InputTag("mlflow.data.context", each["context"])]))
        if datasets:
            self.client.log_inputs(self.run_id, datasets=datasets)

    def _send_tags(self, entry: Entry) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in entry["tags"].items()])

    def _send_status(self, entry: Entry) -> None:
        self.set_status(entry["status"], entry["time"])

    def _send_text(self, entry: Entry) -> None:
        self.client.log_text(self.run_id, entry["text"], entry["name"])

    def _send_file(self, entry: Entry) -> None:
        path = self.run_dir / entry["file"]
        if path.is_file():
            self.client.log_artifact(self.run_id, str(path), entry["folder"] or None)
        else:
            note(f"{entry['file']}: gone before it was delivered")

    def _send_image(self, entry: Entry) -> None:
        from PIL import Image

        path = self.run_dir / entry["image"]
        # How MLflow names the files of a picture that has a key and a step; the signs between have changed more than once.
        name = re.compile(rf"images/{re.escape(entry['key']).replace('/', '.')}.step.{entry['step']}.timestamp")
        if not path.is_file():
            note(f"{entry['image']}: gone before it was delivered")
        elif not any(map(name.match, self._artifacts("images"))):
            with Image.open(path) as image:
                pixels = image.convert("RGB")
            self.client.log_image(self.run_id, pixels, key=entry["key"], step=entry["step"], timestamp=entry["time"])

    def _send_table(self, entry: Entry) -> None:
        if entry["table"] in self._artifacts(str(Path(entry["table"]).parent)):
            return  # MLflow would add the same rows to it
        import mlflow

        columns = dict(entry["columns"])
        for name in entry["images"]:
            columns[name] = [mlflow.Image(str(self.run_dir / path)) for path in columns[name]]
        self.client.log_table(self.run_id, columns, entry["table"])

    def _artifacts(self, folder: str) -> list[str]:
        return [info.path for info in self.client.list_artifacts(self.run_id, folder)]

    def _send_model(self, entry: Entry) -> None:
        from pipeline.tracking.registry import register_model

        register_model(self.client, self.run_id, self.run_dir, entry["model"])


def note(message: str) -> None:
    """Write a line into the log of the delivering process."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), message, flush=True)
