import subprocess
import sys

import pytest

from pipeline.data.worker import worker_errors_explained
from pipeline.errors import DataError, ProcessError

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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader timed out after 4 seconds"), r"no batch from the loader processes in 4 s .* one hangs"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), r"by itself \(is killed by signal: Killed\)"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), r"by itself \(exited unexpectedly\)"),
        (ConnectionResetError(104, "Connection reset by peer"), r"by itself \(its connection was cut\)"),
    ],
    ids=["hung", "killed", "exited", "cut"],
)
def test_a_loader_process_that_failed_is_named_with_what_helps(error: Exception, message: str) -> None:
    with pytest.raises(ProcessError, match=message), worker_errors_explained(4.0):
        raise error


def test_an_error_inside_a_loader_process_keeps_its_words_and_loses_its_traceback() -> None:
    passed_on = "Caught DataError in DataLoader worker process 0.\nTraceback ...\npipeline.errors.DataError: no such shard."
    with pytest.raises(DataError, match=r"^no such shard\.$"), worker_errors_explained(4.0):
        raise DataError(passed_on)
    with pytest.raises(RuntimeError, match="Caught"), worker_errors_explained(4.0):
        raise RuntimeError(passed_on)
