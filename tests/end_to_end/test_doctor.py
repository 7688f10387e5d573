"""`shardline doctor`, with real ranks: green on a machine that is fit, red and exit 3 on one that is not."""

import json
import shutil
from pathlib import Path

from pipeline.data import native
from tests.processes import shardline

EVERYWHERE = {"torch", "gpus", "cores", "decoder", "shared memory", "open files", "run folder", "cache folder", "data set"}
TOGETHER = {"mlflow", "rendezvous", "same everywhere", "one run folder", "clocks", "all reduce"}


def findings_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Grade and words of each check."""
    return {f["check"]: (f["grade"], f["found"]) for f in json.loads((folder / "runs/doctor.json").read_text())}


def test_a_fit_machine_is_told_so_and_nothing_is_left_behind(workspace: Path, tmp_path: Path) -> None:
    settings = [f"--dataset.path={workspace}/data/digits", "--data.num_workers=1"]
    done = shardline("doctor", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings_in(tmp_path)
    assert set(found) == EVERYWHERE | TOGETHER
    assert {name for name, (grade, _) in found.items() if grade == "red"} == set()
    assert found["rendezvous"][1].startswith("2 processes on 1 machine: ")
    assert found["all reduce"][1].startswith("right, ")
    assert "1,797 samples" in found["data set"][1]
    assert found["decoder"][1].startswith(
        "the native decoder" if native.is_built() else "torchvision.io: the native decoder is not"
    )
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"doctor.json", "mlflow.db", ".mlflow.db.lock"}
    assert "next     shardline train" in done.stdout


def test_what_a_job_would_trip_over_is_red_with_a_remedy_and_exit_3(workspace: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(workspace / "data/digits", tmp_path / "data/digits"))
    for path in data.glob("*.tar"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    done = shardline("doctor", "--tracking.uri=http://127.0.0.1:9/nobody", cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.strip() == (
        "shardline: error: not fit for a long job: data set, mlflow. Mend what is red above, then run doctor again."
    )
    found = findings_in(tmp_path)
    assert found["data set"][0] == "red"
    assert "bytes but the manifest says 2058240. It was probably cut short" in found["data set"][1]
    assert found["mlflow"][0] == "red"


def test_without_a_data_set_the_rest_is_looked_at_all_the_same(tmp_path: Path) -> None:
    done = shardline("doctor", cwd=tmp_path)
    assert done.returncode == 3
    found = findings_in(tmp_path)
    assert found["data set"] == ("red", "data/digits: no data set there (no dataset.json). Make it with `shardline shard`.")
    assert {name for name, (grade, _) in found.items() if grade == "red"} == {"data set"}
