"""The front door's child is a stand-in here, and ranks that end are real processes. tests/distributed has real torchruns."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pipeline import distributed
from pipeline.distributed import LAUNCHER_PID, Member, RankOutcome, num_processes, read_outcomes
from pipeline.errors import ConfigError, RunError
from pipeline.launch import EXIT_DIR, is_first_node, launch, num_nodes, processes_here, require_first_machine

LIMIT_SECONDS = 20.0


# ---- how many processes ----


@pytest.mark.parametrize(
    ("procs", "gpus", "expected"),
    [("", 0, 2), ("", 4, 4), ("3", 0, 3), ("1", 0, 1), (" 2 ", 4, 2), ("4", 4, 4)],
)
def test_procs_or_the_machine_says_how_many_processes(
    monkeypatch: pytest.MonkeyPatch, procs: str, gpus: int, expected: int
) -> None:
    monkeypatch.setenv("PROCS", procs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert num_processes() == expected


@pytest.mark.parametrize(
    ("procs", "gpus", "message"),
    [
        *((procs, 0, f"PROCS is '{procs}'; it must be a whole number") for procs in ("0", "-2", "two", "1.5", "²")),
        ("5", 4, "PROCS is 5, but this machine has 4 GPUs"),
    ],
)
def test_an_impossible_procs_is_refused(monkeypatch: pytest.MonkeyPatch, procs: str, gpus: int, message: str) -> None:
    monkeypatch.setenv("PROCS", procs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=message):
        num_processes()


# ---- one exit code for all ranks ----


class Child:
    """In place of torchrun: leaves `outcomes`, may get a signal meanwhile, and ends with `returned`."""

    outcomes: tuple[RankOutcome, ...] = ()
    returned = 0
    pid = 0
    interrupted_by: signal.Signals | None = None

    def __init__(self, command: list[str], env: dict[str, str], start_new_session: bool) -> None:
        self.exit_dir = Path(env[EXIT_DIR])
        self.passed_on: list[int] = []
        self.began = time.time()

    def wait(self) -> int:
        for outcome in self.outcomes:
            host = outcome.host or socket.gethostname()
            word = replace(outcome, host=host, time=outcome.time + self.began)
            (self.exit_dir / f"rank-{outcome.rank}.json").write_text(json.dumps(asdict(word)))
        if self.interrupted_by is not None:
            os.kill(os.getpid(), self.interrupted_by)
            os.kill(os.getpid(), self.interrupted_by)
            deadline = time.monotonic() + LIMIT_SECONDS
            while not self.passed_on and time.monotonic() < deadline:
                time.sleep(0.001)
            assert self.passed_on == [self.interrupted_by], "torchrun gets a signal once, however often it is sent"
        return self.returned

    def send_signal(self, number: int) -> None:
        self.passed_on.append(number)


Launch = Callable[..., int]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launch:
    """The exit code of the front door when torchrun and its two ranks ended like this."""

    def conclude(*outcomes: RankOutcome, returned: int = 0, by: signal.Signals | None = None) -> int:
        child = type("Stand", (Child,), {"outcomes": outcomes, "returned": returned, "interrupted_by": by})
        monkeypatch.setattr(subprocess, "Popen", child)
        monkeypatch.setattr("pipeline.launch.children_of", lambda _pid: [1])
        return launch(["train"], tmp_path / "run", processes=2)

    return conclude


def test_ranks_that_all_end_well_are_success(ended: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(RankOutcome(0, 0, ""), RankOutcome(1, 0, "")) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("code", [2, 3])
def test_a_mistake_on_one_rank_is_the_message_whatever_the_others_said_before(
    ended: Launch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    consequence = RankOutcome(0, 1, "RuntimeError: Connection closed by peer", details="Traceback ...", time=10.0)
    cause = RankOutcome(1, code, "train-000003.tar: shard is missing.", time=10.2)
    assert ended(consequence, cause, returned=1) == code
    assert capsys.readouterr().err == "shardline: error: train-000003.tar: shard is missing.\n"


@pytest.mark.parametrize(
    "consequence",
    [
        RankOutcome(0, 1, "RuntimeError: Connection closed by peer", details="Traceback: gloo\n", time=10.9),
        # torchrun rounds the time of a process without a message down to whole seconds: it seems to have ended first.
        RankOutcome(0, -signal.SIGTERM, "was killed by SIGTERM.", time=10.0),
        # A rank that hangs in a collective does not heed SIGTERM; torchrun kills it after 30 seconds.
        RankOutcome(0, -signal.SIGKILL, "was killed by SIGKILL (often: out of memory).", time=41.0),
    ],
    ids=["peer lost", "ended by torchrun", "killed by torchrun"],
)
def test_a_bug_on_one_rank_is_told_with_its_traceback_and_exit_1(
    ended: Launch, capsys: pytest.CaptureFixture[str], consequence: RankOutcome
) -> None:
    cause = RankOutcome(1, 1, "ZeroDivisionError: division by zero", details="Traceback: line 7\n", time=10.7)
    assert ended(consequence, cause, returned=1) == 1
    said = capsys.readouterr().err
    assert said == "shardline: error: rank 1: ZeroDivisionError: division by zero\nTraceback: line 7\n"


def test_a_killed_rank_is_the_cause_though_its_peer_complained_before_torchrun_looked(
    ended: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Killed at 10.95; torchrun looks ten times a second and so notices at 11.
    consequence = RankOutcome(0, 1, "RuntimeError: Connection closed by peer", details="Traceback: gloo\n", time=10.97)
    cause = RankOutcome(1, -signal.SIGKILL, "was killed by SIGKILL (often: out of memory).", time=11.0)
    assert ended(consequence, cause, returned=1) == 1
    assert "rank 1: was killed by SIGKILL (often: out of memory)" in capsys.readouterr().err


def test_ranks_that_stopped_after_saving_give_128_and_the_signal(ended: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = [RankOutcome(rank, 143, "stopped by SIGTERM after step 7, saved.", time=10.0 + rank) for rank in (0, 1)]
    assert ended(*stopped, returned=143, by=signal.SIGTERM) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM after step 7, saved.\n"


def test_a_signal_that_comes_when_all_is_done_changes_nothing(ended: Launch) -> None:
    assert ended(RankOutcome(0, 0, ""), RankOutcome(1, 0, ""), returned=143, by=signal.SIGTERM) == 0


def test_a_rank_that_lost_one_that_stopped_is_no_failure(ended: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = RankOutcome(1, 143, "stopped by SIGTERM after step 7, saved.", time=1.0)
    lost = RankOutcome(0, 1, "rank 1 went away", time=1.1, lost_peer=True)
    assert ended(lost, stopped, returned=143, by=signal.SIGTERM) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM after step 7, saved.\n"
    assert ended(lost, stopped, returned=1) == 1, "nobody asked for it: torchrun ended it on its way out"


def test_what_an_earlier_start_left_on_another_machine_is_not_of_this_one(
    ended: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    here = [RankOutcome(0, 0, ""), RankOutcome(1, 0, "")]
    assert ended(*here, RankOutcome(2, 2, "a mistake of yesterday", time=-60.0, host="gone")) == 0
    assert ended(*here, RankOutcome(2, 2, "a mistake", time=1.0, host="there")) == 2


def test_a_rank_that_could_leave_no_word_has_spoken_itself(ended: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(returned=2) == 2
    assert ended(RankOutcome(1, 1, "rank 0 went away", lost_peer=True), returned=2) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_began_is_passed_on_once_and_says_that_nothing_was_lost(
    ended: Launch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    assert ended(returned=128 + number, by=number) == 128 + number
    assert "stopped before training began; nothing to save" in capsys.readouterr().err
    assert {each: signal.getsignal(each) for each in before} == before, "the handlers are those of before"


@pytest.mark.parametrize(
    ("returned", "why"),
    [(-9, r"by signal 9 \(SIGKILL\) before ranks \[0, 1\]"), (0, r"with code 0 before ranks \[0, 1\]")],
)
def test_a_launcher_that_ends_before_its_ranks_is_an_error(
    ended: Launch, capsys: pytest.CaptureFixture[str], tmp_path: Path, returned: int, why: str
) -> None:
    # Outcomes of an earlier try must not be taken for this one's.
    (tmp_path / "run/exit").mkdir(parents=True)
    for rank in (0, 1):
        (tmp_path / f"run/exit/rank-{rank}.json").write_text(json.dumps(asdict(RankOutcome(rank, 0, ""))))
    assert ended(returned=returned) == 1
    assert re.search(why, capsys.readouterr().err)


def test_outcomes_are_read_in_the_order_in_which_ranks_ended(tmp_path: Path) -> None:
    outcomes = [
        RankOutcome(0, 1, "last", "details", 12.5),
        RankOutcome(1, 0, "", "", 11.0),
        RankOutcome(2, -9, "first", "", 3.0),
    ]
    for outcome in outcomes:
        (tmp_path / f"rank-{outcome.rank}.json").write_text(json.dumps(asdict(outcome)))
    (tmp_path / "other.json").write_text("not an outcome")
    assert read_outcomes(tmp_path) == sorted(outcomes, key=lambda outcome: outcome.time)


# ---- processes that end ----


def python(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in (LAUNCHER_PID, EXIT_DIR, "RANK")}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


RANK = """
import sys
from pathlib import Path
from pipeline.distributed import run_rank
from pipeline.errors import DataError

def work():
    {work}

raise SystemExit(run_rank(work, Path(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("work", "code", "message", "details"),
    [
        ("pass", 0, "", ""),
        ("raise DataError('val-000000.tar: shard is missing.')", 2, "val-000000.tar: shard is missing.", ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero", "Traceback"),
        ("raise OSError(28, 'No space left on device', 'last.ckpt')", 2, "last.ckpt: No space left on device. The disk", ""),
    ],
)
def test_a_rank_leaves_how_it_ended(tmp_path: Path, work: str, code: int, message: str, details: str) -> None:
    process = python(RANK.format(work=work), str(tmp_path), RANK="1")
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == code, errors
    (outcome,) = read_outcomes(tmp_path)
    assert (outcome.rank, outcome.exit_code) == (1, code)
    assert outcome.message.startswith(message)
    assert outcome.details.startswith(details)
    assert message in errors, "without a front door the rank speaks for itself"


def test_a_rank_that_succeeded_is_not_ended_by_what_outlives_the_interpreter(tmp_path: Path) -> None:
    work = "import atexit, ctypes; libc = ctypes.CDLL(None); atexit.register(print, 'tidy'); libc.on_exit(libc.abort, None)"
    process = python(RANK.format(work=work), str(tmp_path), RANK="0")
    said, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors
    assert said == "tidy\n"


def test_a_rank_that_fails_before_it_begins_does_not_succeed(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").mkdir()
    process = python(RANK.format(work="pass"), str(tmp_path), RANK="0")
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1, errors


BOUND = """
import sys, time
from pipeline.distributed import die_with
die_with(int(sys.argv[1]))
print("bound", flush=True)
time.sleep(60)
"""


def test_a_process_dies_with_the_one_that_it_is_bound_to() -> None:
    other = python("import time; time.sleep(60)")
    processes = [other, bound := python(BOUND, str(other.pid))]
    try:
        assert bound.stdout is not None
        assert bound.stdout.readline() == "bound\n"
        assert bound.poll() is None
        other.kill()
        assert bound.wait(timeout=LIMIT_SECONDS) == 1
        other.wait(timeout=LIMIT_SECONDS)
        processes.append(late := python(BOUND, str(other.pid)))
        assert late.wait(timeout=LIMIT_SECONDS) == 1, "the other had already ended"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_rank_dies_with_a_launcher_that_is_killed() -> None:
    rank = (
        "import time; from pipeline.distributed import die_with_parent\ndie_with_parent(); print(1, flush=True); time.sleep(60)"
    )
    launcher = python(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)",
        rank,
    )
    try:
        assert launcher.stdout is not None
        descriptor = os.pidfd_open(int(launcher.stdout.readline()))
        launcher.kill()
        ended, _, _ = select.select([descriptor], [], [], LIMIT_SECONDS)
        assert ended, "the rank lives on"
        os.close(descriptor)
    finally:
        launcher.kill()
        launcher.communicate()


def test_a_rank_whose_launcher_had_already_ended_does_nothing() -> None:
    process = python(
        "from pipeline.distributed import die_with_parent; die_with_parent(); print('went on')", SHARDLINE_LAUNCHER_PID="1"
    )
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert (process.returncode, said) == (1, "")


# ---- whose fault it is ----


def raised_by(work: Callable[[], object]) -> Exception:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


MEMBERS = [Member(0, "node1", "10.0.0.1"), Member(1, "node2", "10.0.0.2"), Member(2, "node3", "10.0.0.3")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4242", "rank 1 on node2 went away"),
        (
            "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete",
            r"ranks 1, 2 on node2, node3 did not answer in time \(hung, or the link is cut\)",
        ),
        ("Application timeout caused pair closure", "ranks 1, 2 on node2, node3 did not answer in time"),
        ("NCCL communicator was aborted on rank 0", "ranks 1, 2 on node2, node3 went away"),
    ],
)
def test_an_error_of_a_collective_names_the_ranks_that_were_lost(
    monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setattr(distributed, "_members", MEMBERS)
    monkeypatch.setenv("RANK", "0")
    said = distributed.lost_peer(RuntimeError(text))
    assert said is not None
    assert re.search(words, said)


def test_an_error_raised_in_a_collective_is_one_whatever_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_members", MEMBERS)
    error = raised_by(lambda: torch.distributed.distributed_c10d._get_default_group())
    assert isinstance(error, ValueError)
    assert distributed.lost_peer(error) is None, "no group was made: that is our own mistake"
    assert distributed.lost_peer(torch.distributed.DistBackendError("anything")) is not None


def test_a_rank_that_can_write_nothing_says_how_it_ended(tmp_path: Path) -> None:
    work = "p = Path(sys.argv[1]); p.rmdir(); p.touch(); raise OSError(28, 'No space left on device', 'last.ckpt')"
    process = python(RANK.format(work=work), str(tmp_path), RANK="1", **{LAUNCHER_PID: str(os.getpid())})
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2
    assert errors.startswith("rank 1: last.ckpt: No space left on device. The disk is full")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader timed out after 300 seconds"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError(104, "Connection reset by peer"),
        ValueError("NCCL"),
    ],
)
def test_an_error_of_its_own_is_no_lost_rank(error: Exception) -> None:
    assert distributed.lost_peer(error) is None


def outcome(rank: int, code: int, seconds: float, *, lost: bool = False) -> RankOutcome:
    return RankOutcome(rank, code, f"rank {rank}", time=1000.0 + seconds, host=f"node{rank}", lost_peer=lost)


@pytest.mark.parametrize(
    ("outcomes", "first"),
    [
        ([outcome(0, 1, 0.0, lost=True), outcome(1, -9, 1.5)], 1),  # killed; torchrun noticed late
        ([outcome(0, 1, 0.0, lost=True), outcome(1, 1, 8.0)], 1),  # failed by itself, on a machine whose clock is late
        ([outcome(0, 1, 6.0, lost=True), outcome(1, -9, 36.0)], 0),  # hung, until torchrun killed it
        ([outcome(0, 1, 3.0), outcome(1, 1, 2.0), outcome(2, -15, 1.0)], 1),
        ([outcome(0, 143, 0.0), outcome(1, 1, 2.0)], 1),  # ended by torchrun on its way out of training
    ],
)
def test_the_cause_comes_before_its_consequences(tmp_path: Path, outcomes: list[RankOutcome], first: int) -> None:
    for each in outcomes:
        (tmp_path / f"rank-{each.rank}.json").write_text(json.dumps(asdict(each)))
    assert read_outcomes(tmp_path)[0].rank == first


# ---- several machines ----


def test_a_machine_alone_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PET_NNODES", "PET_NODE_RANK", "PET_NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PROCS", "3")
    assert (num_nodes(), is_first_node(), processes_here()) == (1, True, 3)


@pytest.mark.parametrize(("nodes", "per_node", "expected"), [("4", "8", (4, 8)), ("2:4", "auto", (4, 3)), ("2", "", (2, 3))])
def test_the_variables_of_torchrun_say_how_many_machines_and_processes(
    monkeypatch: pytest.MonkeyPatch, nodes: str, per_node: str, expected: tuple[int, int]
) -> None:
    monkeypatch.setenv("PET_NNODES", nodes)
    monkeypatch.setenv("PET_NPROC_PER_NODE", per_node)
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("PROCS", "3")
    assert (num_nodes(), processes_here()) == expected
    assert not is_first_node()


@pytest.mark.parametrize("nodes", ["two", "0", "", "2:"])
def test_a_number_of_machines_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, nodes: str) -> None:
    monkeypatch.setenv("PET_NNODES", nodes)
    with pytest.raises(ConfigError, match=f"PET_NNODES is '{nodes}'; it must be a number of machines, or MIN:MAX"):
        num_nodes()


def test_a_first_machine_that_does_not_answer_is_named_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        for name, value in (("NNODES", "2"), ("NODE_RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
            monkeypatch.setenv(f"PET_{name}", value)
        monkeypatch.setenv("PET_MASTER_PORT", str(listener.getsockname()[1]))
        with pytest.raises(
            RunError, match=r"127\.0\.0\.1:\d+ \(PET_MASTER_ADDR, PET_MASTER_PORT\) cannot be reached from .* after 0 s"
        ):
            require_first_machine(0.1)
        listener.listen()
        require_first_machine(0.1)


STUBBORN = """
import subprocess, sys
from pipeline import launch
launch.STOP_WAIT_SECONDS = 0.5
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_{}); print(1, flush=True); time.sleep(60)"
commands = [[sys.executable, "-c", code.format(does)] for does in ("IGN", "DFL")]
ranks = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
for rank in ranks:
    rank.stdout.readline()
launch._stop_ranks(15)
print([rank.wait() for rank in ranks])
"""


def test_ranks_that_do_not_stop_are_killed_a_while_after_the_first_that_did() -> None:
    process = python(STUBBORN)
    said, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert said.strip() == "[-9, -15]", errors
