"""What a stage says of its run: curves, figures, tags, files, pictures, a model. Nothing here waits for MLflow.

Everything goes to the run's journal first (see `journal`), and a process of its own delivers it to MLflow (see `deliver`).
A killed job replays the steps since its last checkpoint; the replay is bit-identical, so points that the journal has are not
added again, and each (metric, step) reaches MLflow once.
"""

import contextlib
import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.config import Config
from pipeline.console import say
from pipeline.files import write_bytes
from pipeline.manifest import DatasetManifest
from pipeline.run import Outcome, RunRecord
from pipeline.tracking.deliver import LONGEST_DRAIN_SECONDS, REFUSED, left_over, wait_for_delivery
from pipeline.tracking.journal import FILES, FOLDER, POINTS, Entry, Journal, final_figures, last_steps, read_entries
from pipeline.tracking.provenance import describe_dataset, describe_run, parameters, settings
from pipeline.tracking.server import Place, Server, place_of, server_of

Status = Literal["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"]
STATUS: dict[Outcome, Status] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# MLflow takes letters of any script, digits and these.
_NOT_IN_KEYS = re.compile(r"[^\w.\- :/]")
SECONDS_BETWEEN_LOOKS = 5.0


class RunTracker:
    """Writes down what belongs to one MLflow run. `train/*` and `val/*` go by global step, final figures without one."""

    def __init__(self, run_dir: Path, server: Server, *, sample: bool = False) -> None:
        self.run_dir, self.server, self.sample = run_dir, server, sample
        self._points = Journal(run_dir / FOLDER / POINTS)
        self._files = Journal(run_dir / FOLDER / FILES)
        self._last_step = last_steps(self._points.path)
        self._final = final_figures(self._points.path)
        self._images = {(entry["key"], entry["step"]) for entry, _ in read_entries(self._files.path) if "key" in entry}
        self._deliverer: subprocess.Popen[bytes] | None = None
        self._looked_at = 0.0
        self._said = ""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write down the metrics of a global step, unless an earlier try of the job has."""
        now = int(time.time() * 1000)
        points = []
        for name, value in metrics.items():
            key = metric_key(name)
            if step > self._last_step.get(key, -1):
                self._last_step[key] = step
                points.append([key, value, now, step])
        if points:
            self._add(self._points, {"points": points})
        self._look_after_delivery()

    def log_final(self, metrics: dict[str, float]) -> None:
        """Write down figures that have no step. One that is there already with the same value is not written again."""
        new = {metric_key(name): value for name, value in metrics.items()}
        new = {key: value for key, value in new.items() if repr(self._final.get(key)) != repr(value)}
        self._final |= new
        if new:
            now = int(time.time() * 1000)
            self._add(self._points, {"final": [[key, value, now, 0] for key, value in new.items()]})

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run; `mlflow.runName` and `mlflow.note.content` are its name and description."""
        self._add(self._points, {"tags": tags})

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file of the run folder as an artifact, as it will be when it is delivered."""
        self._add(self._files, {"file": str(path.relative_to(self.run_dir)), "folder": folder})

    def log_image(self, key: str, png: bytes, step: int) -> None:
        """Add a picture (the bytes of a PNG) to the pictures `key`, which MLflow shows by step; each (key, step) once."""
        key = metric_key(key)
        if (key, step) in self._images:
            return
        self._images.add((key, step))
        path = FOLDER / "images" / f"{key.replace('/', '-')}-{step}.png"
        self._guard(lambda: write_bytes(self.run_dir / path, png))
        self._add(self._files, {"image": str(path), "key": key, "step": step, "time": int(time.time() * 1000)})

    def log_table(self, name: str, columns: dict[str, list[Any]], images: list[str]) -> None:
        """Keep a table as the artifact `name` (.json); the columns `images` hold paths of pictures, below the run folder."""
        self._add(self._files, {"table": name, "columns": columns, "images": images})

    def log_model(self, entry: Entry) -> None:
        """Log the model that `entry` describes (see `registry.register_model`), and register it."""
        self._add(self._files, {"model": entry})

    def flush(self) -> None:
        """Have what was said survive a power cut. A checkpoint must come after it: the steps before are not taken again."""
        self._guard(self._points.make_durable)

    def begin(self, config: Config, record: RunRecord, status: Status | None, inputs: list[Entry] | None) -> None:
        """Say what the run is, with its data sets, and how it stands now. A stage after training adds nothing to that."""
        begin: Entry = {"job_id": record.job_id, "name": record.name, "tags": {}, "params": {}}
        if inputs is not None:
            begin |= {"tags": describe_run(record), "params": parameters(config)}
        self._add(self._points, {"begin": begin, "inputs": inputs or []})
        if inputs:
            self._add(self._files, {"text": yaml.safe_dump(settings(config), sort_keys=False), "name": "config.yaml"})
        self._say_status(status)

    def finish(self, status: Status | None = "FINISHED") -> None:
        """Say how the run stands and let go of it; what is not delivered yet goes on being so for a while."""
        self._say_status(status)
        self.flush()
        if self._deliverer is not None:
            assert self._deliverer.stdin is not None
            with contextlib.suppress(OSError):
                self._deliverer.stdin.close()
        self._points.close()
        self._files.close()

    def leave(self, outcome: Outcome) -> None:
        """Give the run the status that its training has: SCHEDULED where that is still to come."""
        self.finish("SCHEDULED" if outcome == "running" else STATUS[outcome])

    def _say_status(self, status: Status | None) -> None:
        if status is not None:
            self._add(self._points, {"status": status, "time": int(time.time() * 1000)})

    # ---- never costs a run ----

    def _add(self, journal: Journal, entry: Entry) -> None:
        self._guard(lambda: journal.add(entry))

    def _guard(self, write: Any) -> None:
        """Do without a line where the disk has no room for it: the training is worth more."""
        try:
            write()
        except OSError as error:
            self._say(f"{self.run_dir / FOLDER}: {error.strerror}; points are being lost. Training goes on.")

    def _look_after_delivery(self) -> None:
        """Start the deliverer again where something ended it, and say once what keeps it from delivering."""
        if self._deliverer is None or time.monotonic() - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return
        self._looked_at = time.monotonic()
        if self._deliverer.poll() is not None:
            self.start_delivery()
        trouble = ""
        with contextlib.suppress(OSError):  # a network file system has its moments
            trouble = place_of(self.run_dir).trouble
        if trouble:
            self._say(
                f"{trouble}. Training goes on; what is to be told lies in {self.run_dir / FOLDER} and is delivered later."
            )

    def _say(self, message: str) -> None:
        if message != self._said:
            self._said = message
            say(message)

    def start_delivery(self) -> None:
        """Start the process that delivers; it ends after this one has, or has let go of the run."""
        command = [sys.executable, "-m", "pipeline.tracking.deliver", str(self.run_dir.resolve()), *self.server.arguments()]
        command += ["--sample"] if self.sample else []
        self._looked_at = time.monotonic()
        try:
            with (self.run_dir / FOLDER / "deliver.log").open("ab") as log:
                self._deliverer = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            self._say(f"the process that delivers to MLflow did not start ({error}); `shardline sync` will deliver.")


def open_tracker(
    config: Config, record: RunRecord, status: Status | None = "RUNNING", manifest: DatasetManifest | None = None
) -> RunTracker:
    """Return the tracker of the record's job; its MLflow run will be found by job_id, or made.

    run.json holds the job_id before the run is made, so a kill between the two cannot make a second run. `status` is what the
    run becomes now, None for what it is; of `manifest` the run shows the data set. Training alone is RUNNING, and its machine
    is watched.
    """
    tracker = RunTracker(config.run_dir, server_of(config), sample=status == "RUNNING")
    tracker.begin(config, record, status, None if manifest is None else describe_dataset(manifest))
    tracker.start_delivery()
    place = place_of(config.run_dir)
    if place.uri == tracker.server.uri:
        record.mlflow = run_in(place)
    return tracker


def settle(config: Config, record: RunRecord | None, seconds: float = LONGEST_DRAIN_SECONDS) -> dict[str, str]:
    """Wait until the process that delivers has ended, at most so long; put the MLflow run into run.json.

    Returns what a closing box says of what is still local: nothing when all is delivered.
    """
    with contextlib.suppress(KeyboardInterrupt):  # the stage is done, whoever does not want to wait
        wait_for_delivery(config.run_dir, seconds)
    place = place_of(config.run_dir)
    if record is not None and record.mlflow != run_in(place):
        record.mlflow = run_in(place)
        record.save()
    left = left_over(config.run_dir)
    why = f" ({place.trouble})" if place.trouble else ""
    facts = {"still local": f"{left}{why}; deliver them with `shardline sync {config.run_dir}`"} if left else {}
    return facts | ({"refused": f"{place.refused} by MLflow, see {config.run_dir / REFUSED}"} if place.refused else {})


def run_in(place: Place) -> dict[str, str | None]:
    """The MLflow run, as run.json names it."""
    return {"uri": place.uri or None, "experiment": place.experiment or None, "run_id": place.run_id}


def metric_key(name: str) -> str:
    """A name as MLflow takes it: what it refuses in class names becomes `_`, and some digits keep such names apart.

    A thousand emoji are the same `_` but for the digits: four of them would make eight pairs, of which one each was lost.
    """
    key = "/".join("_" if not part.strip(". ") else _NOT_IN_KEYS.sub("_", part) for part in name.split("/"))[:236]
    return key if key == name else f"{key}.{hashlib.sha256(name.encode()).hexdigest()[:8]}"
