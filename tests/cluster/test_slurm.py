"""The whole chain as a job of a real Slurm: it finishes, meets its time limit, loses a process, and loses a node."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY, Slurm
from tests.processes import kill, wait_until

CHAIN = REPOSITORY / "configs/slurm/chain.sbatch"
STEPS_PER_EPOCH = 16  # 1,069 samples in batches of 64
pytestmark = pytest.mark.cluster


def submit(slurm: Slurm, folder: Path, name: str, epochs: int, *options: str) -> str:
    """Queue the chain on both nodes, one process on each; returns the job's number."""
    settings = [f"--name={name}", "--dataset.path=data/digits", f"--trainer.max_epochs={epochs}"]
    settings += ["--trainer.checkpoint_every_steps=5", "--trainer.timeout_seconds=60", "--scheduler.name=null"]
    environment = {"VENV": str(Path(sys.executable).parents[1]), "PROCS": "1", "OMP_NUM_THREADS": "1"}
    said = slurm.run("sbatch", "--parsable", "--nodes=2", *options, str(CHAIN), *settings, cwd=folder, **environment)
    return said.partition(";")[0]


def log_of(folder: Path, job: str) -> str:
    path = folder / f"shardline-{job}.log"
    return path.read_text() if path.exists() else ""


def last_of(folder: Path, name: str) -> Path:
    return folder / f"runs/{name}/checkpoints/last.ckpt"


def newest_step(folder: Path, name: str) -> int:
    link = last_of(folder, name)
    return int(re.findall(r"\d+", str(link.readlink()))[0]) if link.is_symlink() else 0


def processes_on(slurm: Slurm, node: str) -> dict[int, str]:
    """Pid and command line of everything in a node's network but the process that holds it."""
    holder = int((slurm.folder / f"ns.{node}.pid").read_text())
    network = Path(f"/proc/{holder}/ns/net").readlink()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != holder and (entry / "ns/net").readlink() == network:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def rank_on(slurm: Slurm, node: str) -> int:
    """Pid of the rank that trains on a node."""
    (pid,) = [
        pid
        for pid, command in processes_on(slurm, node).items()
        if " -m pipeline train" in command and "pipeline.launch" not in command
    ]
    return pid


def lose(slurm: Slurm, node: str) -> None:
    """All of a node's processes end at once, its Slurm daemon included, as when its power fails."""
    kill(*processes_on(slurm, node))


def bring_back(slurm: Slurm, node: str) -> None:
    """Start the node's Slurm daemon again."""
    configuration = str(slurm.folder / "slurm.conf")
    slurm.run("slurmd", "-N", node, "-f", configuration, node=node, PATH=f"{os.environ['PATH']}:/usr/sbin")


def test_a_job_finishes_after_a_killed_rank_and_a_lost_node(slurm: Slurm, shared_folder: Path) -> None:
    name, epochs = "hurt", 15
    job = submit(slurm, shared_folder, name, epochs)
    wait_until(lambda: newest_step(shared_folder, name) >= 10, "the first checkpoints", 120)
    kill(rank_on(slurm, "node2"))
    slurm.wait_for(job, "PENDING", 90)
    log = log_of(shared_folder, job)
    assert "shardline: error: rank 1 on node2: was killed by SIGKILL" in log
    assert "failure 1 of at most 5: queued again" in log

    before = newest_step(shared_folder, name)
    slurm.wait_for(job, "RUNNING", 60)
    wait_until(lambda: newest_step(shared_folder, name) >= before + 10, "more checkpoints", 120)
    lose(slurm, "node1")
    wait_until(lambda: slurm.state(job) != "RUNNING", "Slurm to notice that the node is gone", 120)
    bring_back(slurm, "node1")
    slurm.wait_for(job, "COMPLETED", 240)

    log = log_of(shared_folder, job)
    assert len(re.findall(r"on 2 DDP processes \(gloo, cpu\), going on after step \d+", log)) >= 2
    record = json.loads((shared_folder / f"runs/{name}/run.json").read_text())
    assert (record["outcome"], record["steps"], record["world_size"]) == ("done", epochs * STEPS_PER_EPOCH, 2)
    assert set(record["stages"]) == {"check", "train", "evaluate", "export"}
    assert json.loads((shared_folder / f"runs/{name}/export/parity.json").read_text())["passed"]
    assert not (shared_folder / f"shardline-{job}.failures").exists()


def test_a_job_that_meets_its_time_limit_saves_and_queues_itself_again(slurm: Slurm, shared_folder: Path) -> None:
    name = "limited"
    job = submit(slurm, shared_folder, name, 600, "--time=30", "--signal=B:USR1@70")
    wait_until(lambda: newest_step(shared_folder, name) >= 10, "the first checkpoints", 120)
    # The warning comes when less than 70 s are left, and Slurm looks twice a minute: less to wait for than from the start.
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={slurm.minutes_run(job) + 2}")

    def stopped_at() -> list[str]:
        return re.findall(r"stopped by SIGUSR1 after step (\d+), saved", log_of(shared_folder, job))

    wait_until(lambda: bool(stopped_at()), "the warning before the time limit", 150)
    (step,) = stopped_at()
    wait_until(lambda: "time limit: queued again to go on from the save" in log_of(shared_folder, job), "the requeue", 20)
    assert newest_step(shared_folder, name) == int(step)

    # The shortened limit holds for the job's next life too, and the warning may come before that one trains.
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    slurm.wait_for(job, "RUNNING", 60)
    wait_until(lambda: f"going on after step {step}:" in log_of(shared_folder, job), "the resumed training", 60)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED", 60)
    time.sleep(3)
    assert slurm.state(job) == "CANCELLED", "a job that somebody cancelled must not queue itself again"


def test_a_mistake_is_said_once_and_not_tried_again(slurm: Slurm, shared_folder: Path) -> None:
    environment = {"VENV": str(Path(sys.executable).parents[1])}
    said = slurm.run("sbatch", "--parsable", str(CHAIN), "--optimizer.nam=SGD", cwd=shared_folder, **environment)
    slurm.wait_for(said, "FAILED", 60)
    assert log_of(shared_folder, said).count("shardline: error: unknown option `--optimizer.nam`") == 1


def test_doctor_as_a_job_looks_at_every_node(slurm: Slurm, shared_folder: Path) -> None:
    environment = {"VENV": str(Path(sys.executable).parents[1]), "PROCS": "1", "OMP_NUM_THREADS": "1", "VERBS": "doctor"}
    command = ["sbatch", "--parsable", "--nodes=2", str(CHAIN), "--dataset.path=data/digits"]
    job = slurm.run(*command, cwd=shared_folder, **environment)
    slurm.wait_for(job, "COMPLETED", 90)
    log = log_of(shared_folder, job)
    assert re.search(r"rendezvous on node1 +2 processes on 2 machines: node1, node2", log), log
    assert "DDP processes" not in log, "nothing is trained"
