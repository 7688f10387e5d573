import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import measure as measuring
from pipeline.data.measure import Measurement, describe_stored, mean_and_spread, measure, perceptual_hash
from pipeline.data.samples import Samples
from pipeline.preprocess import open_image
from tests.unit.data.handmade import Sample, make_dataset
from tests.unit.data.images import as_jpeg, as_png, encode, gradient, noise

Pixels = npt.NDArray[np.uint8]


def plain(height: int, width: int, colour: tuple[int, int, int]) -> Pixels:
    return np.full((height, width, 3), colour, np.uint8)


def measured(folder: Path, splits: dict[str, list[bytes]], workers: int = 1) -> Measurement:
    by_split = {
        split: [Sample(f"{split}{number}", encoded, 0) for number, encoded in enumerate(images)]
        for split, images in splits.items()
    }
    return measure(Samples.open(make_dataset(folder, by_split, ["a"]), DataConfig()), workers)


def bits_apart(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def test_facts_of_an_image_are_those_that_can_be_counted_by_hand(tmp_path: Path) -> None:
    pixels = plain(2, 4, (10, 20, 30))
    pixels[0] = (30, 20, 70)
    encoded = as_png(pixels)
    found = measured(tmp_path / "data", {"train": [encoded]})
    (facts,) = found.facts
    assert (facts["width"], facts["height"], facts["decoded"]) == (4, 2, True)
    assert facts["mean"].tolist() == [20.0, 20.0, 50.0]
    assert facts["spread"] == 20.0  # blue: half 30, half 70
    assert facts["sha256"].tobytes() == hashlib.sha256(encoded).digest()[:16]
    histogram = np.zeros((3, 256), np.int64)
    histogram[0, [10, 30]], histogram[1, 20], histogram[2, [30, 70]] = 4, 8, 4
    assert np.array_equal(found.histograms["train"], histogram)


def test_splits_are_counted_apart(tmp_path: Path) -> None:
    found = measured(
        tmp_path / "data",
        {"train": [as_png(plain(2, 2, (9, 9, 9)))] * 5, "test": [as_png(plain(1, 3, (7, 7, 7)))]},
    )
    assert (found.histograms["train"][0, 9], found.histograms["train"].sum()) == (20, 60)
    assert (found.histograms["test"][0, 7], found.histograms["test"].sum()) == (3, 9)


def test_formats_and_modes_are_those_that_are_stored(tmp_path: Path) -> None:
    grey = Image.fromarray(noise(8, 8)).convert("L")
    images = [as_jpeg(noise(8, 8)), encode(grey, "JPEG"), encode(grey.convert("RGBA"), "PNG"), encode(grey, "WEBP"), b"<html>"]
    found = measured(tmp_path / "data", {"train": [*images, images[0]]})
    assert found.stored["train"] == {"JPEG RGB": 2, "JPEG L": 1, "PNG RGBA": 1, "WEBP RGB": 1, "unreadable": 1}


def test_an_image_that_does_not_decode_is_noted_with_its_reason_and_changes_nothing_else(tmp_path: Path) -> None:
    good, cut = as_png(plain(2, 2, (9, 9, 9))), as_jpeg(noise(64, 64))[:900]
    found = measured(tmp_path / "data", {"train": [good, cut, good], "test": [b"", good]})
    assert found.facts["decoded"].tolist() == [True, False, True, False, True]
    assert [place for place, _ in found.failures] == [1, 3]
    assert all(reason for _, reason in found.failures)
    assert found.histograms["train"].sum() == 2 * 4 * 3


def test_a_rotated_photograph_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encode(Image.fromarray(noise(20, 30)), "JPEG", exif=exif)
    (facts,) = measured(tmp_path / "data", {"train": [rotated]}).facts
    assert (facts["width"], facts["height"]) == (20, 30)


def test_transparent_pixels_have_the_background_of_the_data_set(tmp_path: Path) -> None:
    clear = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "PNG")
    manifest = make_dataset(
        tmp_path / "data", {"train": [Sample("a", clear, 0)]}, ["a"], preparation={"background": [10, 20, 30]}
    )
    (facts,) = measure(Samples.open(manifest, DataConfig()), 1).facts
    assert facts["mean"].tolist() == [10.0, 20.0, 30.0]


def test_processes_and_their_order_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [as_jpeg(noise(16, 16, seed)) for seed in range(9)] + [b"bad", b"worse"]
    monkeypatch.setattr(measuring, "SAMPLES_A_JOB", 2)
    alone = measured(tmp_path / "alone", {"train": images, "test": images[:3]})
    together = measured(tmp_path / "together", {"train": images, "test": images[:3]}, workers=3)

    def shuffled(task: Callable[[Any], Any], jobs: Iterable[Any], workers: int | None) -> Iterator[Any]:
        order = list(jobs)
        random.Random(3).shuffle(order)
        return map(task, order)

    monkeypatch.setattr(measuring, "run_parallel", shuffled)
    disordered = measured(tmp_path / "disordered", {"train": images, "test": images[:3]})
    for other in (together, disordered):
        assert np.array_equal(alone.facts, other.facts)
        assert all(np.array_equal(alone.histograms[split], other.histograms[split]) for split in ("train", "test"))
        assert (alone.stored, alone.failures) == (other.stored, other.failures)


def test_only_the_first_failures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "FAILURES_KEPT", 2)
    monkeypatch.setattr(measuring, "SAMPLES_A_JOB", 1)
    found = measured(tmp_path / "data", {"train": [b"bad"] * 5})
    assert [place for place, _ in found.failures] == [0, 1]
    assert not found.facts["decoded"].any()


def test_mean_and_spread_of_a_histogram() -> None:
    histogram = np.zeros((3, 256), np.int64)
    histogram[0, 10], histogram[1, [10, 30]], histogram[2, [10, 50]] = 4, 2, (3, 1)
    mean, spread = mean_and_spread(histogram)
    assert mean.tolist() == [10.0, 20.0, 20.0]
    assert spread == pytest.approx([0.0, 10.0, 300**0.5], rel=1e-12)  # rounding of a square root


def test_the_hash_survives_another_size_and_encoding_and_tells_pictures_apart() -> None:
    pictures = [Image.fromarray(noise(6, 8, seed)).resize((160, 120), Image.Resampling.BICUBIC) for seed in range(12)]
    for picture in pictures:
        small = picture.resize((70, 52), Image.Resampling.LANCZOS)
        again = open_image(encode(picture, "JPEG", quality=40), (0, 0, 0))
        assert bits_apart(picture, small) <= 4
        assert bits_apart(picture, again) <= 4
    assert min(bits_apart(one, other) for one in pictures for other in pictures if one is not other) > 8


def test_the_hash_does_not_depend_on_brightness() -> None:
    picture = Image.fromarray(gradient(60, 80) // 2)
    assert bits_apart(picture, picture.point(lambda level: level + 40)) == 0


def test_what_is_stored_is_read_from_the_header_alone() -> None:
    assert describe_stored(as_jpeg(noise(64, 64))[:700]) == "JPEG RGB"
    assert describe_stored(b"") == "unreadable"
