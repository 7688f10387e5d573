"""SIGTERM to the front door: every rank saves at a step boundary, the exit code says so, and the job goes on later."""

import json
import signal
from pathlib import Path

from tests.processes import processes_of, shardline, started, wait_until

SETTINGS = ["--name=stopped", "--dataset.path=data/digits", "--trainer.max_epochs=40", "--trainer.checkpoint_every_steps=5"]


def test_a_stopped_training_says_143_and_goes_on(workspace: Path) -> None:
    run_dir = workspace / "runs/stopped"
    log = workspace / "stopped.log"
    with started("train", *SETTINGS, cwd=workspace, log=log) as front_door:
        wait_until((run_dir / "checkpoints/last.ckpt").exists, "the first checkpoint")
        front_door.send_signal(signal.SIGTERM)
        assert front_door.wait(timeout=60) == 143
    last_line = log.read_text().strip().splitlines()[-1]
    assert last_line.startswith("stopped by SIGTERM after step ")
    assert json.loads((run_dir / "run.json").read_text())["outcome"] == "stopped"
    # MLflow may still be told of it; the training itself has ended.
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=60)

    step = last_line.split("after step ")[1].split(",")[0]
    with started("train", *SETTINGS, cwd=workspace, log=log) as front_door:
        wait_until(lambda: f"going on after step {step}:" in log.read_text(), "the resumed training")
        other = shardline("train", *SETTINGS, cwd=workspace)
        assert other.returncode == 2
        assert "runs/stopped is locked by another job (process" in other.stderr
        front_door.send_signal(signal.SIGINT)
        assert front_door.wait(timeout=60) == 130
