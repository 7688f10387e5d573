"""kill -9 at any instant: the same command again gives the weights of a training that nobody disturbed."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import torch

from pipeline.data import native
from tests.processes import kill, launcher_of, processes_of, ranks_of, shardline, started, wait_until

STEPS_PER_EPOCH = 22
SETTINGS = [
    "--data.global_batch_size=48",  # 1, 2 and 3 ranks share it
    "--model.dropout=0.3",
    "--trainer.max_epochs=3",
    "--trainer.checkpoint_every_steps=5",
]
# Rotations are made in Python, by loader processes; crops alone in C, by threads.
ROTATIONS = ["--data.augment.rotate_degrees=10"]
CROPS = [
    "--data.augment.crop_scale=0.6",
    "--data.augment.horizontal_flip=0.5",
    *(f"--data.augment.{name}=0" for name in ("rotate_degrees", "translate", "scale")),
    "--data.decoder=native",
]
needs_native = pytest.mark.skipif(not native.is_built(), reason=f"needs the native decoder: {native.HOW_TO_BUILD}")
Victim = Literal["rank", "torchrun", "front door", "everything"]


def weights_of(path: Path) -> str:
    """Sha256 over every tensor of the network and of the optimizer."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in checkpoint["state_dict"].items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for state in checkpoint["optimizer_states"][0]["state"].values():
        digest.update(state["momentum_buffer"].numpy().tobytes())
    return digest.hexdigest()


def train(
    workspace: Path, name: str, ranks: int, workers: int = 0, changes: list[str] = ROTATIONS
) -> subprocess.CompletedProcess[str]:
    return shardline(*arguments(name, workers, changes), cwd=workspace, PROCS=str(ranks))


def arguments(name: str, workers: int, changes: list[str] = ROTATIONS) -> list[str]:
    return ["train", f"--name={name}", "--dataset.path=data/digits", f"--data.num_workers={workers}", *SETTINGS, *changes]


@pytest.fixture(scope="session")
def undisturbed(workspace: Path) -> dict[int, str]:
    """Weights of an undisturbed training, by number of ranks; filled as they are asked for."""
    return {}


def undisturbed_weights(workspace: Path, ranks: int, known: dict[int, str]) -> str:
    if ranks not in known:
        done = train(workspace, f"undisturbed-{ranks}", ranks)
        assert done.returncode == 0, done.stderr
        known[ranks] = weights_of(workspace / f"runs/undisturbed-{ranks}/checkpoints/last.ckpt")
    return known[ranks]


COVERING = [("rank", 2, 2), ("torchrun", 3, 0)]  # and everything at once, between two epochs, below
MATRIX = [
    (victim, ranks, workers)
    for victim in ("rank", "torchrun", "front door", "everything")
    for ranks in (1, 2, 3)
    for workers in (0, 2)
    if (victim, ranks, workers) not in COVERING
]


@pytest.mark.parametrize(
    ("victim", "ranks", "workers"), [*COVERING, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)]
)
def test_a_killed_training_goes_on_to_the_same_weights(
    workspace: Path, undisturbed: dict[int, str], victim: Victim, ranks: int, workers: int
) -> None:
    name = f"killed-{victim.replace(' ', '-')}-{ranks}-{workers}"
    kill_and_resume(workspace, name, victim, ranks, workers, ROTATIONS)
    last = workspace / "runs" / name / "checkpoints/last.ckpt"
    assert weights_of(last) == undisturbed_weights(workspace, ranks, undisturbed)


@needs_native
@pytest.mark.parametrize("victim", ["rank", pytest.param("everything", marks=pytest.mark.slow)])
def test_a_killed_training_whose_batches_are_made_by_threads_goes_on_to_the_same_weights(
    workspace: Path, victim: Victim
) -> None:
    name = f"killed-threads-{victim}"
    kill_and_resume(workspace, name, victim, ranks=2, workers=2, changes=CROPS)
    done = train(workspace, f"{name}-undisturbed", 2, workers=0, changes=CROPS)  # the rank itself makes the same batches
    assert done.returncode == 0, done.stderr
    runs = [workspace / "runs" / run / "checkpoints/last.ckpt" for run in (name, f"{name}-undisturbed")]
    assert weights_of(runs[0]) == weights_of(runs[1])


def kill_and_resume(workspace: Path, name: str, victim: Victim, ranks: int, workers: int, changes: list[str]) -> None:
    """Train until somebody is killed in the middle of an epoch, and once more to the end."""
    run_dir = workspace / "runs" / name
    last = run_dir / "checkpoints/last.ckpt"
    with started(
        *arguments(name, workers, changes), cwd=workspace, log=workspace / f"{name}.log", PROCS=str(ranks)
    ) as front_door:
        wait_until(last.exists, "the first checkpoint")
        kill(*pids_of(victim, run_dir, ranks, front_door.pid))
        front_door.wait(timeout=60)
        assert front_door.returncode != 0
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)
    step = torch.load(last, weights_only=True)["shardline"]["global_step"]
    assert step % STEPS_PER_EPOCH, "the kill was meant to fall into the middle of an epoch"

    again = train(workspace, name, ranks, workers, changes)

    assert again.returncode == 0, again.stderr
    assert f"going on after step {step}:" in again.stdout
    assert torch.load(last, weights_only=True)["shardline"]["global_step"] == 3 * STEPS_PER_EPOCH


def test_a_training_killed_between_two_epochs_goes_on_to_the_same_weights(workspace: Path, undisturbed: dict[int, str]) -> None:
    run_dir = workspace / "runs/killed-between"
    last = run_dir / "checkpoints/last.ckpt"
    command = [*arguments("killed-between", workers=0), "--trainer.checkpoint_every_steps=1000"]
    with started(*command, cwd=workspace, log=workspace / "killed-between.log", PROCS="2") as front_door:
        wait_until(last.exists, "the checkpoint of the first epoch")
        kill(*pids_of("everything", run_dir, 2, front_door.pid))
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)

    again = shardline(*command, cwd=workspace, PROCS="2")

    assert again.returncode == 0, again.stderr
    assert f"going on after step {STEPS_PER_EPOCH}:" in again.stdout
    assert weights_of(last) == undisturbed_weights(workspace, 2, undisturbed)


def test_a_training_killed_after_its_last_step_only_finishes_its_record(workspace: Path, undisturbed: dict[int, str]) -> None:
    undisturbed_weights(workspace, 2, undisturbed)
    run_dir = Path(shutil.copytree(workspace / "runs/undisturbed-2", workspace / "runs/killed-late"))
    record = json.loads((run_dir / "run.json").read_text())
    finished = {name: record[name] for name in ("best", "steps")}
    record |= {"name": "killed-late", "outcome": "running", "stages": {}, "best": None, "steps": 0}
    (run_dir / "run.json").write_text(json.dumps(record))
    checkpoint = (run_dir / "checkpoints/best.ckpt").read_bytes()

    again = train(workspace, "killed-late", ranks=2)

    assert again.returncode == 0, again.stderr
    assert f"going on after step {3 * STEPS_PER_EPOCH}:" in again.stdout
    assert (run_dir / "checkpoints/best.ckpt").read_bytes() == checkpoint
    record = json.loads((run_dir / "run.json").read_text())
    assert record["outcome"] == "done"
    assert {name: record[name] for name in ("best", "steps")} == finished


def pids_of(victim: Victim, run_dir: Path, ranks: int, front_door: int) -> list[int]:
    if victim == "rank":
        return [ranks_of(run_dir)[ranks - 1]]
    if victim == "torchrun":
        return [launcher_of(run_dir)]
    if victim == "front door":
        return [front_door]
    return [front_door, *processes_of(run_dir)]
