import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data import parallel
from pipeline.data.parallel import SharedCounter, default_workers, run_parallel
from pipeline.errors import DataError, ShardlineError
from tests.processes import wait_until


def square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_job_is_done_once_for_any_number_of_workers(workers: int) -> None:
    assert sorted(run_parallel(square, range(20), workers)) == [number * number for number in range(20)]


def test_several_workers_are_other_processes_that_are_gone_at_the_end() -> None:
    pids = set(run_parallel(lambda _: os.getpid(), range(20), 2))
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.parametrize(("jobs", "workers"), [([7], 4), ([7, 8], 1), ([], 4)])
def test_one_worker_or_one_job_needs_no_process(jobs: list[int], workers: int) -> None:
    assert set(run_parallel(lambda _: os.getpid(), jobs, workers)) <= {os.getpid()}


def test_jobs_are_taken_only_when_a_process_is_free() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = run_parallel(square, jobs(), 2)
    next(results)
    assert len(taken) <= 4  # one a process, and the two that were looked at first
    results.close()  # type: ignore[attr-defined]


def fail(number: int) -> int:
    if number == 3:
        raise DataError("number 3 is odd")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_of_the_user_is_raised_as_itself(workers: int) -> None:
    with pytest.raises(DataError, match=r"^number 3 is odd$"):
        list(run_parallel(fail, range(1000), workers))


def test_a_bug_says_where_in_the_worker_it_happened() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(run_parallel(lambda number: 1 // number, [0, 0], 2))
    (note,) = caught.value.__notes__
    assert "In a worker process" in note
    assert "lambda number: 1 // number" in note


class OddError(DataError):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_odd(_: int) -> None:
    raise OddError(1, 2)


def test_an_error_that_cannot_be_pickled_keeps_its_message() -> None:
    with pytest.raises(ShardlineError, match=r"^1 and 2$"):
        list(run_parallel(raise_odd, range(4), 2))


def test_a_worker_that_is_killed_ends_the_work_with_one_line() -> None:
    with pytest.raises(ShardlineError, match=r"a worker process was killed by SIGKILL \(often: out of memory\)\. Run the same"):
        list(run_parallel(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


def test_whoever_stops_taking_results_ends_the_workers(tmp_path: Path) -> None:
    def note(number: int) -> int:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.0 if number < 2 else 60.0)
        return number

    results = run_parallel(note, range(10), 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert [path for path in tmp_path.iterdir() if Path("/proc", path.name).exists()] == []


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, time, pathlib; from pipeline.data.parallel import run_parallel\n"
        f"def task(_): pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(60)\n"
        "list(run_parallel(task, range(4), 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2, "two workers", seconds=30)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(Path("/proc", path.name).exists() for path in tmp_path.iterdir()), "their end", seconds=10)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_counter_sees_what_all_processes_count(workers: int) -> None:
    seen: list[int] = []
    counter = SharedCounter(seen.append)
    list(run_parallel(counter.add, [1, 2, 3, 4], workers, while_waiting=counter.look))
    counter.look()
    counter.close()
    assert seen[-1] == 10
    assert seen == sorted(seen)


@pytest.mark.parametrize(("limit", "expected"), [("max 100000\n", 4), ("150000 100000\n", 2), ("900000 100000\n", 4)])
def test_a_container_s_share_of_the_machine_bounds_the_workers(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(parallel, "CGROUP_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert default_workers() == expected
