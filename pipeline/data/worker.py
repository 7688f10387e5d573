"""A loader process: what it is given besides the data set, and what is said and done when it dies, hangs or is left over.

It unpickles the first by name, and would import Lightning (4 s and 300 MB in each process) if it stood beside the data module.
"""

import atexit
import contextlib
import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeVar

from pipeline.distributed import STOP_SIGNALS, die_with
from pipeline.errors import ProcessError, ShardlineError

T = TypeVar("T")

AGAIN = "Run the same command again to go on from the last save."


def start_worker(_worker_id: int, rank_pid: int) -> None:
    """End with the rank that asked for this process, however that one ends, and with nothing else.

    Slurm and terminals send their signals to every process; a loader that ended would fail the step that is to be saved.
    """
    die_with(rank_pid)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def deliver(batch: Any) -> Any:
    """Collate function of a data set that already returns whole batches."""
    return batch


# ---- on the rank's side ----


def kill_workers_at_exit() -> None:
    """See to it that loader processes which are left when this process exits do not keep it.

    They ignore SIGTERM, and multiprocessing would wait for ever after it. Call it once they have been started: torch waits 5 s
    for each of them at exit, and what is registered last comes first.
    """
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=1.0)


def in_time(batches: Iterator[T], timeout_seconds: float) -> Iterator[T]:
    """Yield every batch, each awaited at most `timeout_seconds` (0: for ever). Raises ProcessError, and ends the processes.

    torch's own time-out ends where the wait for a message ends: a process that hangs while it hands its batch over is waited
    for without limit.
    """
    while True:
        with time_limit(timeout_seconds):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


@contextlib.contextmanager
def time_limit(timeout_seconds: float) -> Iterator[None]:
    """Raise ProcessError in here after so many seconds, whatever is being waited for. Two system calls: 2 us."""
    if not timeout_seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        # While they live, torch's own clean-up may wait for one that hangs.
        with contextlib.suppress(RuntimeError):  # torch's word of their end
            _kill_workers()
        raise ProcessError(
            f"no batch in {timeout_seconds:g} s (`data.timeout_seconds`): a loader process hangs, or the disk or network of "
            f"the shards does. {AGAIN}"
        )

    previous = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def worker_errors_explained() -> Iterator[None]:
    """Raise ProcessError for a loader process that died, and ours from inside one without torch's traceback."""
    try:
        yield
    except ShardlineError as error:
        raise type(error)(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from None
    except (RuntimeError, OSError, EOFError) as error:
        raise _explain(error) or error from None


def _explain(error: Exception) -> ProcessError | None:
    """What became of a loader process, from torch's words; None for an error that was raised in one, or elsewhere."""
    if isinstance(error.__cause__, ProcessError):  # that of `time_limit`, which torch took for a process's death
        return error.__cause__
    text = str(error)
    if text.startswith("Caught "):  # and passed on by torch, with its traceback
        return None
    found = re.search(r"is killed by signal: [^.]+|exited unexpectedly", text)
    is_cut = isinstance(error, (ConnectionError, EOFError))  # it died while it handed a batch over
    if "DataLoader worker" not in text and not is_cut:
        return None
    return ProcessError(
        f"a loader process ended by itself ({found[0] if found else 'its connection was cut'}); often memory or shared memory "
        f"ran out: lower `data.num_workers` or `data.prefetch_factor`. {AGAIN}"
    )
