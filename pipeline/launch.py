"""The front door: starts torchrun as a child, passes signals on to the ranks, and ends with one message and one exit code.

torchrun turns every failure into exit 1 and 45 lines of traceback, and on SIGTERM gives its ranks 30 seconds. So it runs in a
process of ours that is quiet and leaves signals to us, and what is said at the end is read from the ranks' own words. On
several nodes each node has its front door, and torchrun finds the others by its own variables (PET_NNODES, PET_NODE_RANK,
PET_MASTER_ADDR, ...), which Kubeflow sets and our Slurm script too.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from pipeline.distributed import LAUNCHER_PID, STOP_SIGNALS, RankOutcome, die_with_parent, num_processes, read_outcomes
from pipeline.errors import ConfigError, RunError
from pipeline.files import write_json

EXIT_DIR = "SHARDLINE_EXIT_DIR"
# A ^C so long after the first means it.
SECOND_PRESS_SECONDS = 1.0
# After the first rank has ended on a stop signal, how long the others may take before they are killed.
STOP_WAIT_SECONDS = 120.0
# How far apart the clocks of machines may be when an outcome is told from one of an earlier start.
CLOCK_SECONDS = 5.0
# How long machines wait for each other at the start: queues and images take their time.
MEET_SECONDS = 900.0
# How long a node whose ranks only lost others waits for the words of those.
WORDS_WAIT_SECONDS = 10.0


def num_nodes() -> int:
    """Machines that take part, as torchrun will read it from PET_NNODES (an elastic MIN:MAX counts as MAX); 1 without it."""
    nodes = os.environ.get("PET_NNODES", "1").rsplit(":", 1)[-1]
    if not nodes.isdecimal() or int(nodes) < 1:
        raise ConfigError(f"PET_NNODES is '{os.environ['PET_NNODES']}'; it must be a number of machines, or MIN:MAX.")
    return int(nodes)


def is_first_node() -> bool:
    """Whether this front door speaks for all of them."""
    return os.environ.get("PET_NODE_RANK", "0") == "0"


def processes_here() -> int:
    """Ranks that torchrun will start on this machine: PET_NPROC_PER_NODE where it is a number, else as for one machine."""
    wanted = os.environ.get("PET_NPROC_PER_NODE", "")
    return int(wanted) if wanted.isdecimal() and num_nodes() > 1 else num_processes()


def require_first_machine(wait_seconds: float) -> None:
    """Wait until the machine that all meet at answers. Raises RunError when it does not: torchrun would wait without a word."""
    host, port = os.environ.get("PET_MASTER_ADDR"), os.environ.get("PET_MASTER_PORT", "29500")
    if num_nodes() == 1 or is_first_node() or host is None:
        return
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{host}:{port} (PET_MASTER_ADDR, PET_MASTER_PORT) cannot be reached from {socket.gethostname()} after "
                    f"{wait_seconds:.0f} s ({error}). Is the first machine up, and the port open?"
                ) from error
        time.sleep(1.0)


def launch(arguments: list[str], run_dir: Path, processes: int, meet_seconds: float = MEET_SECONDS) -> int:
    """Run `shardline ARGUMENTS` on `processes` ranks of this machine under torchrun, as a child that ends with us.

    Returns one exit code; what went wrong is printed once. Stop signals are passed on, so that the ranks save first. Other
    machines are waited for at most `meet_seconds`. Raises RunError when the first of them cannot be reached.
    """
    require_first_machine(meet_seconds)
    exit_dir = run_dir / "exit"
    exit_dir.mkdir(parents=True, exist_ok=True)
    _forget_own(exit_dir)
    started = time.time()
    command = [sys.executable, "-m", "pipeline.launch", f"--nproc-per-node={processes}"]
    # SIGTERM, SIGINT and SIGUSR1 are passed on by us: torchrun kills ranks that take longer than 30 s to save.
    meet = f"--rdzv-conf=timeout={meet_seconds:.0f},join_timeout={meet_seconds:.0f}"
    command += ["--signals-to-handle=SIGQUIT", meet if num_nodes() > 1 else "--standalone"]
    command += ["-m", "pipeline", *arguments]
    child = subprocess.Popen(command, env=_environment(exit_dir, processes), start_new_session=True)
    received: list[int] = []
    first_at = 0.0

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal first_at
        received.append(number)
        if len(received) == 1:
            first_at = time.monotonic()
            if not children_of(child.pid):  # it waits for other machines, and hears nothing
                child.kill()
                return
            child.send_signal(number)
            if number == signal.SIGINT:
                print("stopping after a save; ^C again ends it at once", file=sys.stderr, flush=True)
        elif number == signal.SIGINT and time.monotonic() - first_at > SECOND_PRESS_SECONDS:
            child.kill()  # and the ranks end with it

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        returned = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return _conclude(returned, exit_dir, received, processes, started)


def _forget_own(exit_dir: Path) -> None:
    """Remove what earlier ranks of this machine left, and on one machine all of it."""
    for outcome in read_outcomes(exit_dir):
        if num_nodes() == 1 or outcome.host == socket.gethostname():
            (exit_dir / f"rank-{outcome.rank}.json").unlink(missing_ok=True)


def _environment(exit_dir: Path, processes: int) -> dict[str, str]:
    environment = dict(os.environ)
    # The number of threads changes the order of sums, hence the last bits of the weights: say it, never leave it to chance.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # With the agents' store shared, every restart of elastic ranks failed after a kill -9 of one of them.
    environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # A rank that ends without waiting for the others leaves semaphores, which Python sweeps up and need not mention.
    known = [environment["PYTHONWARNINGS"]] if environment.get("PYTHONWARNINGS") else []
    environment["PYTHONWARNINGS"] = ",".join([*known, "ignore::UserWarning:multiprocessing.resource_tracker"])
    environment[EXIT_DIR] = str(exit_dir.resolve())
    environment[LAUNCHER_PID] = str(os.getpid())
    return environment


def _conclude(returned: int, exit_dir: Path, received: list[int], processes: int, started: float) -> int:
    outcomes = _outcomes_with_cause(exit_dir, started)
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    num_here = sum(outcome.host == socket.gethostname() for outcome in outcomes)
    if not failed and num_here == processes and received:
        return 0  # the signal came when all was done
    stopped = [outcome for outcome in failed if outcome.exit_code > 128]
    if received and stopped and all(outcome.lost_peer for outcome in failed if outcome not in stopped):
        failed = stopped
    # A rank that was told to stop because another failed is not the cause.
    causes = [outcome for outcome in failed if outcome.exit_code in (2, 3)] or failed
    if causes and causes[0].lost_peer:  # nobody knows why: say whom the ranks of this machine lost
        causes.sort(key=lambda outcome: (not outcome.lost_peer, outcome.host != socket.gethostname()))
    if returned == 0 and not causes and (num_nodes() > 1 or len(outcomes) == processes):
        return 0
    if returned in (2, 3) and all(outcome.lost_peer for outcome in causes):
        return returned  # of a rank that could leave no word, for example on a full disk, and spoke itself
    if not causes:
        why = f"by signal {-returned} ({signal.Signals(-returned).name})" if returned < 0 else f"with code {returned}"
        missing = sorted(set(range(processes)) - {outcome.rank for outcome in outcomes})
        if received and not outcomes:
            print("stopped before training began; nothing to save", file=sys.stderr)
            return 130 if received[0] == signal.SIGINT else 143
        whose = "its ranks" if num_nodes() > 1 else f"ranks {missing}"
        _complain(f"the launcher ended {why} before {whose} did. Run the same command again to go on.")
        return 1
    first = causes[0]
    if first.exit_code in (2, 3):
        _complain(first.message)
    elif first.exit_code > 128:
        if is_first_node():
            print(first.message, file=sys.stderr)
    else:
        where = f" on {first.host}" if num_nodes() > 1 and not first.lost_peer else ""
        _complain(f"rank {first.rank}{where}: {first.message}")
        print(first.details, file=sys.stderr, end="")
    return first.exit_code if first.exit_code > 0 else 1


def _outcomes_with_cause(exit_dir: Path, started: float) -> list[RankOutcome]:
    """The ranks' outcomes of this start, on several nodes after a while in which another may add the cause of ours."""
    deadline = time.monotonic() + WORDS_WAIT_SECONDS
    while True:
        # All ranks begin after this machine's launcher did: what is older was left by an earlier start, on other machines.
        outcomes = [outcome for outcome in read_outcomes(exit_dir) if outcome.time > started - CLOCK_SECONDS]
        failed = [outcome for outcome in outcomes if outcome.exit_code]
        is_known = not failed or not all(outcome.lost_peer for outcome in failed)
        if is_known or num_nodes() == 1 or time.monotonic() > deadline:
            return outcomes
        time.sleep(0.2)


def _complain(message: str) -> None:
    print(f"shardline: error: {message}", file=sys.stderr, flush=True)


# ---- the child: torchrun ----


def run_launcher(arguments: list[str]) -> int:
    """torchrun in this process, quiet, and killed with the front door; ranks killed by a signal get an outcome file."""
    die_with_parent()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    exit_dir = Path(os.environ[EXIT_DIR])
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.WARNING)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    def stop(number: int, _frame: FrameType | None) -> None:
        for again in STOP_SIGNALS:
            signal.signal(again, signal.SIG_IGN)  # Slurm signals every process, and the front door passes it on too
        _stop_ranks(number)
        raise SignalException(f"got signal {number}", signal.Signals(number))

    for each in STOP_SIGNALS:
        signal.signal(each, stop)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        for number, failure in error.failures.items():
            path = exit_dir / f"rank-{number}.json"
            if not path.exists():
                with contextlib.suppress(OSError):
                    write_json(path, asdict(_killed(number, failure.exitcode, float(failure.timestamp))))
        return max((failure.exitcode for failure in error.failures.values() if failure.exitcode in (2, 3)), default=1)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _stop_ranks(number: int) -> None:
    """Pass a signal on to the ranks and wait until they have saved; whoever is in a hurry kills us, and them with us."""
    ranks = children_of(os.getpid())
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    # A rank that hangs keeps the others waiting until their own time-out; after the first end they get a while, and no more.
    deadline = math.inf
    while (left := [pid for pid in ranks if not _has_ended(pid)]) and time.monotonic() < deadline:
        if len(left) < len(ranks):
            deadline = min(deadline, time.monotonic() + STOP_WAIT_SECONDS)
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that have not been waited for."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _has_ended(pid: int) -> bool:
    try:
        # WNOWAIT leaves the rank to torchrun, which asks for its exit code.
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _killed(number: int, exit_code: int, when: float) -> RankOutcome:
    why = f"ended with code {exit_code} and left no message"
    if exit_code < 0:
        why = f"was killed by {signal.Signals(-exit_code).name}"
        why += " (often: out of memory)" if exit_code == -signal.SIGKILL else ""
    message = f"{why}. Run the same command again to go on from the last save."
    return RankOutcome(number, exit_code, message, time=when, host=socket.gethostname())


if __name__ == "__main__":
    raise SystemExit(run_launcher(sys.argv[1:]))
