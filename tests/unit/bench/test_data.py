import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.bench.data import make_synthetic, run_benchmark
from pipeline.bench.images import HEIGHT, WIDTH, make_images
from pipeline.bench.measure import measure_open
from pipeline.bench.plot import draw


def test_the_images_are_the_same_everywhere_and_as_large_as_told(tmp_path: Path) -> None:
    folders = [make_images(tmp_path / name, 20) for name in ("one", "two")]
    paths = [sorted(folder.rglob("*.jpg")) for folder in folders]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]
    with Image.open(paths[0][0]) as image:
        assert image.size == (WIDTH, HEIGHT)
    # 71 KB is the mean of thousands; 20 of them are off by a few.
    assert np.mean([path.stat().st_size for path in paths[0]]) == pytest.approx(71_000, rel=0.1)


def test_reading_is_measured_and_judged(tmp_path: Path) -> None:
    benchmark = run_benchmark(tmp_path, ["read"], num_images=64, num_workers=1, rounds=1)
    figures = benchmark.figures["read"]
    assert figures["shardline"]["samples"] == figures["webdataset"]["samples"] == 64
    (target,) = benchmark.targets
    assert target.met == (target.value >= 3)
    written = json.loads((tmp_path / "results/bench.json").read_text())
    assert written["machine"]["cores"] >= 1 and written["figures"]["read"].keys() == figures.keys()
    assert written["machine"]["versions"]["webdataset"]
    table = (tmp_path / "results/bench.md").read_text()
    assert "| reading without decoding beside webdataset | " in table and "\nOur crops are decoded by " in table


def test_a_training_step_is_measured_and_judged(tmp_path: Path) -> None:
    benchmark = run_benchmark(tmp_path, ["step"], num_images=64, num_workers=1, rounds=1, steps=100)
    figures = benchmark.figures["step"]
    assert figures.keys() == {"plain loop", "bare Trainer", "shardline train"}
    (target,) = benchmark.targets
    assert target.value == figures["shardline train"]["cpu_us"] - figures["bare Trainer"]["cpu_us"]
    assert target.met == (target.value <= 100)


def test_a_data_set_of_a_hundred_million_samples_is_opened(tmp_path: Path) -> None:
    figures = measure_open(str(make_synthetic(tmp_path / "synthetic")), share=0.9)
    assert (figures["samples"], figures["index_bytes_a_sample"], figures["batch"]) == (100_000_000, 20, 64)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    ours = {"images_a_second": 800.0, "cpu_ms": 1.0, "startup_seconds": 0.2}
    rounds = {
        "shardline": [ours, {**ours, "cpu_ms": 1.2}],
        "other": [{**ours, "cpu_ms": 4.0}],
        "bare decode": [{"cpu_ms": 1.1}],
    }
    draw(rounds, tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as image:
        assert image.width > 500
