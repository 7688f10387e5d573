import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Config, TrackingConfig
from pipeline.errors import ConfigError
from pipeline.tracking.server import PLACE, Place, Server, place_of, server_of, without_credentials
from tests.processes import wait_until


def test_runs_are_tracked_in_the_runs_folder_unless_a_server_is_named(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = server_of(dataclasses.replace(config, runs_dir="runs"))
    assert local.uri == f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"
    assert Server.from_arguments(local.arguments()) == local
    named = server_of(dataclasses.replace(config, tracking=TrackingConfig(uri="http://127.0.0.1:5000")))
    assert named == Server("http://127.0.0.1:5000", "shardline", None)
    assert Server.from_arguments(named.arguments()) == named


def test_a_verb_that_is_not_told_the_server_goes_on_with_the_one_of_the_run(config: Config, tmp_path: Path) -> None:
    here = dataclasses.replace(config, runs_dir=str(tmp_path))
    Place("http://127.0.0.1:5000", "shapes", run_id="a").save(here.run_dir)
    assert server_of(here) == Server("http://127.0.0.1:5000", "shapes")
    told = dataclasses.replace(here, tracking=TrackingConfig(uri="http://127.0.0.1:6000"))
    assert server_of(told).uri == "http://127.0.0.1:6000"


def test_a_password_in_the_address_is_refused() -> None:
    config = Config(tracking=TrackingConfig(uri="https://ann:secret@host"))
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        server_of(config)
    assert without_credentials("at https://ann:secret@host/x and s3://bucket") == "at https://***@host/x and s3://bucket"


MAKES_THE_DATABASE = """
import sys
from pipeline.config import Config
from pipeline.tracking.server import server_of
server_of(Config(runs_dir=sys.argv[1])).client()
"""


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKES_THE_DATABASE, str(tmp_path)]
    half_made = tmp_path / ".mlflow.db.tmp"
    with subprocess.Popen(command) as process:
        wait_until(lambda: half_made.exists() and half_made.stat().st_size > 0, "the database to be begun", seconds=60)
        process.kill()
    assert not (tmp_path / "mlflow.db").exists()
    client = server_of(Config(runs_dir=str(tmp_path))).client()
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    assert not list(tmp_path.glob("*.tmp*"))


def test_what_an_address_holds_before_its_host_is_never_told() -> None:
    assert without_credentials("at https://ann:secr@et@host/x, in http://a/b@c") == "at https://***@host/x, in http://a/b@c"


def test_a_run_that_was_moved_without_its_database_goes_on_there(config: Config, tmp_path: Path) -> None:
    database = tmp_path / "runs" / "mlflow.db"
    database.parent.mkdir()
    database.touch()
    moved = dataclasses.replace(config, runs_dir=str(tmp_path / "moved"))
    Place(f"sqlite:///{database}", "shardline").save(moved.run_dir)
    assert server_of(moved).uri == f"sqlite:///{database}"
    assert server_of(moved).artifacts == (tmp_path / "runs/mlartifacts").as_uri()
    database.unlink()
    assert server_of(moved).uri == f"sqlite:///{tmp_path}/moved/mlflow.db"


def test_a_verb_that_is_not_told_the_experiment_makes_no_second_run(config: Config, tmp_path: Path) -> None:
    here = dataclasses.replace(config, runs_dir=str(tmp_path))
    Place(server_of(here).uri, "shapes", run_id="a").save(here.run_dir)
    assert server_of(here).experiment == "shapes"
    told = dataclasses.replace(here, tracking=TrackingConfig(experiment="others"))
    assert server_of(told).experiment == "others"
    elsewhere = dataclasses.replace(here, tracking=TrackingConfig(uri="http://127.0.0.1:5000"))
    assert server_of(elsewhere).experiment == "shardline"


def test_a_slash_at_the_end_of_an_address_makes_no_other_server(config: Config, tmp_path: Path) -> None:
    here = dataclasses.replace(config, runs_dir=str(tmp_path), tracking=TrackingConfig(uri="http://127.0.0.1:5000/"))
    assert server_of(here).uri == "http://127.0.0.1:5000"


def test_a_sqlite_file_that_is_named_has_its_artifacts_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server = server_of(Config(tracking=TrackingConfig(uri="sqlite:///team/all.db")))
    assert server == Server(f"sqlite:///{tmp_path}/team/all.db", "shardline", (tmp_path / "team/mlartifacts").as_uri())


@pytest.mark.parametrize("content", ["", '{"uri": "htt', '{"of": "a later version"}', "[]"])
def test_a_damaged_note_of_the_delivery_has_all_sent_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / PLACE).write_text(content)
    assert place_of(tmp_path) == Place()


def test_models_go_where_the_run_is_whatever_the_environment_says(
    server: Server, registry: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    assert server.client().search_registered_models() is not None
