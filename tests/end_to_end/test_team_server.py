"""A team's server: who may do what, a whole run by a client without keys of the store, and where no secret may be found."""

import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import team as parts
from tests.processes import shardline
from tests.serving import serving
from tests.team import SECRETS, Team, team_server

pytestmark = [
    pytest.mark.skipif(bool(parts.missing_parts()), reason=f"a team server needs {parts.missing_parts()}"),
]

REPOSITORY = Path(__file__).parents[2]
ADMIN = ("admin", SECRETS["MLFLOW_ADMIN_PASSWORD"])
READER = ("rita", "planted-reader-password")
MEMBER = ("mona", "planted-member-password")
SETTINGS = [
    "--config=digits", "--name=team", "--dataset.path=data/digits", "--tracking.experiment=shapes", "--trainer.max_epochs=1",
    "--model.channels=[8,16]", "--model.convs_per_stage=1", "--data.num_workers=0", "--check.skip=[overfit]",
]  # fmt: skip
API = "/api/2.0/mlflow"
# What a client's shell may hold beside its own account, and must not tell.
PLANTED = {"AWS_ACCESS_KEY_ID": "planted-client-key", "AWS_SECRET_ACCESS_KEY": "planted-client-secret"}


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """A running server with a member, who trains, and a reader; the accounts are made as the docs say."""
    with team_server() as running:
        for name, password in (READER, MEMBER):
            assert _documented("users/create", running.url, name, password=password).returncode == 0
        yield running


def _documented(call: str, url: str, name: str, **values: str) -> subprocess.CompletedProcess[str]:
    """The docs' first call of curl of a kind, for another account or experiment."""
    lines = re.findall(rf"^curl .*{re.escape(call)}$", (REPOSITORY / "docs/tracking.md").read_text(), flags=re.MULTILINE)
    line = lines[0].replace("--user admin", f"--user {':'.join(ADMIN)}")
    for key, value in {"username": name, **values}.items():
        line, found = re.subn(f'("{key}": )"[^"]*"', rf'\1"{value}"', line)
        assert found, key
    return subprocess.run(f"TRACKING={url}; {line}", shell=True, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(team: Team, workspace: Path) -> dict[str, str]:
    """What each verb said to a member who has no key of the store."""
    account = {"MLFLOW_TRACKING_USERNAME": MEMBER[0], "MLFLOW_TRACKING_PASSWORD": MEMBER[1], "PROCS": "1", **PLANTED}
    said = {}
    for verb in ("shard", "check", "train", "evaluate", "export", "promote"):
        done = shardline(verb, *SETTINGS, f"--tracking.uri={team.url}", cwd=workspace, **account)
        assert done.returncode == 0, f"{verb}: {done.stderr}{done.stdout}"
        said[verb] = done.stdout
    assert shardline("sync", "runs/team", cwd=workspace, **account).returncode == 0
    return said


def ask(team: Team, account: tuple[str, str] | None, method: str, path: str, **options: Any) -> requests.Response:
    """One request to the server."""
    return requests.request(method, f"{team.url}{path}", auth=account, timeout=30, **options)


def found_run(team: Team, account: tuple[str, str] = MEMBER) -> dict[str, Any]:
    """The one run of the experiment, as an account sees it."""
    experiment = ask(team, account, "GET", f"{API}/experiments/get-by-name", params={"experiment_name": "shapes"}).json()
    wanted = {"experiment_ids": [experiment["experiment"]["experiment_id"]]}
    (run,) = ask(team, account, "POST", f"{API}/runs/search", json=wanted).json()["runs"]
    return dict(run)


def test_without_an_account_nothing_is_shown(team: Team) -> None:
    for account in (None, ("mona", "wrong"), ("nobody", MEMBER[1])):
        for path in (f"{API}/experiments/get?experiment_id=0", "/api/2.0/mlflow-artifacts/artifacts", f"{API}/users/list"):
            assert ask(team, account, "GET", path).status_code == 401, path
    assert ask(team, MEMBER, "GET", f"{API}/experiments/get?experiment_id=0").status_code == 200


def test_a_request_under_another_host_name_is_refused(team: Team) -> None:
    known, other = SECRETS["MLFLOW_HOST"], "evil.example.com"
    path = f"{API}/experiments/get?experiment_id=0"
    assert ask(team, ADMIN, "GET", path, headers={"Host": known}).status_code == 200
    assert ask(team, ADMIN, "GET", path, headers={"Host": other}).status_code == 403


def test_a_whole_run_is_there_with_its_files_and_the_client_has_no_key(team: Team, trained: dict[str, str]) -> None:
    run = found_run(team)
    assert run["info"]["status"] == "FINISHED"
    metrics = {metric["key"] for metric in run["data"]["metrics"]}
    assert {"train/loss", "val/accuracy", "test/accuracy", "onnx/top1_agreement"} <= metrics
    inside = [key for key in team.objects() if run["info"]["run_id"] in key]
    assert any(key.endswith("config.yaml") for key in inside), inside


def test_a_reader_reads_and_cannot_write(team: Team, trained: dict[str, str]) -> None:
    run = found_run(team, READER)
    run_id, experiment_id = run["info"]["run_id"], run["info"]["experiment_id"]
    place = run["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
    writes: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", f"{API}/runs/create", {"json": {"experiment_id": experiment_id}}),
        ("POST", f"{API}/runs/log-metric", {"json": {"run_id": run_id, "key": "test/accuracy", "value": 1, "timestamp": 1}}),
        ("POST", f"{API}/runs/delete", {"json": {"run_id": run_id}}),
        ("POST", f"{API}/registered-models/alias", {"json": {"name": "team", "alias": "champion", "version": "1"}}),
        ("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{place}/config.yaml", {"data": b"evil"}),
    ]
    for method, path, options in writes:
        assert ask(team, READER, method, path, **options).status_code == 403, path
    files = ask(team, READER, "GET", f"{API}/artifacts/list", params={"run_id": run_id}).json()["files"]
    assert files
    # Permitted as the docs say, the same person may.
    assert _documented("permissions/grant", team.url, READER[0], resource_id=experiment_id).returncode == 0
    assert ask(team, READER, "POST", f"{API}/runs/create", json={"experiment_id": "0"}).status_code == 403
    tag = {"run_id": run_id, "key": "seen", "value": "yes"}
    assert ask(team, READER, "POST", f"{API}/runs/set-tag", json=tag).status_code == 200


ANSWER = """
import sys
import mlflow.onnx, onnxruntime
import numpy as np
from PIL import Image
model = mlflow.onnx.load_model("models:/team@champion")
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
assert mlflow.pyfunc.load_model("models:/team@candidate").metadata.signature.inputs.input_names() == ["image"]
side = session.get_inputs()[0].shape[2:]
pixels = np.asarray(Image.open(sys.argv[1]).convert("RGB").resize(side[::-1]))  # (H, W, 3)
(logits, probabilities) = session.run(None, {"image": pixels.transpose(2, 0, 1)[None]})
print(probabilities.shape, round(float(probabilities.sum()), 3))
"""


def test_the_champion_is_loaded_by_name_in_a_fresh_process_and_answers(
    team: Team, trained: dict[str, str], tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 200, 200)).save(tmp_path / "image.png")
    account = {"MLFLOW_TRACKING_USERNAME": READER[0], "MLFLOW_TRACKING_PASSWORD": READER[1], "MLFLOW_TRACKING_URI": team.url}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(tmp_path / "image.png")], env=os.environ | account, cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 10) 1.0"


def test_a_reader_serves_the_champion(team: Team, trained: dict[str, str], tmp_path: Path) -> None:
    account = {"MLFLOW_TRACKING_USERNAME": READER[0], "MLFLOW_TRACKING_PASSWORD": READER[1]}
    arguments = ["models:/team@champion", f"--tracking.uri={team.url}"]
    with serving(*arguments, cwd=tmp_path, log=tmp_path / "log", **account) as server:
        assert (server.name, server.version) == ("team", "1")
        assert server.get("/model")[1]["proof"].startswith("top-1 agreement 1.0")
        assert server.stop() == 0
    nobody = {"MLFLOW_TRACKING_USERNAME": "x", "MLFLOW_TRACKING_PASSWORD": "y"}
    stranger = shardline("serve", *arguments, "--port=0", cwd=tmp_path, **nobody)
    assert stranger.returncode == 2
    assert "asks for a name and a password" in stranger.stderr
    assert READER[1] not in server.log.read_text()


def test_no_secret_is_in_the_database_the_store_or_the_run_folder(team: Team, trained: dict[str, str], workspace: Path) -> None:
    secrets = [value for name, value in SECRETS.items() if name != "MLFLOW_HOST"]
    secrets += [READER[1], MEMBER[1], *PLANTED.values()]
    secrets += [base64.b64encode(":".join(account).encode()).decode() for account in (ADMIN, READER, MEMBER)]
    folder = workspace / "runs/team"
    places = {"database": team.dump("plain")} | team.objects()
    places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(places) > 10
    assert b"shapes" in places["database"], "the dump does not hold what was tracked"
    leaks = [(name, secret) for name, content in places.items() for secret in secrets if secret.encode() in content]
    assert not leaks


def test_a_backup_brings_accounts_runs_and_files_back(team: Team, trained: dict[str, str], tmp_path: Path) -> None:
    team.restore(team.dump("custom"), "restored")
    for table in ("users", "runs", "latest_metrics", "model_versions", "registered_model_aliases"):
        rows = [team.sql(f"SELECT * FROM {table} ORDER BY 1, 2", database) for database in ("mlflow", "restored")]
        assert rows[0] == rows[1]
        assert rows[0], table
    run_id = found_run(team)["info"]["run_id"]
    before = team.objects()
    shutil.copytree(team.folder / "store", tmp_path / "store")
    team.use_store(tmp_path / "store")
    assert team.objects() == before
    # The server goes on as if nothing had happened.
    config = ask(team, MEMBER, "GET", "/get-artifact", params={"path": "config.yaml", "run_uuid": run_id})
    assert config.text.startswith("name: team\n")
