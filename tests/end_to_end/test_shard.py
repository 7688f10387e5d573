"""`shardline shard` killed at random moments until it is done, or divided among jobs: always the same data set and no more."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.files import sha256_of
from pipeline.manifest import load_dataset
from tests.processes import kill, shardline, wait_until

NUM_IMAGES = 1500
SETTINGS = ("--dataset.samples_per_shard=40", "--max-rejected=0.01", "--workers=3")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of noise in five classes, some byte-identical, one of them cut short."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / f"class-{number % 5}" / f"{number:04d}.{'png' if number % 7 == 0 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        level = number if number % 50 else 0
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) if level else np.zeros((9, 9, 3), np.uint8)).save(
            path
        )
    bad = folder / "class-1/0001.jpg"
    bad.write_bytes(bad.read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of one run from beginning to end."""
    target = tmp_path_factory.mktemp("undisturbed") / "dataset"
    done = shardline("shard", f"--dataset.source={images}", f"--dataset.path={target}", *SETTINGS, cwd=target.parent)
    assert done.returncode == 0, done.stderr
    return target


def hashes_of(folder: Path) -> dict[str, str]:
    """Sha256 of every file, hidden ones too; of dataset.json, which names the time, its digest."""
    found = {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
    return {**found, "dataset.json": load_dataset(folder).digest}


def require_same(target: Path, expected: Path) -> None:
    """`target` must hold what `expected` holds, and its folder nothing but it and its lock."""
    assert hashes_of(target) == hashes_of(expected)
    assert sorted(path.name for path in target.parent.iterdir()) == [f".{target.name}.lock", target.name]


def processes_at(folder: Path) -> list[int]:
    """Pids of processes whose current folder is `folder`: those that a test started there, and their workers."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and (path / "cwd").readlink() == folder and (path / "stat").read_text().split()[2] != "Z":
                found.append(int(path.name))
    return found


@contextlib.contextmanager
def shard_in_background(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`shardline shard` in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "shard", *arguments],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process.pid)
        process.communicate()


def files_in(folder: Path) -> set[str]:
    """Names of all files below a folder, which may not be there yet and changes while we look."""
    return {name for _, _, names in os.walk(folder) for name in names}


def wait_for_work(target: Path, process: subprocess.Popen[bytes], num_files: int) -> None:
    """Wait until a run has made so many new files, so that kills fall into its work and not into its imports, or has ended."""
    before = files_in(target / ".partial")
    wait_until(
        lambda: process.poll() is not None or len(files_in(target / ".partial") - before) >= num_files, "the run to get on"
    )


@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "parent"])
def test_killed_at_random_moments_it_ends_with_the_same_data_set(
    whole_group: bool, images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    target = tmp_path / "dataset"
    arguments = (f"--dataset.source={images}", f"--dataset.path={target}", *SETTINGS)
    pick = random.Random(int(whole_group))
    kills = 0
    for _ in range(60):
        with shard_in_background(*arguments, cwd=tmp_path) as process:
            wait_for_work(target, process, pick.randint(1, 14))
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.wait(timeout=pick.uniform(0.0, 0.03)) == 0, process.stderr and process.stderr.read()
                break
            if whole_group:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            kills += 1
            wait_until(lambda: not processes_at(tmp_path), "the workers to end with their parent", seconds=5.0)
    assert kills >= 3
    require_same(target, undisturbed)


def test_three_jobs_at_once_of_which_one_is_killed_make_the_same_data_set(
    images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    target = tmp_path / "dataset"
    arguments = (f"--dataset.source={images}", f"--dataset.path={target}", *SETTINGS)
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(shard_in_background(*arguments, f"--part={part}/3", cwd=tmp_path)) for part in (1, 2, 3)]
        wait_for_work(target, jobs[1], 1)
        kill(jobs[1].pid)
        for job in (jobs[0], jobs[2]):
            assert job.wait(timeout=100) == 0, job.stderr and job.stderr.read()
    early = shardline("shard", *arguments, "--merge", cwd=tmp_path)
    assert early.returncode == 2
    assert " of part 2/3. Run `shardline shard --part` for each of these parts, then merge." in early.stderr
    last = shardline("shard", *arguments, "--part=2/3", cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert "left    nothing" in last.stdout
    merge = shardline(*last.stdout.split("shardline ")[1].split(), cwd=tmp_path)
    assert merge.returncode == 0, merge.stderr
    assert "rejected  1 image file is truncated" in merge.stdout
    require_same(target, undisturbed)


def test_ctrl_c_ends_it_at_once_and_says_how_to_go_on(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    log = tmp_path / "log"
    for number in range(4):  # seconds of work, so that there is a middle of it on a busy machine too
        shutil.copytree(images, tmp_path / f"source/{number}")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pipeline",
                "shard",
                f"--dataset.source={tmp_path}/source",
                f"--dataset.path={target}",
                *SETTINGS,
            ],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait_until(lambda: bool(list((target / ".partial").glob("*/*"))), "the first piece of work")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert log.read_text().splitlines() == [f"{target}: run the same command again to go on", "stopped"]
    assert processes_at(tmp_path) == []
    assert list(target.glob("*.tar")) == []
