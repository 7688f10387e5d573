import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.bench.images import make_images
from pipeline.bench.loaders import Sets
from pipeline.bench.measure import cpu_seconds, in_process

WORK = "import time\nwhile time.process_time() < 0.5: pass\nprint(1, flush=True)\nimport sys; sys.stdin.read()"


def burn(seconds: float) -> None:
    while time.thread_time() < seconds:
        pass


def test_cpu_time_counts_threads_and_children_that_run_and_that_ended() -> None:
    before = cpu_seconds()
    thread = threading.Thread(target=burn, args=(0.3,))
    thread.start()
    thread.join()
    # 10 ms is the grain of what the kernel says of a process that still runs.
    assert cpu_seconds() - before >= 0.29
    with subprocess.Popen([sys.executable, "-c", WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "1\n"
        running = cpu_seconds() - before
        assert running >= 0.3 + 0.48
    ended = cpu_seconds() - before
    assert running - 0.02 <= ended <= running + 1.0, "a child must not be counted twice"


# In a process of its own: one that has freed as much before has the room already.
SHARED_MEMORY = """
import torch
from pipeline.bench.measure import resident_bytes
before = resident_bytes()
batch = torch.ones(50_000_000, dtype=torch.uint8)
own = resident_bytes() - before
shared = batch.share_memory_()
del batch
print(own, resident_bytes() - before, len(shared))
"""


def test_memory_shared_with_worker_processes_is_counted() -> None:
    said = subprocess.check_output([sys.executable, "-c", SHARED_MEMORY], text=True, timeout=60)
    own, shared, _ = map(int, said.split())
    assert own == pytest.approx(50e6, rel=0.1)
    assert shared == pytest.approx(50e6, rel=0.1)


def test_a_loader_is_measured_in_its_second_epoch(tmp_path: Path) -> None:
    sets = Sets(tmp_path, 256)
    make_images(sets.folder, 256)
    sets.write(sets.folder, sets.dataset)
    assert len(list(sets.dataset.glob("*.tar"))) == 8
    figures = in_process("loader", **sets.arguments("shardline", 1))
    assert figures["images"] == 256
    # A decoder that were never run, or counted twice over two epochs, would be outside.
    assert 0.3 < figures["cpu_ms"] < 20 and 0 < figures["startup_seconds"] < 60
    held = in_process("memory", epochs=2, **sets.arguments("shardline", 1))
    assert list(held) == ["after 1", "after 2"] and held["after 2"] > 50


def test_too_few_images_for_two_batches_are_named(tmp_path: Path) -> None:
    sets = Sets(tmp_path, 64)
    make_images(sets.folder, 64)
    sets.write(sets.folder, sets.dataset)
    with pytest.raises(RuntimeError, match="too few images for two batches"):
        in_process("loader", **sets.arguments("shardline", 1))
