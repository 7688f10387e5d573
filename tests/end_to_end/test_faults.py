"""Processes that die or hang in the middle of a training: everything ends, soon, and the first line says who and why."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

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
        (signal.SIGSTOP, r"no batch from the loader processes in 15 s \(`data.timeout_seconds`\): one hangs"),
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
