"""A real Slurm of two nodes on this machine, and bare hosts in network namespaces. Both need root and their packages."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import shardline, wait_until

SCRIPT = Path(__file__).with_name("minislurm.sh")
REPOSITORY = Path(__file__).parents[2]
NEEDED = ("sbatch", "srun", "slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")


def missing_for(*programs: str) -> str | None:
    """Why the tests with these programs cannot run here; None if they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in programs if shutil.which(name, path=path) is None]
    return f"needs {', '.join(absent)}" if absent else None


@dataclass(frozen=True)
class Slurm:
    """Commands inside the controller's namespaces, or a node's."""

    folder: Path

    def run(self, *command: str, cwd: Path | None = None, node: str = "ctl", **environment: str) -> str:
        """Run a command to its end and return what it printed."""
        done = subprocess.run(
            [str(self.folder / "in"), *command],
            cwd=cwd,
            env={**os.environ, "NODE": node, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job, also after its end."""
        return self.facts_of(job)["JobState"]

    def minutes_run(self, job: str) -> int:
        """Whole minutes for which a job has run."""
        hours, minutes, _ = self.facts_of(job)["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def facts_of(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "show", "job", job).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def release(self, job: str) -> None:
        """Let a job begin that waits after a requeue, which takes two minutes otherwise."""
        if self.state(job) == "PENDING":
            # A start in the second of the requeue would be taken for the run that was ended.
            time.sleep(2)
            with contextlib.suppress(AssertionError):  # it may have begun meanwhile
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_for(self, job: str, state: str, seconds: float) -> None:
        """Poll until a job is in a state."""

        def has_arrived() -> bool:
            if self.state(job) == state:
                return True
            self.release(job)
            return False

        wait_until(has_arrived, f"job {job} to be {state}", seconds)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A controller and two nodes, each with a network of its own."""
    why = missing_for(*NEEDED)
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    command = ["bash", str(SCRIPT), "up", str(folder), "2", "2"]
    up = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield Slurm(folder)
    finally:
        subprocess.run(["bash", str(SCRIPT), "down", str(folder)], env=environment, timeout=60, check=False)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every node sees: the data set of the digits, sharded and checked."""
    folder = tmp_path_factory.mktemp("shared")
    for verb in ("shard", "check"):
        done = shardline(verb, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder
