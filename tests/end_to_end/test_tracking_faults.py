"""Whatever a tracking server does, a training ends, its main thread never waits for it, and no point is lost or told twice."""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking.journal import read_entries
from tests.mlflow_server import MlflowServer, Proxy, mlflow_server, proxy_before
from tests.processes import shardline, wait_until

SETTINGS = ["--trainer.log_every_steps=1", "--model.channels=[8]", "--data.num_workers=0"]
SETTINGS += ["--data.global_batch_size=64", "--preprocess.resize=[16,16]"]
STEPS_AN_EPOCH = 16
LONG, SHORT = 20, 4  # epochs
MOST_SECONDS = 0.05
MOST_CPU_SECONDS = 300e-6
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards of digits."""
    folder = tmp_path_factory.mktemp("faults")
    assert shardline("shard", cwd=folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """MLflow, for all tests of this file."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    """A proxy before it."""
    with proxy_before(server) as started:
        yield started


def newest_step(run_dir: Path) -> int:
    entries = read_entries(run_dir / "tracking/points.jsonl")
    return max((step for entry, _ in entries for _, _, _, step in entry.get("points", ())), default=0)


def train(workspace: Path, name: str, uri: str, during: Callable[[Path], None], epochs: int, **environment: str) -> None:
    """Train as one rank while `during` makes its trouble; requires that its main thread hardly noticed."""
    run_dir, report = workspace / "runs" / name, workspace / f"{name}.json"
    arguments = [f"--name={name}", "--dataset.path=data/digits", f"--tracking.uri={uri}", *SETTINGS]
    arguments.append(f"--trainer.max_epochs={epochs}")
    trouble = threading.Thread(target=during, args=(run_dir,))
    trouble.start()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "timed_training.py"), str(report), *arguments],
        cwd=workspace,
        env={**os.environ, "OMP_NUM_THREADS": "1", **PATIENCE, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    trouble.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert newest_step(run_dir) == epochs * STEPS_AN_EPOCH
    found = json.loads(report.read_text())
    seconds, what = found["longest_wait"]
    cpu, opened = statistics.median(found["cpu_seconds"]), found["open"][0]
    print(
        f"{name}: longest wait {1000 * seconds:.1f} ms in {what}, opened in {1000 * opened:.0f} ms, {1e6 * cpu:.0f} us a call"
    )
    assert seconds < MOST_SECONDS, f"waited {seconds:.3f} s in {what}"
    assert cpu < MOST_CPU_SECONDS


def require_all_there(workspace: Path, name: str, server: MlflowServer) -> None:
    """The server holds every point of the run's journals exactly once, and shows the run as finished."""
    run_dir = workspace / "runs" / name
    synced = shardline("sync", f"runs/{name}", cwd=workspace, **PATIENCE)
    assert synced.returncode == 0, synced.stderr
    run_id = json.loads((run_dir / "run.json").read_text())["mlflow"]["run_id"]
    told: dict[str, list[tuple[int, float]]] = {}
    for path in (run_dir / "tracking").glob("*.jsonl"):
        for entry, _ in read_entries(path):
            for key, value, _, step in [*entry.get("points", ()), *entry.get("final", ())]:
                told.setdefault(key, []).append((step, value))
    assert [step for step, _ in told["train/loss"]] == list(range(1, len(told["train/loss"]) + 1))
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() == told.keys()
    for key, points in told.items():
        history = [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
        assert sorted(history) == sorted(points), key
    job_id = run.data.tags["shardline.job_id"]
    assert len(client.search_runs([run.info.experiment_id], f"tags.`shardline.job_id` = '{job_id}'")) == 1


def left_alone(run_dir: Path) -> None:
    """No trouble."""


def test_a_server_that_is_killed_and_comes_back(workspace: Path, server: MlflowServer) -> None:
    def kill_and_restart(run_dir: Path) -> None:
        wait_until(lambda: newest_step(run_dir) >= 10, "step 10")
        server.kill()
        wait_until(lambda: newest_step(run_dir) >= 200, "step 200")
        server.start()

    train(workspace, "killed", server.uri, kill_and_restart, LONG)
    require_all_there(workspace, "killed", server)


@pytest.mark.parametrize("seconds", [8.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_server_that_hangs_for_a_while(workspace: Path, server: MlflowServer, seconds: float) -> None:
    def stop(run_dir: Path) -> None:
        wait_until(lambda: newest_step(run_dir) >= 10, "step 10")
        server.send(signal.SIGSTOP)
        time.sleep(seconds)
        server.send(signal.SIGCONT)

    name = f"hangs-{seconds:.0f}"
    train(workspace, name, server.uri, stop, LONG, **({"MLFLOW_HTTP_REQUEST_TIMEOUT": "30"} if seconds > 30 else {}))
    require_all_there(workspace, name, server)


@pytest.mark.parametrize("fault", ["500", "401", "artifacts"])
def test_a_server_that_fails_throughout(workspace: Path, server: MlflowServer, proxy: Proxy, fault: str) -> None:
    proxy.fault = fault  # type: ignore[assignment]
    train(workspace, f"fails-{fault}", proxy.uri, left_alone, SHORT)
    refused = shardline("sync", f"runs/fails-{fault}", cwd=workspace, **PATIENCE)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "Run `shardline sync` again later" in refused.stderr
    assert ("asks for a name and a password" in refused.stderr) == (fault == "401")
    assert ("points" in refused.stderr) == (fault != "artifacts")
    proxy.fault = "none"
    require_all_there(workspace, f"fails-{fault}", server)


def test_a_server_that_takes_its_time(workspace: Path, server: MlflowServer, proxy: Proxy) -> None:
    proxy.fault = "slow"
    train(workspace, "slow", proxy.uri, left_alone, LONG, MLFLOW_HTTP_REQUEST_TIMEOUT="30")
    # What delivers has MLflow to import first, which may take longer than all of the training.
    wait_until(lambda: proxy.num_requests >= 1, "a request")
    proxy.fault = "none"
    require_all_there(workspace, "slow", server)


def test_no_server_at_all(workspace: Path, server: MlflowServer) -> None:
    uri = "http://127.0.0.1:9"
    settings = [*SETTINGS, f"--trainer.max_epochs={SHORT}", f"--tracking.uri={uri}", "--dataset.path=data/digits"]
    done = shardline("train", "--name=alone", *settings, cwd=workspace)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert f"MLflow at {uri} cannot be reached" in said
    assert "deliver them with `shardline sync runs/alone`" in said
    refused = shardline("sync", "runs/alone", cwd=workspace)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    moved = shardline("sync", "runs/alone", "--uri", server.uri, cwd=workspace)
    assert moved.returncode == 0, moved.stderr
    run_id = json.loads((workspace / "runs/alone/run.json").read_text())["mlflow"]["run_id"]
    history = MlflowClient(server.uri).get_metric_history(run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, SHORT * STEPS_AN_EPOCH + 1))
