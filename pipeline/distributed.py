"""Ranks, the front door that starts them, and one exit code for all of them.

torchrun turns every failure into exit 1 and 45 lines of traceback. So each rank leaves RUN/exit/rank-N.json, and the front door
reads those: the first rank that failed is the one whose message counts. A rank dies with its launcher (PR_SET_PDEATHSIG),
so that no orphan goes on writing checkpoints beside a resumed job.
"""

import ctypes
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from pipeline.errors import ConfigError, ShardlineError, explain_os_error
from pipeline.files import write_json

PR_SET_PDEATHSIG = 1
LAUNCHER_PID = "SHARDLINE_LAUNCHER_PID"
EXIT_DIR = "SHARDLINE_EXIT_DIR"
CPU_PROCESSES = 2


@dataclass(frozen=True)
class RankOutcome:
    """How one rank ended. `exit_code` is negative when a signal killed it."""

    rank: int
    exit_code: int
    message: str
    details: str = ""
    time: float = 0.0


def is_rank() -> bool:
    """Whether this process is a rank that a launcher started, and not the front door."""
    return "RANK" in os.environ


def rank() -> int:
    """Number of this process among all ranks; 0 outside of them."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks; 1 outside of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_processes() -> int:
    """Ranks to start here: PROCS, else one for each GPU, else 2 on the CPU. Raises ConfigError for an impossible PROCS."""
    import torch

    gpus = torch.cuda.device_count()
    wanted = os.environ.get("PROCS", "").strip()
    if not wanted:
        return gpus or CPU_PROCESSES
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ConfigError(f"PROCS is '{wanted}'; it must be a whole number of processes, 1 or more.")
    if gpus and int(wanted) > gpus:
        raise ConfigError(f"PROCS is {wanted}, but this machine has {gpus} GPUs, one for each process.")
    return int(wanted)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and os.getppid() != int(launcher):
        os._exit(1)  # it had ended before the line above


def die_with(pid: int) -> None:
    """End this process as soon as process `pid` has ended, whoever started this one.

    A loader process of a forkserver has that server as its parent, and the server lives as long as its children: after a kill
    -9 of their rank all of them would stay for ever.
    """
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        waiting = select.poll()  # `select` knows descriptors below 1,024 only
        waiting.register(ended, select.POLLIN)
        waiting.poll()
        os._exit(1)

    threading.Thread(target=wait, name=f"die with {pid}", daemon=True).start()


# ---- inside a rank ----


def run_rank(work: Callable[[], None], exit_dir: Path) -> int:
    """Do a rank's work; leave its outcome in `exit_dir` and return its exit code."""
    die_with_parent()
    outcome = _outcome_of(work)
    write_json(exit_dir / f"rank-{outcome.rank}.json", asdict(outcome))
    if outcome.exit_code and LAUNCHER_PID not in os.environ:
        print(f"rank {outcome.rank}: {outcome.message}\n{outcome.details}".strip(), file=sys.stderr, flush=True)
    if outcome.exit_code:
        # The others may wait for this rank in a collective; a tidy exit would wait for them.
        sys.stdout.flush()
        os._exit(outcome.exit_code)
    return 0


def _outcome_of(work: Callable[[], None]) -> RankOutcome:
    try:
        work()
    except ShardlineError as error:
        return RankOutcome(rank(), error.exit_code, str(error), time=time.time())
    except Exception as error:
        known = explain_os_error(error) if isinstance(error, OSError) else None
        if known is not None:
            return RankOutcome(rank(), known.exit_code, str(known), time=time.time())
        message = f"{type(error).__name__}: {error}".strip()
        return RankOutcome(rank(), 1, message, details=traceback.format_exc(), time=time.time())
    return RankOutcome(rank(), 0, "", time=time.time())


# ---- the front door ----


def launch(arguments: list[str], run_dir: Path, processes: int) -> int:
    """Run `shardline ARGUMENTS` on `processes` ranks under torchrun, as a child that ends with us; return one exit code.

    What went wrong is printed once. SIGTERM and SIGINT are passed on, so that the ranks save first.
    """
    exit_dir = run_dir / "exit"
    exit_dir.mkdir(parents=True, exist_ok=True)
    for stale in exit_dir.glob("rank-*.json"):
        stale.unlink()
    command = [sys.executable, "-m", "pipeline.distributed", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "pipeline", *arguments]
    child = subprocess.Popen(command, env=_environment(exit_dir, processes), start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # torchrun's own clean-up does not stand a second one
            child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        returned = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return _conclude(returned, read_outcomes(exit_dir), received, processes)


def _environment(exit_dir: Path, processes: int) -> dict[str, str]:
    environment = dict(os.environ)
    # The number of threads changes the order of sums, hence the last bits of the weights: say it, never leave it to chance.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A rank that ends without waiting for the others leaves semaphores, which Python sweeps up and need not mention.
    known = [environment["PYTHONWARNINGS"]] if environment.get("PYTHONWARNINGS") else []
    environment["PYTHONWARNINGS"] = ",".join([*known, "ignore::UserWarning:multiprocessing.resource_tracker"])
    environment[EXIT_DIR] = str(exit_dir.resolve())
    environment[LAUNCHER_PID] = str(os.getpid())
    return environment


def read_outcomes(exit_dir: Path) -> list[RankOutcome]:
    """What the ranks left behind, the likeliest cause of the others' end first."""
    outcomes = [RankOutcome(**json.loads(path.read_text())) for path in exit_dir.glob("rank-*.json")]
    return sorted(outcomes, key=_when_it_began)


def _when_it_began(outcome: RankOutcome) -> float:
    if outcome.exit_code == -signal.SIGTERM:
        return math.inf  # torchrun ends the others so
    # torchrun notices a killed process late and in whole seconds; by then its peers have complained of the lost connection.
    return outcome.time - 2.0 if outcome.exit_code < 0 else outcome.time


def _conclude(returned: int, outcomes: list[RankOutcome], received: list[int], processes: int) -> int:
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    # A rank that was told to stop because another failed is not the cause.
    causes = [outcome for outcome in failed if outcome.exit_code in (2, 3)] or failed
    if not causes and returned == 0 and len(outcomes) == processes:
        return 0
    if not causes:
        why = f"by signal {-returned} ({signal.Signals(-returned).name})" if returned < 0 else f"with code {returned}"
        missing = sorted(set(range(processes)) - {outcome.rank for outcome in outcomes})
        if received and not outcomes:
            print("stopped before training began; nothing to save", file=sys.stderr)
            return 128 + received[0]
        _complain(f"the launcher ended {why} before ranks {missing} did. Run the same command again to go on.")
        return 1
    first = causes[0]
    if first.exit_code in (2, 3):
        _complain(first.message)
    elif first.exit_code > 128:
        print(first.message, file=sys.stderr)
    else:
        _complain(f"rank {first.rank}: {first.message}")
        print(first.details, file=sys.stderr, end="")
    return first.exit_code if first.exit_code > 0 else 1


def _complain(message: str) -> None:
    print(f"shardline: error: {message}", file=sys.stderr, flush=True)


def run_launcher(arguments: list[str]) -> int:
    """torchrun in this process, quiet, and killed with the front door; ranks killed by a signal get an outcome file."""
    die_with_parent()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    exit_dir = Path(os.environ[EXIT_DIR])
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        for number, failure in error.failures.items():
            path = exit_dir / f"rank-{number}.json"
            if not path.exists():
                write_json(path, asdict(_killed(number, failure.exitcode, float(failure.timestamp))))
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _killed(number: int, exit_code: int, when: float) -> RankOutcome:
    why = f"ended with code {exit_code} and left no message"
    if exit_code < 0:
        why = f"was killed by {signal.Signals(-exit_code).name}"
        why += " (often: out of memory)" if exit_code == -signal.SIGKILL else ""
    return RankOutcome(number, exit_code, f"{why}. Run the same command again to go on from the last save.", time=when)


if __name__ == "__main__":
    raise SystemExit(run_launcher(sys.argv[1:]))
