"""Where runs are tracked, and what is known of a run there. Only what delivers or asks opens a client; stages never do."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pipeline.config import CREDENTIALS, Config, TrackingConfig, require_tracking_uri
from pipeline.errors import RunError
from pipeline.files import locked, publish, temporary_name, write_json
from pipeline.tracking.journal import FOLDER

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
DATABASE_WAIT_SECONDS = 120.0
PLACE = FOLDER / "delivered.json"
# Quiet, without telemetry, and with failures that show after one try: whoever calls has patience of its own. A call may take
# 10 s on a slow server, and a picture's upload longer.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Server:
    """A tracking server, or a sqlite file with a folder of artifacts, and the experiment in it."""

    uri: str
    experiment: str
    artifacts: str | None = None  # folder's URI, for a new experiment in the sqlite file

    def arguments(self) -> list[str]:
        """The words of a command line that `from_arguments` reads."""
        return [self.uri, self.experiment, self.artifacts or ""]

    @classmethod
    def from_arguments(cls, words: list[str]) -> Self:
        """A server from the words of a command line."""
        uri, experiment, artifacts = words
        return cls(uri, experiment, artifacts or None)

    def client(self) -> "MlflowClient":
        """MLflow's client. Makes the sqlite file where there is none."""
        quieten()
        from mlflow import MlflowClient

        _say_only_warnings()  # importing mlflow sets them back
        if self.artifacts is not None:
            _make_database(Path(self.uri.removeprefix(SQLITE)))
        # Without the second word MLFLOW_REGISTRY_URI would send the models elsewhere.
        return MlflowClient(self.uri, self.uri)


def client_of(server: Server) -> "MlflowClient":
    """MLflow's client. Raises RunError where nothing was ever tracked, instead of making a database to ask in vain."""
    if server.artifacts is not None and not Path(server.uri.removeprefix(SQLITE)).is_file():
        raise RunError(f"{server.uri}: nothing was tracked there. Give --tracking.uri, or run `shardline train` first.")
    return server.client()


@dataclass
class Place:
    """RUN/tracking/delivered.json: where the run is in MLflow, what of its journals is there, and what keeps the rest."""

    uri: str = ""
    experiment: str = ""
    experiment_id: str | None = None
    run_id: str | None = None
    delivered: dict[str, int] = field(default_factory=dict)  # bytes of each journal
    trouble: str = ""
    refused: int = 0  # entries that the server will never take
    ended_at: int = 0  # bytes of the journal of points when a process last ended its delivery

    def save(self, run_dir: Path) -> None:
        """Write it, whole or not at all."""
        write_json(run_dir / PLACE, asdict(self))


def place_of(run_dir: Path) -> Place:
    """What is known of a run's delivery; nothing where there is no file, or none that can be read: then all is sent again."""
    try:
        return Place(**json.loads((run_dir / PLACE).read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return Place()


def server_of(config: Config) -> Server:
    """The configured server, or the one that the run is at already, or a sqlite file in the runs folder.

    So a verb that is not told the server, or the experiment, goes on with the run that another made. Raises ConfigError for
    what is no address, and for credentials in one.
    """
    told, place = config.tracking, place_of(config.run_dir)
    require_tracking_uri(told.uri)
    uri, artifacts = told.uri.rstrip("/") or _known_uri(place, Path(config.runs_dir)), None
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE)).resolve()
        uri, artifacts = f"{SQLITE}{database}", (database.parent / ARTIFACTS).as_uri()
    goes_on = bool(place.experiment) and (not told.uri or uri == place.uri)
    is_told = told.experiment != TrackingConfig().experiment
    return Server(uri, place.experiment if goes_on and not is_told else told.experiment, artifacts)


def _known_uri(place: Place, runs_dir: Path) -> str:
    """Where the run is, or will be. Its folder may have been moved with its database, or without."""
    database = runs_dir.resolve() / DATABASE
    is_file = place.uri.startswith(SQLITE)
    is_left_behind = is_file and not database.exists() and Path(place.uri.removeprefix(SQLITE)).exists()
    return place.uri if is_left_behind or (place.uri and not is_file) else f"{SQLITE}{database}"


def without_credentials(text: str) -> str:
    """`text` with the names and passwords of its addresses taken out."""
    return CREDENTIALS.sub(r"\1***@", text)


def quieten() -> None:
    """Set what MLflow should know before it is imported; what the environment says already stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    _say_only_warnings()


def _say_only_warnings() -> None:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def _make_database(path: Path) -> None:
    """See to it that MLflow's sqlite file is there, whole: making it takes seconds, and what a kill left half-made stays so."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, wait_seconds=DATABASE_WAIT_SECONDS):
        if path.exists():
            return
        temporary = temporary_name(path)
        for left_over in path.parent.glob(f"{temporary.name}*"):
            left_over.unlink()
        MlflowClient(f"sqlite:///{temporary.resolve()}").search_experiments()
        publish(temporary, path)
