import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import Config, TrackingConfig
from pipeline.errors import ConfigError, RunError
from pipeline.tracking import ui
from pipeline.tracking.server import PLACE, Place, Server, server_of
from tests.processes import wait_until

SERVER = Server("http://tracking.example.org:5000", "shapes")


def delivered(runs_dir: Path, name: str, uri: str, run_id: str | None, age: float) -> None:
    """A run folder that knows where its run is, since `age` seconds."""
    (runs_dir / name / "tracking").mkdir(parents=True)
    Place(uri, "shapes", "7", run_id).save(runs_dir / name)
    path = runs_dir / name / PLACE
    os.utime(path, (time.time() - age, time.time() - age))


def test_the_newest_run_of_that_server_is_linked_to(tmp_path: Path) -> None:
    delivered(tmp_path, "old", SERVER.uri, "a" * 32, age=30)
    delivered(tmp_path, "new", SERVER.uri, "b" * 32, age=20)
    delivered(tmp_path, "elsewhere", "http://other", "c" * 32, age=10)
    delivered(tmp_path, "not yet there", SERVER.uri, None, age=0)
    place = ui.newest_place(tmp_path, SERVER)
    assert place is not None
    assert place.run_id == "b" * 32
    assert ui.newest_place(tmp_path / "none", SERVER) is None


def test_links_lead_to_curves_comparison_and_model_and_not_to_pages_for_language_models() -> None:
    found = ui.links("http://h:1", Place(SERVER.uri, "shapes", "7", "r"), "digits")
    assert found == {
        "training": "http://h:1/#/experiments/7/runs/r/model-metrics?workflowType=machine_learning",
        "comparison": "http://h:1/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART",
        "model": "http://h:1/#/models/digits?workflowType=machine_learning",
    }
    assert "model" not in ui.links("http://h:1", Place(SERVER.uri, "shapes", "7", "r"), "")
    assert ui.links("http://h:1", None, "")["runs"] == "http://h:1/#/experiments?workflowType=machine_learning"


def test_a_taken_port_is_refused_with_a_way_out() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is taken, .* give --port {port + 1}, or --port 0"):
            ui.require_free(port)
    assert ui.require_free(port) == port
    assert ui.require_free(0) > 0
    with pytest.raises(ConfigError, match="`--port` is 70000; it must be from 1 to 65535"):
        ui.require_free(70000)


def test_a_configured_server_is_linked_to_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(ui, "_served", started)
    monkeypatch.setattr(ui, "newest_model", lambda server: "digits")
    delivered(tmp_path, "new", SERVER.uri, "b" * 32, age=0)
    ui.show_ui(Config(runs_dir=str(tmp_path), tracking=TrackingConfig(uri=SERVER.uri)), port=5000)
    said = capsys.readouterr().out
    assert re.search(r"training +http://tracking\.example\.org:5000/#/experiments/7/runs/b{32}/model-metrics", said)
    assert re.search(r"model +http://tracking\.example\.org:5000/#/models/digits", said)


def test_a_server_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(RunError, match=f"MLflow at {address} cannot be reached"):
            ui.show_ui(Config(runs_dir=str(tmp_path), tracking=TrackingConfig(uri=address)), port=0)


def test_the_newest_registered_model_is_found(tmp_path: Path) -> None:
    server = server_of(Config(runs_dir=str(tmp_path)))
    assert ui.newest_model(server) == ""
    client = server.client()
    for name in ("first", "second"):
        client.create_registered_model(name)
    assert ui.newest_model(server) == "second"
    time.sleep(0.01)  # MLflow counts in milliseconds
    client.update_registered_model("first", "changed")
    assert ui.newest_model(server) == "first"


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "echo 'out-of-date database schema; take a backup and run mlflow db upgrade sqlite:///x'; echo later; exit 1"
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(ui, "newest_model", lambda server: "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert main(["ui", f"--runs_dir={tmp_path}", "--port=0"]) == 1
    assert "did not start: out-of-date database schema; take a backup and run mlflow db upgrade" in capsys.readouterr().err


def test_a_killed_verb_takes_its_server_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $$ > {pid}.part\nmv {pid}.part {pid}\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    code = f"""
import sys
from pathlib import Path
from pipeline.tracking import ui
from pipeline.tracking.server import Server
sys.executable = {str(tmp_path / "python")!r}
with ui._served(Server("sqlite:///none.db", "shapes"), Path({str(tmp_path)!r}), 1):
    pass
"""
    verb = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_until(pid.is_file, "the server", seconds=30)
    finally:
        verb.kill()
        verb.wait()
    stat = Path(f"/proc/{pid.read_text().strip()}/stat")
    wait_until(lambda: not stat.is_file() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z", "its end", seconds=10)
