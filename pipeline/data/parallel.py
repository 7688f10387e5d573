"""The same work on many pieces in several processes, for verbs that go through a whole data set.

Processes are forked, so a task may be any callable, and what it holds is not copied until it changes. What a newcomer would
miss: a worker must end with its parent however that ends, or it goes on writing beside the next run.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from pipeline.console import progress
from pipeline.distributed import die_with
from pipeline.errors import ShardlineError

Job = TypeVar("Job")
Result = TypeVar("Result")

SECONDS_BETWEEN_LOOKS = 0.2
CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_END = object()


def default_workers() -> int:
    """CPUs that this process may use: its affinity, and a container's share where that is less."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = CGROUP_LIMIT.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return allowed


class SharedCounter:
    """A number that forked processes add to and the one that made it watches.

    `watch` is called there with the number, a few times a second and whenever somebody looks.
    """

    def __init__(self, watch: Callable[[int], None]) -> None:
        # The kernel adds for us: no lock that a killed process could hold, no file that it could leave behind.
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._owner = os.getpid()
        self._watch = watch
        self._total = 0
        self._next_look = 0.0

    def add(self, number: int = 1) -> None:
        """Count `number` more, in any process."""
        if os.getpid() == self._owner:
            self._total += number
            if time.monotonic() >= self._next_look:
                self.look()
        elif number:
            os.eventfd_write(self._descriptor, number)

    def look(self) -> None:
        """Gather what other processes counted."""
        with contextlib.suppress(BlockingIOError):
            self._total += os.eventfd_read(self._descriptor)
        self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        self._watch(self._total)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)


@contextlib.contextmanager
def counted(description: str, total: int, already: int) -> Iterator[SharedCounter]:
    """Show how many of `total` images are done, given what processes add to the counter and those done by an earlier run."""
    with progress(description, total, already=already) as show:
        counter = SharedCounter(lambda number: show(already + number))
        try:
            yield counter
        finally:
            counter.look()
            counter.close()


def run_parallel(
    task: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int | None = None,
    while_waiting: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Yield `task(job)` of every job as each is done, in whatever order, from `workers` processes (default: one a CPU).

    Jobs are taken one at a time when a process is free, so memory does not grow with their number. The first error in a
    process ends all and is raised here, as itself where it can be pickled. One worker, or a single job, needs no process.
    """
    workers = default_workers() if workers is None else workers
    waiting = iter(jobs)
    first = list(itertools.islice(waiting, 2))
    waiting = itertools.chain(first, waiting)
    if workers <= 1 or len(first) < 2:
        yield from map(task, waiting)
        return
    crew = _Crew(task, workers)
    try:
        yield from crew.work_off(waiting, while_waiting or (lambda: None))
    finally:
        crew.end()


class _Crew:
    """Forked processes, started when there is work for them, each with a pipe for one job and one result at a time."""

    def __init__(self, task: Callable[[Any], Any], size: int) -> None:
        self.task, self.size = task, size
        self.processes: dict[Connection, Any] = {}
        self.idle: list[Connection] = []
        self.busy: set[Connection] = set()

    def work_off(self, jobs: Iterator[Any], while_waiting: Callable[[], None]) -> Iterator[Any]:
        """Yield the results of `jobs`."""
        exhausted = False
        while True:
            while not exhausted and (self.idle or len(self.processes) < self.size):
                job = next(jobs, _END)
                exhausted = job is _END
                if not exhausted:
                    self.give(job)
            if not self.busy:
                return
            ready = wait(list(self.busy), timeout=SECONDS_BETWEEN_LOOKS)
            while_waiting()
            for pipe in ready:
                assert isinstance(pipe, Connection)
                yield self.take(pipe)

    def give(self, job: Any) -> None:
        pipe = self.idle.pop() if self.idle else self.start()
        try:
            pipe.send(job)
        except OSError as error:
            raise self.lost(pipe) from error
        self.busy.add(pipe)

    def take(self, pipe: Connection) -> Any:
        try:
            done, outcome = pipe.recv()
        except (EOFError, OSError) as error:
            raise self.lost(pipe) from error
        if not done:
            raise outcome
        self.busy.discard(pipe)
        self.idle.append(pipe)
        return outcome

    def start(self) -> Connection:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.task, theirs, os.getpid()), daemon=True)
        # Ctrl-C reaches the whole group; only the parent shall answer it, and it ends the others. A new process keeps the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.processes[ours] = process
        return ours

    def lost(self, pipe: Connection) -> ShardlineError:
        process = self.processes[pipe]
        process.join(timeout=5)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        why = " (often: out of memory)" if code == -signal.SIGKILL else ""
        return ShardlineError(f"a worker process {how}{why}. Run the same command again; what is done is kept.")

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
        for pipe, process in self.processes.items():
            process.join()
            process.close()
            pipe.close()


def _serve(task: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    """What a worker process does: jobs from the pipe, one after another, until the parent kills it or ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            outcome: tuple[bool, Any] = (True, task(job))
        except BaseException as error:
            outcome = (False, _portable(error))
        pipe.send(outcome)


def _portable(error: BaseException) -> BaseException:
    """The error itself with where it happened, or the nearest to it that survives pickling."""
    if not isinstance(error, ShardlineError):
        error.add_note("In a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:
        kind = ShardlineError if isinstance(error, ShardlineError) else RuntimeError
        return kind(str(error) if kind is ShardlineError else f"{type(error).__name__}: {error}")
    return error
