import signal
import subprocess
import sys

import pytest

from pipeline.data.worker import in_time, worker_errors_explained
from pipeline.errors import DataError, ProcessError

HALF_HANDED_OVER = """
import functools, os, signal, time
import torch
from torch.utils.data import DataLoader, Dataset
from pipeline.data.worker import in_time, start_worker, worker_errors_explained

class Stops(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 4:
            time.sleep(1)  # the batches before have been taken
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
        return torch.zeros(100_000)

if __name__ == "__main__":
    start = functools.partial(start_worker, rank_pid=os.getpid())
    loader = DataLoader(Stops(), batch_size=2, num_workers=1, multiprocessing_context="fork", worker_init_fn=start)
    batches = iter(loader)
    with worker_errors_explained():
        for number, batch in enumerate(in_time(batches, 2.5)):
            print(number, flush=True)
            if number == 1:
                time.sleep(2)  # the next is in the queue, and its process can no longer hand over the memory
"""

LEFT_OVER = """
import functools, os
from torch.utils.data import DataLoader
from pipeline.data.worker import kill_workers_at_exit, start_worker

loader = DataLoader(
    range(100),
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    multiprocessing_context="fork",
    worker_init_fn=functools.partial(start_worker, rank_pid=os.getpid()),
)
os.kept_alive = iter(loader)  # to the very end, longer than this module
kill_workers_at_exit()
print(next(os.kept_alive))
"""


def test_a_loader_that_is_left_over_does_not_keep_its_process() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_OVER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "tensor([0, 1, 2, 3])" in done.stdout


def test_a_loader_that_hangs_while_it_hands_a_batch_over_is_not_waited_for_for_ever() -> None:
    done = subprocess.run([sys.executable, "-c", HALF_HANDED_OVER], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["0", "1"]
    assert "ProcessError: no batch in 2.5 s (`data.timeout_seconds`): a loader process hangs" in done.stderr


def test_a_loader_in_time_is_left_alone_and_so_is_the_clock_of_others() -> None:
    signal.setitimer(signal.ITIMER_REAL, 60.0)
    try:
        assert list(in_time(iter(range(3)), 5.0)) == [0, 1, 2]
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 50.0 < left <= 60.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), r"by itself \(is killed by signal: Killed\)"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), r"by itself \(exited unexpectedly\)"),
        (ConnectionResetError(104, "Connection reset by peer"), r"by itself \(its connection was cut\)"),
    ],
    ids=["killed", "exited", "cut"],
)
def test_a_loader_process_that_failed_is_named_with_what_helps(error: Exception, message: str) -> None:
    with pytest.raises(ProcessError, match=message), worker_errors_explained():
        raise error


def test_an_error_inside_a_loader_process_keeps_its_words_and_loses_its_traceback() -> None:
    passed_on = "Caught DataError in DataLoader worker process 0.\nTraceback ...\npipeline.errors.DataError: no such shard."
    with pytest.raises(DataError, match=r"^no such shard\.$"), worker_errors_explained():
        raise DataError(passed_on)
    with pytest.raises(RuntimeError, match="Caught"), worker_errors_explained():
        raise RuntimeError(passed_on)
