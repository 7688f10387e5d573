import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.findings import count_leaks, count_repeats, enumerate_names, imbalance
from pipeline.data.inspect import Inspection, inspect_dataset
from pipeline.manifest import ImageStats
from tests.unit.data.handmade import Sample, make_dataset
from tests.unit.data.images import encode, noise


def picture(seed: int, size: tuple[int, int] = (60, 45), lighter: int = 0) -> bytes:
    blotches = Image.fromarray(noise(6, 8, seed) // 2 + 40 + lighter).resize(size, Image.Resampling.BICUBIC)
    return encode(blotches, "PNG")


def samples(first: int, number: int, num_classes: int = 2, **options: Any) -> list[Sample]:
    return [Sample(f"s{seed}", picture(seed, **options), seed % num_classes) for seed in range(first, first + number)]


def inspected(folder: Path, splits: dict[str, list[Sample]], class_names: list[str]) -> Inspection:
    """What is found in a data set whose statistics are stated right."""
    manifest = make_dataset(folder, splits, class_names)
    figures = inspect_dataset(manifest, DataConfig(), 1).figures.splits["train"]
    right = dataclasses.replace(manifest, image_stats=ImageStats("train", figures.mean, figures.std)).save()
    return inspect_dataset(right, DataConfig(), 1)


def lines(folder: Path, splits: dict[str, list[Sample]], class_names: tuple[str, ...] = ("a", "b")) -> list[str]:
    return [f"{finding.level}: {finding.text}" for finding in inspected(folder, splits, list(class_names)).findings]


def test_nothing_stands_out_in_a_good_data_set(tmp_path: Path) -> None:
    (line,) = lines(tmp_path / "data", {"train": samples(0, 24), "val": samples(24, 8), "test": samples(32, 8)})
    assert line == "good: Nothing stands out. Look at the samples below all the same."


def test_leaks_come_first_with_their_thresholds(tmp_path: Path) -> None:
    train = samples(0, 24)
    near = encode(Image.fromarray(noise(6, 8, 5) // 2 + 40).resize((60, 45), Image.Resampling.BICUBIC), "JPEG", quality=80)
    test = [*samples(40, 6), *train[:3], Sample("near", near, 1)]
    found = lines(tmp_path / "data", {"train": train, "test": test})
    exact, near_ones = found
    assert exact == (
        "problem: 3 images (30.0 %) of test are byte-identical to images of train: results on test flatter. "
        "Remove them from one of the two."
    )
    assert near_ones == (
        "problem: 1 image (10.0 %) of test is a near copy of images of train (perceptual hashes within 4 of 64 bits, "
        "thumbnails within 8 of 255 levels and 25% of their contrast): look at the pairs; real copies flatter the results on "
        "test."
    )


def test_leaks_and_repeats_are_counted_by_split(tmp_path: Path) -> None:
    train, val = samples(0, 20), samples(30, 10)
    splits = {
        "train": [*train, train[0], train[0]],
        "val": [*val, train[3]],
        "test": [*samples(50, 9), train[1], val[0], val[1]],
    }
    inspection = inspected(tmp_path / "data", splits, ["a", "b"])
    leaks = count_leaks(inspection.samples, inspection.duplicates)
    assert leaks == {("test", "train"): (1, 0), ("val", "train"): (1, 0), ("test", "val"): (2, 0)}
    assert count_repeats(inspection.samples, inspection.duplicates) == {"train": (2, 0), "val": (0, 0), "test": (0, 0)}
    texts = [finding.text for finding in inspection.findings]
    assert "2 images (9.1 %) of train repeat others of train (2 byte for byte)." in texts


def test_copies_with_different_labels_are_a_problem(tmp_path: Path) -> None:
    train = samples(0, 24)
    found = lines(tmp_path / "data", {"train": [*train, Sample("again", train[0].encoded, 1)]})
    assert found[0] == "problem: 1 group of byte-identical images carries different labels."
    assert found[1] == "note: 1 image (4.0 %) of train repeats others of train (1 byte for byte)."


def test_classes_that_a_split_lacks_are_named(tmp_path: Path) -> None:
    train = samples(0, 20)
    found = lines(tmp_path / "data", {"train": train, "val": [s for s in samples(20, 24) if s.label]}, ("a", "b", "c"))
    assert "problem: 1 class has no sample in train: c." in found
    assert "look: 2 classes have no sample in val: a, c." in found


def test_imbalance_and_small_classes_are_found_in_train(tmp_path: Path) -> None:
    train = [*samples(0, 33, num_classes=1), *[Sample(f"b{n}", picture(100 + n), 1) for n in range(3)]]
    found = lines(tmp_path / "data", {"train": train})
    assert found == [
        "look: `a` has 11 times the samples of `b` in train (33 and 3; threshold 10 times).",
        "look: 1 class has fewer than 10 samples in train: b.",
    ]


def test_images_without_any_label_are_noted(tmp_path: Path) -> None:
    train = [Sample(f"{n}", picture(n), (0,) if n else ()) for n in range(20)]
    assert lines(tmp_path / "data", {"train": train}, ("a",)) == ["note: 1 image (5.0 %) of train has no label at all."]


def test_an_odd_image_is_a_reason_to_look_and_a_damaged_one_a_problem(tmp_path: Path) -> None:
    black = Sample("black", encode(Image.new("RGB", (60, 45)), "PNG"), 0)
    found = lines(tmp_path / "data", {"train": [*samples(0, 22), black, Sample("broken", b"?", 1)]})
    assert found == [
        "problem: 1 image (4.2 %) is undecodable: damaged, or of no known format.",
        "look: 1 image (4.2 %) is blank: nearly one colour (no channel varies by more than 3 of 255).",
    ]


def test_the_gravest_come_first(tmp_path: Path) -> None:
    train = [*samples(0, 5), Sample("broken", b"?", 1)]
    found = lines(tmp_path / "data", {"train": train})
    assert [line.split(":")[0] for line in found] == ["problem", "look"]
    assert "undecodable" in found[0]
    assert "fewer than 10 samples" in found[1]


def test_what_most_images_are_is_only_noted(tmp_path: Path) -> None:
    found = lines(tmp_path / "data", {"train": samples(0, 24, size=(16, 12))})
    assert found == ["note: All 24 images are tiny: a side below 32 pixels."]


def test_a_split_that_is_brighter_than_train_is_found(tmp_path: Path) -> None:
    found = lines(tmp_path / "data", {"train": samples(0, 24), "test": samples(24, 12, lighter=60)})
    (line,) = [line for line in found if "brighter" in line]
    assert line.startswith("look: Images of test are brighter than those of train: mean level 16")
    assert line.endswith("(threshold 0.25).")


def test_a_split_of_other_sizes_is_found(tmp_path: Path) -> None:
    found = lines(tmp_path / "data", {"train": samples(0, 24), "val": samples(24, 12, size=(120, 90))})
    (line,) = found
    assert line == (
        "look: Images of val have another size than those of train: half have at most 0.0108 megapixels, in train 0.0027 "
        "(threshold 1.25 times)."
    )


def test_a_split_with_other_shares_of_the_classes_is_found(tmp_path: Path) -> None:
    test = [Sample(f"x{n}", picture(100 + n), int(n < 4)) for n in range(80)]
    found = lines(tmp_path / "data", {"train": samples(0, 80), "test": test})
    (line,) = found
    assert line == (
        "look: Classes are distributed otherwise in test than in train: 45% of the samples would have to change class "
        "(threshold 10%)."
    )


def test_statistics_in_the_manifest_that_are_wrong_are_found(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", {"train": samples(0, 24)}, ["a", "b"])
    right = inspect_dataset(manifest, DataConfig(), 1).figures.splits["train"]
    wrong = [right.mean[0], right.mean[1] + 0.1, right.mean[2]]
    manifest = dataclasses.replace(manifest, image_stats=ImageStats("train", wrong, right.std)).save()
    (finding,) = inspect_dataset(manifest, DataConfig(), 1).findings
    assert finding.level == "look"
    assert "are off by 0.100 of 1 (threshold 0.02)" in finding.text


@pytest.mark.parametrize(("counts", "ratio"), [([30, 10, 0], 3.0), ([5], 1.0), ([0, 0], None), ([], None)])
def test_imbalance_is_between_classes_that_occur(counts: list[int], ratio: float | None) -> None:
    assert imbalance(counts) == ratio


def test_long_lists_of_long_names_are_cut() -> None:
    assert enumerate_names(["a", "b"]) == "a, b"
    assert enumerate_names([str(n) for n in range(9)]) == "0, 1, 2, 3, 4 and 4 more"
    assert enumerate_names(["x" * 50]) == "x" * 31 + "…"
    assert np.all([len(name) <= 32 for name in enumerate_names(["y" * 40] * 3).split(", ")])
