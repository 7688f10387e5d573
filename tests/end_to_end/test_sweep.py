"""The sweep in docs/tracking.md, as it stands there, with two short trials."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_two_trials_of_the_documented_sweep_are_two_runs_and_the_better_one_wins(workspace: Path, tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/tracking.md").read_text(), flags=re.DOTALL)
    short = ["--trainer.max_epochs=1", "--model.channels=[8]", "--model.convs_per_stage=1", "--data.num_workers=0"]
    script = script.replace('"--trainer.monitor=val/accuracy"]', f'"--trainer.monitor=val/accuracy", *{short}]')
    (tmp_path / "data").symlink_to(workspace / "data")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    # `shardline` as the installed command is.
    (tmp_path / "shardline").write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline "$@"\n')
    (tmp_path / "shardline").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TRIALS": "2",
        "PROCS": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    best = [json.loads((tmp_path / f"runs/sweep-00{number}/run.json").read_text())["best"]["value"] for number in (0, 1)]
    assert float(done.stdout.splitlines()[-1].split()[0]) == max(best)
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as database:
        rows = database.execute("SELECT name, value FROM runs JOIN params USING (run_uuid) WHERE key = 'dropout'").fetchall()
    chosen = dict(rows)
    assert set(chosen) == {"sweep-000", "sweep-001"}
    assert len(set(chosen.values())) == 2, "both trials have the same settings"
