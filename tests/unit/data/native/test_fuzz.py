"""The inputs that `make fuzz` begins with, through the extension, and with the sanitizers where clang is installed."""

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.native import STATUSES, with_restarts
from pipeline.errors import DataError

_jpeg: Any = pytest.importorskip("pipeline.data.native._jpeg", reason="the native decoder is not built; `make native`")

PROJECT = Path(__file__).parents[4]
CORPUS = sorted((PROJECT / "tests/fuzz/corpus").iterdir())
NUM_CHOICES = 9  # bytes behind the JPEG, by which decoder.c chooses the crop
MAX_PIXELS = 1 << 16


def test_the_corpus_is_there_and_small() -> None:
    assert len(CORPUS) >= 24
    assert sum(path.stat().st_size for path in CORPUS) < 200_000


def test_no_input_ends_the_process_and_each_has_a_status() -> None:
    found = set()
    for path in CORPUS:
        jpeg = path.read_bytes()[:-NUM_CHOICES]
        pixels = np.zeros((31, 17, 3), np.uint8)
        for key in range(8):
            found.add(STATUSES[_jpeg.random_crop(jpeg, key, 0.08, 0.5, MAX_PIXELS, 31, 17, pixels)])
        for box in [(0, 0, 1, 1), (0, 0, 8, 8), (3, 5, 40, 20)]:
            found.add(STATUSES[_jpeg.crop(jpeg, box, True, MAX_PIXELS, 31, 17, pixels)])
        with contextlib.suppress(DataError):
            assert with_restarts(jpeg, 2)[:2] == b"\xff\xd8"
    assert {"decoded", "not supported", "too large", "broken"} <= found  # or the corpus shows too little


@pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed")
def test_the_sanitizers_find_nothing_in_the_corpus(tmp_path: Path) -> None:
    build = ["make", "--no-print-directory", f"FUZZ={tmp_path}", f"{tmp_path}/decoder"]
    built = subprocess.run(build, cwd=PROJECT, capture_output=True, text=True)
    if "libclang_rt" in built.stderr:
        pytest.skip("clang is installed without the sanitizers (Debian: libclang-rt-dev)")
    assert built.returncode == 0, built.stderr
    replay = subprocess.run([tmp_path / "decoder", "-timeout=60", *CORPUS], capture_output=True, text=True)
    assert replay.returncode == 0, replay.stderr[-4000:]
    assert replay.stderr.count("Executed ") == len(CORPUS)
