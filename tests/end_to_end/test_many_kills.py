"""A training that is killed again and again, at any moment and in any way, ends as if nobody had touched it."""

import functools
import hashlib
import json
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch

from pipeline.training.checkpoint import checkpoints_in, step_of
from tests.processes import kill, launcher_of, processes_of, ranks_of, shardline, started, wait_until

STEPS = 12 * 22  # epochs of 22 steps
SETTINGS = [
    "--dataset.path=data/digits",
    "--data.global_batch_size=48",  # 2 and 3 ranks share it
    "--data.augment.rotate_degrees=10",
    "--model.dropout=0.3",
    "--trainer.max_epochs=12",
    "--trainer.checkpoint_every_steps=4",
    "--trainer.log_every_steps=1",
    "--trainer.ema_decay=0.99",
    "--trainer.validate_every_steps=10",
]
TIMES = ("train/images_per_second", "train/data_wait_share")
WAYS = ("a rank", "torchrun", "everything", "the front door", "in a checkpoint write", "SIGTERM", "SIGUSR1")


def arguments(name: str) -> list[str]:
    return ["train", f"--name={name}", *SETTINGS]


def weights_of(run_dir: Path) -> str:
    """Sha256 over the tensors of the last checkpoint: weights, their average, momentum."""
    checkpoint = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["shardline"]["global_step"] == STEPS
    digest = hashlib.sha256()
    for part in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        for name, tensor in part.items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    for state in checkpoint["optimizer_states"][0]["state"].values():
        digest.update(state["momentum_buffer"].numpy().tobytes())
    return digest.hexdigest()


def curves_of(workspace: Path, run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric of the job's only MLflow run, in the order in which they were written."""
    record = json.loads((run_dir / "run.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{workspace}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'shardline'")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`shardline.job_id` = '{record['job_id']}'")
    assert run.info.status == "FINISHED"
    with sqlite3.connect(workspace / "runs/mlflow.db") as database:
        query = "SELECT key, step FROM metrics WHERE run_uuid = ? GROUP BY key, step HAVING COUNT(*) > 1"
        assert database.execute(query, (run.info.run_id,)).fetchall() == []
        jobs = database.execute("SELECT COUNT(*) FROM tags WHERE value = ?", (record["job_id"],)).fetchone()
        assert jobs == (1,)
    # How fast a run was is another matter each time.
    names = [name for name in run.data.metrics if not name.startswith(("perf/", "system/")) and name not in TIMES]
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: [(point.step, point.value) for point in history] for name, history in histories.items()}


def newest_step(run_dir: Path) -> int:
    return max((step_of(path) for path in checkpoints_in(run_dir)), default=0)


def has_reached(run_dir: Path, step: int) -> bool:
    return newest_step(run_dir) >= step


def hurt(way: str, run_dir: Path, front_door: subprocess.Popen[bytes], draw: random.Random) -> None:
    """End a training in one of WAYS."""
    if way == "in a checkpoint write":
        deadline = time.monotonic() + 30
        while not list((run_dir / "checkpoints").glob(".step-*.ckpt.tmp")) and time.monotonic() < deadline:
            pass  # the file is there for milliseconds
        kill(front_door.pid, *processes_of(run_dir))
    elif way == "everything":
        kill(front_door.pid, *processes_of(run_dir))
    elif way == "the front door":
        kill(front_door.pid)
    elif way == "torchrun":
        kill(launcher_of(run_dir))
    elif way == "a rank":
        kill(draw.choice(list(ranks_of(run_dir).values())))
    else:
        front_door.send_signal(signal.Signals[way])


def run_with_kills(workspace: Path, name: str, ranks: int, ways: list[str], draw: random.Random) -> dict[str, int]:
    """Start the training once for each way to end it, then let it finish; returns how often each way struck."""
    run_dir, log = workspace / "runs" / name, workspace / f"{name}.log"
    struck: dict[str, int] = {}
    with started(*arguments(name), cwd=workspace, log=log, PROCS=str(ranks)) as front_door:
        # job_id is on disk, and importing MLflow takes longer than this.
        wait_until((run_dir / "run.json").exists, "run.json")
        kill(front_door.pid, *processes_of(run_dir))
        assert json.loads((run_dir / "run.json").read_text())["mlflow"]["run_id"] is None
    for way in ways:
        wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)
        goal = min(newest_step(run_dir) + draw.randrange(1, 16), STEPS - 4)
        with started(*arguments(name), cwd=workspace, log=log, PROCS=str(ranks)) as front_door:
            wait_until(functools.partial(has_reached, run_dir, goal), f"step {goal}")
            if front_door.poll() is None:
                time.sleep(draw.random() * 0.1)
                hurt(way, run_dir, front_door, draw)
                struck[way] = struck.get(way, 0) + 1
                front_door.wait(timeout=60)
        if way.startswith("SIG"):
            assert front_door.returncode == 143, log.read_text()
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)
    last = shardline(*arguments(name), cwd=workspace, PROCS=str(ranks))
    assert last.returncode == 0, last.stderr
    return struck


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("ranks", "num_kills"),
    [(2, 3), pytest.param(2, 19, marks=pytest.mark.slow), pytest.param(3, 19, marks=pytest.mark.slow)],
)
def test_a_training_that_is_killed_again_and_again_ends_as_the_undisturbed_one(
    workspace: Path, undisturbed_run: Callable[[int], Path], ranks: int, num_kills: int
) -> None:
    undisturbed = undisturbed_run(ranks)
    name = f"many-kills-{ranks}-{num_kills}"
    draw = random.Random(num_kills * 10 + ranks)
    ways = [WAYS[n % len(WAYS)] for n in range(num_kills)]
    draw.shuffle(ways)

    struck = run_with_kills(workspace, name, ranks, ways, draw)

    print(f"{ranks} ranks: killed before its MLflow run was made, and {struck}")
    assert sum(struck.values()) >= num_kills - 2, "the training ended before most of the kills"
    assert weights_of(workspace / "runs" / name) == weights_of(undisturbed)
    curves = curves_of(workspace, workspace / "runs" / name)
    assert [step for step, _ in curves["train/loss"]] == list(range(1, STEPS + 1)), "no gap, no repeat"
    assert curves == curves_of(workspace, undisturbed)
    stray = [path.name for path in (workspace / "runs" / name / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not stray


@pytest.fixture(scope="module")
def undisturbed_run(workspace: Path) -> Callable[[int], Path]:
    """A function that gives the folder of an undisturbed run on so many ranks."""

    def run(ranks: int) -> Path:
        done = shardline(*arguments(f"calm-{ranks}"), cwd=workspace, PROCS=str(ranks))
        assert done.returncode == 0, done.stderr
        return workspace / f"runs/calm-{ranks}"

    return run
