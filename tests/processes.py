"""Starting `shardline` as a user does, finding the processes of one run, and ending them the hard way."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LIMIT_SECONDS = 280.0  # four ranks of two tests may share two cores


def shardline(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end and return what it said."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@contextlib.contextmanager
def started(*arguments: str, cwd: Path, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A verb at work in the background; whatever is left of it is killed at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=cwd,
            env=_environment(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _environment(extra: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SHARDLINE_", "PROCS"))}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def children_of(pid: int) -> list[int]:
    """The processes that a process started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = LIMIT_SECONDS) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.01)


def processes_of(run_dir: Path) -> dict[int, str]:
    """Pid and command line of every process that a front door started for `run_dir`: launcher, ranks, loader workers."""
    marker = f"SHARDLINE_EXIT_DIR={(run_dir / 'exit').resolve()}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if marker in (folder / "environ").read_bytes().split(b"\0") and _is_alive(folder):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def _is_alive(folder: Path) -> bool:
    return (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Pid of each rank of a run, by its number."""
    ranks = {}
    for pid, command in processes_of(run_dir).items():
        if " -m pipeline " in command and "pipeline.launch" not in command:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            ranks[int(next(entry for entry in variables if entry.startswith("RANK="))[5:])] = pid
    return ranks


def launcher_of(run_dir: Path) -> int:
    """Pid of torchrun."""
    (pid,) = [pid for pid, command in processes_of(run_dir).items() if "pipeline.launch" in command]
    return pid


def kill(*pids: int) -> None:
    """SIGKILL, all at once."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
