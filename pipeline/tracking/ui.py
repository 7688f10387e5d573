"""MLflow's pages for the runs of a folder, and the links that are worth opening.

MLflow's own link opens on a page for language models, and its runs table shows no curve; ours lead to a run's curves, to the
comparison of all runs, and to the model. A team's server is only linked to: it runs elsewhere.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config
from pipeline.console import say
from pipeline.distributed import die_with_parent
from pipeline.errors import ConfigError, ProcessError, RunError
from pipeline.tracking.server import ARTIFACTS, PLACE, SETTINGS, Place, Server, place_of, server_of

HOST = "127.0.0.1"
KIND = "workflowType=machine_learning"
LOG = "mlflow-server.log"
START_SECONDS = 180.0
END_SECONDS = 10.0


def show_ui(config: Config, port: int) -> None:
    """Print the links and serve them until ^C; those of a configured server are only printed."""
    server = server_of(config)
    runs_dir = Path(config.runs_dir)
    if server.uri.startswith(("http://", "https://")):
        _say_links(links(server.uri.rstrip("/"), newest_place(runs_dir, server), newest_model(server)))
        return
    port = require_free(port)
    model = newest_model(server)  # makes the database, too, where nothing was tracked yet
    with _served(server, runs_dir, port) as process:
        _say_links(links(f"http://{HOST}:{port}", newest_place(runs_dir, server), model))
        say("^C ends it")
        process.wait()
        raise ProcessError(f"MLflow's server ended with {process.returncode}; its last words are in {runs_dir / LOG}.")


def links(address: str, place: Place | None, model: str) -> dict[str, str]:
    """The pages of a server, by what they show."""
    if place is None:
        return {"runs": f"{address}/#/experiments?{KIND}", "training": "none yet: its curves are there as soon as one starts"}
    experiment = f"{address}/#/experiments/{place.experiment_id}"
    found = {
        "training": f"{experiment}/runs/{place.run_id}/model-metrics?{KIND}",
        "comparison": f"{experiment}/runs?{KIND}&compareRunsMode=CHART",
    }
    return found | ({"model": f"{address}/#/models/{model}?{KIND}"} if model else {})


def _say_links(found: dict[str, str]) -> None:
    # Not in a box: a link that a frame breaks in two cannot be clicked.
    width = max(map(len, found))
    say("\n".join(f"  {name:<{width}}  {link}" for name, link in found.items()))


def newest_place(runs_dir: Path, server: Server) -> Place | None:
    """Where in `server` the run is that was last delivered from `runs_dir`; None without one."""
    paths = sorted(runs_dir.glob(f"*/{PLACE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    places = (place_of(path.parents[len(PLACE.parts) - 1]) for path in paths)
    return next((place for place in places if place.uri == server.uri and place.run_id is not None), None)


def newest_model(server: Server) -> str:
    """The registered model that last changed; empty without one. Raises RunError when the server does not answer."""
    client = server.client()
    try:
        found = client.search_registered_models(max_results=1, order_by=["last_updated_timestamp DESC"])
    except Exception as error:
        from pipeline.tracking.deliver import describe_trouble

        raise RunError(f"{describe_trouble(error, server.uri)}.") from error
    return str(found[0].name) if found else ""


def require_free(port: int) -> int:
    """The port, or a free one for 0. Raises ConfigError when another program has it."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"`--port` is {port}; it must be from 1 to 65535, or 0 for a free one.")
    with socket.socket() as probe:
        # As the server itself will: a port that was given back a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            raise ConfigError(
                f"port {port} needs the rights of root: give --port 5000, or --port 0 for any free one."
            ) from None
        except OSError:
            raise ConfigError(
                f"port {port} is taken, perhaps by another `shardline ui`: end that one, or give --port {port + 1}, "
                "or --port 0 for any free one."
            ) from None
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _served(server: Server, runs_dir: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server, answering; it and what it started end with the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", server.uri, "--artifacts-destination", str((runs_dir / ARTIFACTS).resolve())]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    say("starting MLflow's server; this takes some seconds")
    with (runs_dir / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **SETTINGS, **quiet},
            start_new_session=True,
            # After a kill -9 of this process the server would keep its port for ever; on SIGTERM it ends its worker, too.
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
    try:
        _await_health(process, port, runs_dir / LOG)
        yield process
    finally:
        _end(process)


def _await_health(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()
            old = next((line for line in lines if "mlflow db upgrade" in line), "")
            raise ProcessError(f"MLflow's server did not start: {old or next(reversed(lines), 'it said nothing')} (see {log}).")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
            return
        time.sleep(0.2)
    raise ProcessError(f"MLflow's server does not answer after {START_SECONDS:.0f} s; see {log}.")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole group; the server's worker is a process of its own."""
    for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
