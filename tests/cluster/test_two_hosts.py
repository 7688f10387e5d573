"""Two hosts and a link between them: what Kubernetes sets, elastic torchrun, killed workers, and cuts of the link."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY, missing_for
from tests.cluster.hosts import Hosts, two_hosts
from tests.processes import processes_of, ranks_of, wait_until

pytestmark = pytest.mark.cluster
STEPS_PER_EPOCH = 16  # 1,069 samples in batches of 64
# Enough to be hurt on the way: the first checkpoint is awaited after 10 steps, and each costs a tenth of a second.
NUM_EPOCHS = 12
POD = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "h1", "PET_MASTER_PORT": "29500"}


@pytest.fixture
def hosts(shared_folder: Path) -> Iterator[Hosts]:
    """Two hosts that see the folder with the data set."""
    why = missing_for("ip", "nsenter", "unshare")
    if why:
        pytest.skip(why)
    with two_hosts(shared_folder) as made:
        yield made


def settings(name: str, epochs: int, timeout: int = 60) -> list[str]:
    return [
        f"--name={name}",
        "--dataset.path=data/digits",
        f"--trainer.max_epochs={epochs}",
        "--trainer.checkpoint_every_steps=5",
        f"--trainer.timeout_seconds={timeout}",
        "--scheduler.name=null",
    ]


@contextlib.contextmanager
def both(hosts: Hosts, name: str, command: list[str], **variables: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The same command on both hosts, as two pods of a job; ended with the block."""
    started = [
        hosts.start(host, command, log_of(hosts, name, host), **POD, PET_NODE_RANK=str(number), **variables)
        for number, host in enumerate(("h1", "h2"))
    ]
    try:
        yield started
    finally:
        end(started)


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill process groups, by their first process."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_of(hosts: Hosts, name: str, host: str) -> Path:
    return hosts.folder / f"{name}.{host}.log"


def said_by(hosts: Hosts, name: str) -> str:
    return "".join(f"== {host}\n{log_of(hosts, name, host).read_text()}" for host in ("h1", "h2"))


def newest_step(run_dir: Path) -> int:
    link = run_dir / "checkpoints/last.ckpt"
    return int(re.findall(r"\d+", str(link.readlink()))[0]) if link.is_symlink() else 0


def wait_for_checkpoints(run_dir: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Until ten steps are saved, or a process has ended."""
    wait_until(lambda: newest_step(run_dir) >= 10 or any(p.poll() is not None for p in processes), "the first checkpoints")
    assert newest_step(run_dir) >= 10, "ended before it saved anything"


def test_pods_with_the_variables_of_kubernetes_run_the_chain(hosts: Hosts) -> None:
    chain = ["bash", str(REPOSITORY / "configs/kubernetes/base/chain.sh"), *settings("pods", 2)]
    with both(hosts, "pods", chain, WORK=str(hosts.folder), JOB_UID="one") as pods:
        codes = [pod.wait(timeout=200) for pod in pods]
    said = said_by(hosts, "pods")
    assert codes == [0, 0], said
    assert "training pods on 2 DDP processes" in said
    assert said.count("model published") == 1
    assert (hosts.folder / "runs/pods/export/model.onnx").is_file()


def test_doctor_looks_at_both_hosts_and_at_what_lies_between_them(hosts: Hosts) -> None:
    with both(hosts, "doctor", ["shardline", "doctor", "--dataset.path=data/digits"]) as pods:
        codes = [pod.wait(timeout=120) for pod in pods]
    assert codes == [0, 0], said_by(hosts, "doctor")
    findings = json.loads((hosts.folder / "runs/doctor.json").read_text())
    assert {finding["host"] for finding in findings if finding["check"] == "open files"} == {"h1", "h2"}
    found = {finding["check"]: finding["found"] for finding in findings}
    assert found["rendezvous"].startswith("2 processes on 2 machines: ")
    assert found["all reduce"].startswith("right, ")


def test_a_killed_worker_is_named_on_both_hosts_and_the_job_goes_on(hosts: Hosts) -> None:
    run_dir = hosts.folder / "runs/worker"
    command = ["shardline", "train", *settings("worker", NUM_EPOCHS)]
    with both(hosts, "worker", command) as pods:
        wait_for_checkpoints(run_dir, pods)
        os.kill(ranks_of(run_dir)[1], signal.SIGKILL)
        codes = [pod.wait(timeout=60) for pod in pods]
    assert codes == [1, 1]
    for host in ("h1", "h2"):
        assert "shardline: error: rank 1 on h2: was killed by SIGKILL" in log_of(hosts, "worker", host).read_text()
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)
    with both(hosts, "worker", command) as pods:
        assert [pod.wait(timeout=150) for pod in pods] == [0, 0], said_by(hosts, "worker")
    assert re.search(r"going on after step \d+:", said_by(hosts, "worker"))
    assert newest_step(run_dir) == NUM_EPOCHS * STEPS_PER_EPOCH


def test_a_link_that_stays_cut_ends_both_sides_with_a_word_about_the_other_and_the_job_goes_on(hosts: Hosts) -> None:
    run_dir = hosts.folder / "runs/long-cut"
    command = ["shardline", "train", *settings("long-cut", NUM_EPOCHS, timeout=15)]
    with both(hosts, "long-cut", command) as pods:
        wait_for_checkpoints(run_dir, pods)
        hosts.cut_link()
        codes = [pod.wait(timeout=60) for pod in pods]
    assert codes == [1, 1], said_by(hosts, "long-cut")
    for host, other in (("h1", "rank 1 on h2"), ("h2", "rank 0 on h1")):
        log = log_of(hosts, "long-cut", host).read_text()
        assert re.search(rf"on {host}: {other} (did not answer in time|went away)", log), log
        assert len(log.splitlines()) < 40, "the cause must be on the first screen"
    hosts.mend_link()
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)
    with both(hosts, "long-cut", command) as pods:
        assert [pod.wait(timeout=150) for pod in pods] == [0, 0], said_by(hosts, "long-cut")
    assert newest_step(run_dir) == NUM_EPOCHS * STEPS_PER_EPOCH


# ---- plain torchrun, elastic ----


@contextlib.contextmanager
def elastic(hosts: Hosts, name: str, arguments: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """torchrun on both hosts, which starts its workers again by itself; ended with the block."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    agent += ["--rdzv-backend=c10d", "--rdzv-endpoint=h1:29500", f"--rdzv-id={name}"]
    command = [*agent, "-m", "pipeline", "train", *arguments]
    started = [
        hosts.start(host, command, log_of(hosts, name, host), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for host in ("h1", "h2")
    ]
    try:
        yield started
    finally:
        end(started)


def test_elastic_torchrun_goes_on_after_a_killed_worker(hosts: Hosts) -> None:
    run_dir = hosts.folder / "runs/elastic"
    with elastic(hosts, "elastic", settings("elastic", NUM_EPOCHS)) as agents:
        wait_for_checkpoints(run_dir, agents)
        os.kill(worker_of(agents[1].pid), signal.SIGKILL)
        codes = [agent.wait(timeout=200) for agent in agents]
    said = said_by(hosts, "elastic")
    assert codes == [0, 0], said
    assert re.search(r"going on after step \d+:", said)
    assert newest_step(run_dir) == NUM_EPOCHS * STEPS_PER_EPOCH


@pytest.mark.parametrize(("seconds", "is_sat_out"), [(10, True), (40, False)])
def test_elastic_torchrun_goes_on_after_a_cut_of_the_link(hosts: Hosts, seconds: int, is_sat_out: bool) -> None:
    name = f"cut-{seconds}"
    run_dir = hosts.folder / "runs" / name
    with elastic(hosts, name, settings(name, NUM_EPOCHS, timeout=25)) as agents:
        wait_for_checkpoints(run_dir, agents)
        hosts.cut_link()
        time.sleep(seconds)
        hosts.mend_link()
        codes = [agent.wait(timeout=200) for agent in agents]
    said = said_by(hosts, name)
    assert codes == [0, 0], said
    assert bool(re.search(r"going on after step \d+:", said)) is not is_sat_out
    assert newest_step(run_dir) == NUM_EPOCHS * STEPS_PER_EPOCH


def worker_of(agent: int) -> int:
    """Pid of the only worker of a torchrun."""
    (worker,) = [
        int(pid)
        for task in Path(f"/proc/{agent}/task").iterdir()
        for pid in (task / "children").read_text().split()
        if b"pipeline\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return worker
