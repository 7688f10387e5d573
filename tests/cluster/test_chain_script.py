"""The chain of a Kubernetes pod as the first process of its container: it hears a stop, and the verb at work is told."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY
from tests.processes import wait_until

CHAIN = REPOSITORY / "configs/kubernetes/base/chain.sh"
# In place of shardline: writes down what it does, and takes its time over training.
VERB = """#!/usr/bin/env bash
echo "begins $1" >>"$WORK/log"
if [ "$1" = train ]; then
  trap 'echo "saves" >>"$WORK/log"; exit 143' TERM
  for _ in $(seq 200); do sleep 0.1; done
fi
[ "$1" != "$FAILS" ] || exit 3
echo "ends $1" >>"$WORK/log"
"""
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a process namespace of its own"),
]


def start(folder: Path, node_rank: int, fails: str = "") -> subprocess.Popen[bytes]:
    """Run the chain as process 1 of a namespace."""
    (folder / "shardline").write_text(VERB)
    (folder / "shardline").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "WORK": str(folder), "FAILS": fails, "JOB_UID": "job"}
    environment |= {"PET_NODE_RANK": str(node_rank), "PET_NNODES": "2"}
    return subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "bash", CHAIN, "--name=x"], env=environment)


def log_of(folder: Path) -> str:
    path = folder / "log"
    return path.read_text() if path.exists() else ""


def stop(chain: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the first process, as a container's end begins."""
    (first,) = Path(f"/proc/{chain.pid}/task/{chain.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)


def test_a_stop_reaches_the_verb_which_saves_and_the_chain_ends(tmp_path: Path) -> None:
    with start(tmp_path, node_rank=0) as chain:
        wait_until(lambda: "begins train" in log_of(tmp_path), "training to begin", seconds=20)
        stop(chain)
        assert chain.wait(timeout=20) == 143
    assert log_of(tmp_path).splitlines()[-2:] == ["begins train", "saves"]


def test_a_pod_that_waits_for_the_first_one_stops_too(tmp_path: Path) -> None:
    with start(tmp_path, node_rank=1) as chain:
        wait_until(lambda: (tmp_path / ".chain/job").is_dir(), "the pod to wait", seconds=20)
        stop(chain)
        assert chain.wait(timeout=20) == 143
    assert log_of(tmp_path) == ""


def test_a_verb_that_fails_ends_the_chain_with_its_code(tmp_path: Path) -> None:
    with start(tmp_path, node_rank=0, fails="check") as chain:
        assert chain.wait(timeout=20) == 3
    assert log_of(tmp_path).splitlines() == ["begins shard", "ends shard", "begins check"]
