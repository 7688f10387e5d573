"""Faults in the middle of a training: everything ends, soon, and the first line says who and why."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.training.checkpoint import checkpoints_in, step_of
from tests.processes import kill, processes_of, ranks_of, shardline, started, wait_until

SETTINGS = ["--dataset.path=data/digits", "--trainer.max_epochs=40", "--trainer.checkpoint_every_steps=5"]


def loaders_of(run_dir: Path) -> list[int]:
    """Pids of the loader processes: forked from a server, not ranks, and busy with batches."""
    ranks = set(ranks_of(run_dir).values())
    return [
        pid
        for pid, command in processes_of(run_dir).items()
        if "forkserver" in command and pid not in ranks and _parent_is_server(pid)
    ]


def _parent_is_server(pid: int) -> bool:
    parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return "forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def wait_for_checkpoint(run_dir: Path, front_door: subprocess.Popen[bytes]) -> None:
    """Until something is saved, or the training has ended."""
    saved = (run_dir / "checkpoints/last.ckpt").exists
    wait_until(lambda: saved() or front_door.poll() is not None, "the first checkpoint")
    assert saved(), "ended before it saved anything"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            signal.SIGKILL,
            r"a loader process ended by itself \((is killed by signal: Killed|exited unexpectedly|its connection was cut)\)",
        ),
        (signal.SIGSTOP, r"no batch in 15 s \(`data.timeout_seconds`\): a loader process hangs"),
    ],
)
def test_a_loader_process_that_dies_or_hangs_is_named(workspace: Path, number: signal.Signals, message: str) -> None:
    name = f"loader-{number.name}"
    run_dir, log = workspace / "runs" / name, workspace / f"{name}.log"
    settings = [*SETTINGS, f"--name={name}", "--data.num_workers=1", "--data.timeout_seconds=15", "--data.prefetch_factor=1"]
    with started("train", *settings, cwd=workspace, log=log) as front_door:
        wait_for_checkpoint(run_dir, front_door)
        for pid in loaders_of(run_dir):
            os.kill(pid, number)
        assert front_door.wait(timeout=90) == 1
    said = log.read_text()
    assert re.search(rf"shardline: error: rank [01]: {message}", said), said
    assert "Traceback" not in said
    for pid in processes_of(run_dir):
        os.kill(pid, signal.SIGCONT)  # a stopped process cannot even notice that its rank has gone
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)


def test_a_rank_that_hangs_is_named_by_the_others(workspace: Path) -> None:
    run_dir, log = workspace / "runs/hung", workspace / "hung.log"
    settings = [*SETTINGS, "--name=hung", "--trainer.timeout_seconds=6"]
    with started("train", *settings, cwd=workspace, log=log) as front_door:
        wait_for_checkpoint(run_dir, front_door)
        os.kill(ranks_of(run_dir)[1], signal.SIGSTOP)
        assert front_door.wait(timeout=100) == 1
    said = log.read_text()
    assert "shardline: error: rank 0: on " in said
    assert "did not answer in time (hung, or the link is cut)" in said
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)


def test_an_unfinished_run_with_another_batch_is_refused_and_may_go_on_all_the_same(workspace: Path) -> None:
    run_dir, log = workspace / "runs/changed", workspace / "changed.log"
    settings = ["--dataset.path=data/digits", "--name=changed", "--trainer.max_epochs=4", "--trainer.checkpoint_every_steps=5"]
    with started("train", *settings, cwd=workspace, log=log) as front_door:
        wait_for_checkpoint(run_dir, front_door)
        kill(front_door.pid, *processes_of(run_dir))
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)

    changed = [*settings, "--data.global_batch_size=32"]
    refused = shardline("train", *changed, cwd=workspace)
    assert refused.returncode == 2
    assert "`data.global_batch_size` 64 -> 32. Go on as it was, start anew with --fresh" in refused.stderr

    allowed = shardline("train", *changed, "--allow-changes", cwd=workspace)
    assert allowed.returncode == 0, allowed.stderr
    assert "the checkpoint's epoch had 16 steps, now 33: going on after" in allowed.stdout
    assert "epoch 4/4" in allowed.stdout


# ---- a disk that takes no more ----


@dataclass(frozen=True)
class Disk:
    """A file system of 2.2 MB on the run's folder, seen by the processes started on it only."""

    workspace: Path
    run_dir: Path
    holder: int

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command where the disk is mounted."""
        return ["nsenter", "-t", str(self.holder), "-m", "--", *command]

    def remount(self, options: str) -> None:
        """Make it larger."""
        command = self.inside("mount", "-o", f"remount,{options}", str(self.run_dir))
        wait_until(lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0, f"remount {options}")

    def freeze_checkpoints(self) -> None:
        """Make their folder read-only; all of it cannot be while the run's journal is open."""
        folder = str(self.run_dir / "checkpoints")
        assert subprocess.run(self.inside("mount", "--bind", folder, folder), check=False).returncode == 0
        command = self.inside("mount", "-o", "remount,bind,ro", folder)
        wait_until(lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0, "a read-only folder")

    def thaw_checkpoints(self) -> None:
        """Undo it."""
        assert subprocess.run(self.inside("umount", str(self.run_dir / "checkpoints")), check=False).returncode == 0

    def train(self, log: Path) -> subprocess.Popen[bytes]:
        """Start a training whose every checkpoint has about 0.8 MB."""
        settings = ["--dataset.path=data/digits", f"--name={self.run_dir.name}", "--trainer.max_epochs=8"]
        settings += ["--model.convs_per_stage=1"]
        train = [sys.executable, "-m", "pipeline", "train", *settings, "--trainer.checkpoint_every_steps=5"]
        command = self.inside("sh", "-c", 'cd "$0" && exec "$@"', str(self.workspace), *train)
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def newest_step(self) -> int:
        """The step of the newest checkpoint."""
        folder = Path(f"/proc/{self.holder}/root{self.run_dir}/checkpoints")
        return max((step_of(path) for path in checkpoints_in(folder.parent)), default=0)


@pytest.fixture
def disk(workspace: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """One for each test."""
    run_dir = workspace / "runs" / request.param
    run_dir.mkdir(parents=True)
    ready = workspace / f"{request.param}.ready"
    script = f"mount -t tmpfs -o size=2200k tmpfs {run_dir} && touch {ready} && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", script])
    try:
        wait_until(lambda: ready.exists() or holder.poll() is not None, "the disk", seconds=20)
        if holder.poll() is not None:
            pytest.skip("needs the right to mount a file system")
        yield Disk(workspace, run_dir, holder.pid)
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    ("disk", "why"), [("full", "No space left on device"), ("read-only", "Read-only file system")], indirect=["disk"]
)
def test_a_save_that_the_disk_refuses_is_loud_and_the_run_goes_on_from_the_one_before(disk: Disk, why: str) -> None:
    log = disk.workspace / f"{disk.run_dir.name}.log"
    training = disk.train(log)
    try:
        if disk.run_dir.name == "read-only":
            disk.remount("size=50m")
            wait_until(lambda: disk.newest_step() >= 10 or training.poll() is not None, "the first checkpoints")
            disk.freeze_checkpoints()
        assert training.wait(timeout=120) == 2, log.read_text()
    finally:
        training.kill()
        training.wait()
    assert re.search(rf"(error|rank 0): runs/\S+/checkpoints/\S*step-\d+\.ckpt\S*: {why}\. ", log.read_text()), log.read_text()
    kept = disk.newest_step()
    assert kept >= 5

    if disk.run_dir.name == "read-only":
        disk.thaw_checkpoints()
    disk.remount("size=50m")
    assert disk.train(log).wait(timeout=150) == 0, log.read_text()
    assert f"going on after step {kept}:" in log.read_text()
