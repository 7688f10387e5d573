"""A loader process: what it is given besides the data set, and what is said and done when it dies, hangs or is left over.

It unpickles the first by name, and would import Lightning (4 s and 300 MB in each process) if it stood beside the data module.
"""

import atexit
import contextlib
import multiprocessing
import re
import signal
from collections.abc import Iterator
from typing import Any

from pipeline.distributed import STOP_SIGNALS, die_with
from pipeline.errors import ProcessError, ShardlineError


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
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@contextlib.contextmanager
def worker_errors_explained(timeout_seconds: float) -> Iterator[None]:
    """Raise ProcessError for a loader process that died or hung, and ours from inside one without torch's traceback."""
    try:
        yield
    except ShardlineError as error:
        raise type(error)(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from None
    except (RuntimeError, OSError, EOFError) as error:
        raise _explain(error, timeout_seconds) or error from None


def _explain(error: Exception, timeout_seconds: float) -> ProcessError | None:
    """What became of a loader process, from torch's words; None for an error that was raised in one, or elsewhere."""
    text = str(error)
    if text.startswith("Caught "):  # and passed on by torch, with its traceback
        return None
    again = "Run the same command again to go on from the last save."
    if "DataLoader timed out" in text:
        return ProcessError(
            f"no batch from the loader processes in {timeout_seconds:g} s (`data.timeout_seconds`): one hangs, or the disk or "
            f"network of the shards does. {again}"
        )
    found = re.search(r"is killed by signal: [^.]+|exited unexpectedly", text)
    is_cut = isinstance(error, (ConnectionError, EOFError))  # it died while it handed a batch over
    if "DataLoader worker" not in text and not is_cut:
        return None
    return ProcessError(
        f"a loader process ended by itself ({found[0] if found else 'its connection was cut'}); often memory or shared memory "
        f"ran out: lower `data.num_workers` or `data.prefetch_factor`. {again}"
    )
