"""A rank: its place among the others, how it meets them, and what it leaves behind when it ends.

A rank that fails leaves the others waiting in a collective, and each of them then fails too, with an error about a socket. So
every rank leaves RUN/exit/rank-N.json, which says whether it failed by itself or only lost another, and where it ran.
"""

import atexit
import contextlib
import ctypes
import json
import math
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline.errors import ConfigError, ShardlineError, explain_os_error
from pipeline.files import write_json

PR_SET_PDEATHSIG = 1
LAUNCHER_PID = "SHARDLINE_LAUNCHER_PID"
CPU_PROCESSES = 2
# Asks a training to save and stop. SIGUSR1 is what Slurm sends before a time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# How long a rank that lost another waits for that one's own words.
WORDS_WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class RankOutcome:
    """How one rank ended. `exit_code` is negative when a signal killed it; `lost_peer`: only because another had gone."""

    rank: int
    exit_code: int
    message: str
    details: str = ""
    time: float = 0.0
    host: str = ""
    lost_peer: bool = False


@dataclass(frozen=True)
class Member:
    """Where a rank runs."""

    rank: int
    host: str
    address: str


_members: list[Member] = []


def is_rank() -> bool:
    """Whether this process is a rank that a launcher started, and not the front door."""
    return "RANK" in os.environ


def rank() -> int:
    """Number of this process among all ranks; 0 outside of them."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among the ranks of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of ranks; 1 outside of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_processes() -> int:
    """Ranks to start here: PROCS, else one for each GPU, else 2 on the CPU. Raises ConfigError for an impossible PROCS."""
    from pipeline import accelerator

    gpus = accelerator.num_gpus()
    wanted = os.environ.get("PROCS", "").strip()
    if not wanted:
        return gpus or CPU_PROCESSES
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ConfigError(f"PROCS is '{wanted}'; it must be a whole number of processes, 1 or more.")
    if gpus and int(wanted) > gpus:
        raise ConfigError(f"PROCS is {wanted}, but this machine has {gpus} GPUs, one for each process.")
    return int(wanted)


# ---- ends with others ----


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process, by that signal, when the one that started it ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
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


# ---- meets the others ----


def join_group(timeout: timedelta) -> None:
    """Meet the other ranks, if there are any, and learn where they run.

    A later collective that waits longer than `timeout` fails.
    """
    import torch
    import torch.distributed as dist

    from pipeline import accelerator

    if not is_rank() or dist.is_initialized():
        return
    if accelerator.kind() == "cuda":
        torch.cuda.set_device(accelerator.device())
    dist.init_process_group(accelerator.backend(), timeout=timeout)
    members: list[Member] = [None] * world_size()  # type: ignore[list-item]
    dist.all_gather_object(members, Member(rank(), socket.gethostname(), _own_address()))
    _members[:] = members


def _own_address() -> str:
    """The address by which the other ranks see this one: that of the way to rank 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        except OSError:
            return ""
        return str(way.getsockname()[0])


# What the collectives say when another rank has gone or does not answer. Each backend has its own words and types.
_LOST_PEER = re.compile(
    r"gloo/transport|gloo::|pair closure|ProcessGroup|NCCL|TCPStore|Connection (reset|closed) by peer|monitoredBarrier"
)
_ADDRESS = re.compile(r"\[(?:::ffff:)?([0-9a-f.:]+)\]:\d+")


def lost_peer(error: BaseException) -> str | None:
    """Which ranks this one lost, in words; None where the error is its own."""
    text = str(error)
    if not _is_of_collective(error):
        return None
    others = [member for member in _members if member.rank != rank()]
    found = _ADDRESS.search(text)
    suspects = [member for member in others if found and member.address == found[1]] or others
    hosts = sorted({member.host for member in suspects})
    numbers = ", ".join(str(member.rank) for member in suspects[:8]) + (", ..." if len(suspects) > 8 else "")
    who = f"rank{'s' if len(suspects) > 1 else ''} {numbers} on {', '.join(hosts[:4])}" if suspects else "the other ranks"
    why = "did not answer in time (hung, or the link is cut)" if re.search(r"[Tt]imed out|[Tt]imeout", text) else "went away"
    return f"on {socket.gethostname()}: {who} {why}. Run the same command again to go on from the last save."


def _is_of_collective(error: BaseException) -> bool:
    """Whether a collective failed: by its type, by where it was raised, or (from autograd's threads) by its words."""
    if type(error).__name__.startswith("Dist"):  # DistBackendError, DistNetworkError, DistStoreError, ...
        return True
    if type(error) is not RuntimeError:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = frames[-1].filename.replace(os.sep, "/") if frames else ""
    return bool(_LOST_PEER.search(str(error))) or any(
        place in raised_in for place in ("torch/distributed/", "nn/parallel/distributed")
    )


# ---- leaves word ----


def run_rank(work: Callable[[], None], exit_dir: Path) -> int:
    """Do a rank's work; leave its outcome in `exit_dir` and return its exit code."""
    die_with_parent()
    succeeded = threading.Event()
    # Registered first, so called last: what others clean up at exit is done, and C++ threads that outlive the interpreter
    # can no longer end a rank that succeeded by "terminate called without an active exception" (seen once).
    atexit.register(lambda: _leave(0) if succeeded.is_set() else None)
    path = exit_dir / f"rank-{rank()}.json"
    path.unlink(missing_ok=True)  # of an earlier try, where an elastic launcher starts the ranks again

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        message = f"stopped by {name} outside of the training steps; nothing was left to save"
        outcome = RankOutcome(rank(), _code_of(number), message, time=time.time(), host=socket.gethostname())
        with contextlib.suppress(OSError):
            write_json(path, asdict(outcome))
        os._exit(outcome.exit_code)

    for number in STOP_SIGNALS:
        signal.signal(number, end)
    outcome = _outcome_of(work)
    has_launcher = LAUNCHER_PID in os.environ
    try:
        write_json(path, asdict(outcome))
    except OSError:  # the disk that failed may be this one
        has_launcher = False
    if outcome.exit_code and not has_launcher:
        _speak(outcome, exit_dir)
    if outcome.exit_code:
        _leave(outcome.exit_code)  # the others may wait for this rank in a collective; a tidy exit would wait for them
    succeeded.set()
    return 0


def _leave(exit_code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def _code_of(number: int) -> int:
    """Exit code of a stop on request: 130 for ^C, else 143."""
    return 130 if number == signal.SIGINT else 143


def _speak(outcome: RankOutcome, exit_dir: Path) -> None:
    """Say why, without a front door: a rank that lost another gives that one's words first, if they come."""
    deadline = time.monotonic() + WORDS_WAIT_SECONDS
    while outcome.lost_peer and time.monotonic() < deadline:
        causes = [other for other in read_outcomes(exit_dir) if other.exit_code and not other.lost_peer]
        if causes:
            print(f"rank {causes[0].rank} on {causes[0].host}: {causes[0].message}", file=sys.stderr)
            break
        time.sleep(0.2)
    print(f"rank {outcome.rank}: {outcome.message}\n{outcome.details}".strip(), file=sys.stderr, flush=True)


def _outcome_of(work: Callable[[], None]) -> RankOutcome:
    code, message, details, lost = 0, "", "", False
    try:
        work()
    except ShardlineError as error:
        code, message = error.exit_code, str(error)
    except Exception as error:
        known = explain_os_error(error) if isinstance(error, OSError) else None
        away = lost_peer(error)
        if known is not None:
            code, message = known.exit_code, str(known)
        elif away is not None:
            code, message, lost = 1, away, True
            details = f"  ({' '.join(str(error).split())[:300]})\n"
        else:
            code, message = 1, f"{type(error).__name__}: {error}".strip()
            details = traceback.format_exc()
    return RankOutcome(rank(), code, message, details, time.time(), socket.gethostname(), lost)


def read_outcomes(exit_dir: Path) -> list[RankOutcome]:
    """What the ranks left behind, the likeliest cause of the others' end first."""
    outcomes = [RankOutcome(**json.loads(path.read_text())) for path in exit_dir.glob("rank-*.json")]
    return sorted(outcomes, key=_when_it_began)


def _when_it_began(outcome: RankOutcome) -> float:
    if outcome.exit_code in (-signal.SIGTERM, _code_of(signal.SIGTERM), _code_of(signal.SIGINT)):
        return math.inf  # torchrun ends the others so, also one that is about to say what it failed of
    if outcome.lost_peer:
        # Only a consequence, also where another machine's clock is late. But torchrun kills a hung rank 30 s after that.
        return outcome.time + 20.0
    # torchrun notices a killed process late and in whole seconds; by then its peers have complained of the lost connection.
    return outcome.time - 2.0 if outcome.exit_code < 0 else outcome.time
