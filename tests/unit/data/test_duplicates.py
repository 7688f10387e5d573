import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import duplicates as searching
from pipeline.data.duplicates import (
    MAX_BITS,
    Duplicates,
    Thumbnails,
    connect,
    find_candidates,
    find_duplicates,
    find_same_bytes,
)
from pipeline.data.figures import find_suspicious
from pipeline.data.measure import measure
from pipeline.data.samples import Labels, Samples
from tests.unit.data.handmade import Sample, make_dataset
from tests.unit.data.images import encode, noise

CLASSES = ["a", "b", "c"]


def picture(seed: int) -> Image.Image:
    """Soft blotches, another pattern for each seed: what is left of a photograph at a glance."""
    return Image.fromarray(noise(6, 8, seed)).resize((120, 90), Image.Resampling.BICUBIC)


def jpeg(seed: int, quality: int = 92) -> bytes:
    return encode(picture(seed), "JPEG", quality=quality)


def smaller_copy(seed: int) -> bytes:
    return encode(picture(seed).resize((61, 46), Image.Resampling.LANCZOS), "JPEG", quality=60)


def search(folder: Path, splits: dict[str, list[Sample]], workers: int = 1) -> Duplicates:
    samples = Samples.open(make_dataset(folder, splits, CLASSES), DataConfig())
    facts = measure(samples, workers).facts
    usable = facts["decoded"].copy()
    usable[find_suspicious(facts)["blank"]] = False
    return find_duplicates(samples, facts, Labels(samples), np.flatnonzero(usable), workers)


def test_the_same_bytes_are_found_within_and_across_splits(tmp_path: Path) -> None:
    train = [Sample(f"t{seed}", jpeg(seed), 0) for seed in range(5)]
    test = [Sample("x", jpeg(3), 0), Sample("y", jpeg(9), 0)]
    found = search(tmp_path / "data", {"train": [*train, Sample("again", jpeg(1), 0)], "test": test})
    across, within = found.groups
    assert (across.members, across.splits, across.exact, across.labels_differ) == ((3, 6), ("train", "test"), True, False)
    assert (across.pair, across.pair_exact, across.bits, across.levels) == ((3, 6), True, 0, 0.0)
    assert (within.members, within.splits) == ((1, 5), ("train",))
    assert found.same_bytes.tolist() == [0, 1, 2, 3, 4, 1, 3, 7]
    assert found.complete


@pytest.mark.parametrize("copy", [smaller_copy(2), jpeg(2, quality=40), encode(picture(2), "PNG")])
def test_a_near_copy_in_another_split_is_found(tmp_path: Path, copy: bytes) -> None:
    train = [Sample(f"t{seed}", jpeg(seed), 0) for seed in range(6)]
    (group,) = search(tmp_path / "data", {"train": train, "test": [Sample("x", copy, 0)]}).groups
    assert (group.members, group.splits, group.exact, group.pair_exact) == ((2, 6), ("train", "test"), False, False)
    assert group.bits <= MAX_BITS
    assert 0 < group.levels < 8


def test_pictures_of_their_own_are_no_copies(tmp_path: Path) -> None:
    assert search(tmp_path / "data", {"train": [Sample(f"{seed}", jpeg(seed), 0) for seed in range(40)]}).groups == []


def test_pictures_that_share_a_hash_but_not_their_pixels_are_no_copies(tmp_path: Path) -> None:
    dim = encode(picture(1).point(lambda level: level // 2), "PNG")  # the hash does not see brightness
    train = [Sample("bright", encode(picture(1), "PNG"), 0), Sample("dim", dim, 0)]
    assert search(tmp_path / "data", {"train": train}).groups == []


def test_faint_pictures_must_agree_in_what_little_they_show() -> None:
    stripes = np.zeros((16, 16, 3), np.int64)
    stripes[:, ::2] = 1
    strong, faint = 60 + 120 * stripes, 60 + 8 * stripes  # they vary by 60 and by 4 levels: 25 % are 15 and 1
    pixels = np.stack([strong, strong + 7, strong + 9, faint, faint + 2, faint + 3]).astype(np.uint8)
    thumbnails = Thumbnails(np.arange(10, 16), pixels)
    pairs = np.array([[10, 11], [10, 12], [13, 14], [13, 15]])
    assert thumbnails.distances(pairs).tolist() == [7, 9, 2, 3]
    assert thumbnails.alike(pairs).tolist() == [True, False, True, False]


def test_copies_with_other_labels_are_told(tmp_path: Path) -> None:
    train = [Sample("a", jpeg(1), 0), Sample("b", jpeg(1), 1), Sample("c", jpeg(2), 2), Sample("d", smaller_copy(2), 2)]
    differing, alike = search(tmp_path / "data", {"train": train}).groups
    assert (differing.members, differing.labels_differ, alike.members, alike.labels_differ) == ((0, 1), True, (2, 3), False)


def test_labels_of_several_classes_are_compared_as_a_whole(tmp_path: Path) -> None:
    train = [
        Sample("a", jpeg(1), (0, 1)),
        Sample("b", jpeg(1), (0, 1)),
        Sample("c", jpeg(2), (0, 1)),
        Sample("d", jpeg(2), (0,)),
    ]
    differing, alike = search(tmp_path / "data", {"train": train}).groups
    assert (differing.members, alike.members) == ((2, 3), (0, 1))


def test_the_pair_that_is_shown_differs_in_label_and_split_where_any_does(tmp_path: Path) -> None:
    train = [Sample("a", jpeg(1), 0), Sample("b", jpeg(1), 0), Sample("c", jpeg(1), 1)]
    (group,) = search(tmp_path / "data", {"train": train, "test": [Sample("x", jpeg(1), 0)]}).groups
    assert (group.members, group.pair) == ((0, 1, 2, 3), (2, 3))


def test_blank_and_damaged_images_are_no_copies_of_each_other(tmp_path: Path) -> None:
    white = encode(Image.new("RGB", (40, 30), "white"), "PNG")
    samples = [Sample(f"{n}", content, 0) for n, content in enumerate([white, white, b"broken", b"broken", jpeg(1)])]
    assert search(tmp_path / "data", {"train": samples, "test": samples[:4]}).groups == []


def test_the_most_serious_groups_come_first(tmp_path: Path) -> None:
    train = [Sample(f"t{seed}", jpeg(seed), 0) for seed in range(4)]
    train += [Sample("within", jpeg(0), 0), Sample("within, other label", jpeg(1), 1)]
    test = [Sample("across", jpeg(2), 0), Sample("across, other label", jpeg(3), 1)]
    groups = search(tmp_path / "data", {"train": train, "test": test}).groups
    assert [group.members for group in groups] == [(3, 7), (2, 6), (1, 5), (0, 4)]


def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "SAMPLES_A_JOB", 2)
    splits = {
        "train": [Sample(f"t{seed}", jpeg(seed), seed % 3) for seed in range(6)],
        "val": [Sample("v", smaller_copy(1), 0), Sample("w", jpeg(4, 50), 0)],
        "test": [Sample("x", smaller_copy(5), 2), Sample("y", smaller_copy(4), 1)],
    }
    alone, together = (search(tmp_path / f"{workers}", splits, workers) for workers in (1, 3))
    assert len(alone.groups) == 3
    assert alone.groups == together.groups
    assert np.array_equal(alone.same_picture, together.same_picture)


# ---- the search itself ----


def near_by_comparing_all(hashes: list[int]) -> set[tuple[int, int]]:
    pairs = itertools.combinations(range(len(hashes)), 2)
    return {(one, other) for one, other in pairs if (hashes[one] ^ hashes[other]).bit_count() <= MAX_BITS}


def test_all_near_hashes_are_found_and_no_others() -> None:
    random = np.random.default_rng(4)
    hashes = [int(value) for value in random.integers(0, 2**63, 60)]
    for number in range(240):
        value = hashes[number % 60]
        for bit in random.choice(64, size=number % 7, replace=False):
            value ^= 1 << int(bit)
        hashes.append(value)
    places = np.arange(300) * 10
    pairs, complete = find_candidates(np.array(hashes, np.uint64), places)
    assert complete
    expected = near_by_comparing_all(hashes)
    assert len(expected) > 200
    assert {(int(one) // 10, int(other) // 10) for one, other in pairs} == expected
    assert len(pairs) == len(expected)


def test_every_choice_of_four_bits_is_within_reach() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        bits = random.choice(64, size=4, replace=False)
        other = sum(1 << int(bit) for bit in bits)
        pairs, _ = find_candidates(np.array([0, other], np.uint64), np.arange(2))
        assert pairs.tolist() == [[0, 1]]


def test_a_flood_of_equal_hashes_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MAX_NEIGHBOURS", 3)
    pairs, complete = find_candidates(np.full(50, 7, np.uint64), np.arange(50))
    assert len(pairs) == 49 + 48 + 47
    assert not complete
    monkeypatch.setattr(searching, "MAX_PAIRS", 60)
    pairs, complete = find_candidates(np.full(50, 7, np.uint64), np.arange(50))
    assert 60 < len(pairs) <= 110
    assert not complete
    assert len(set(connect(50, pairs).tolist())) == 1  # still one group


def test_more_pairs_than_can_be_kept_are_said_to_be_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MAX_PAIRS", 30)
    bits = np.uint64(1) << np.arange(0, 64, 8, dtype=np.uint64)
    bases = np.arange(1, 21, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # far from each other
    hashes = np.concatenate([bases, bases ^ bits[0] ^ bits[7], bases ^ bits[2] ^ bits[5]])
    pairs, complete = find_candidates(hashes, np.arange(60))
    assert len(pairs) > 30
    assert not complete


def test_a_search_that_was_cut_short_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MAX_CANDIDATES", 2)
    train = [Sample(f"{n}", content, 0) for n, content in enumerate([jpeg(1), jpeg(2), jpeg(1, 50), jpeg(2, 50)])]
    assert not search(tmp_path / "data", {"train": train}).complete


def test_nothing_to_compare_is_no_error() -> None:
    pairs, complete = find_candidates(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    assert (len(pairs), complete) == (0, True)
    assert find_same_bytes(np.zeros((3, 2), np.uint64), np.zeros(0, np.int64)).tolist() == [0, 1, 2]


def test_same_digests_are_found_among_the_usable_only() -> None:
    digests = np.array([[1, 2], [1, 3], [1, 2], [1, 2], [2, 2]], np.uint64)
    assert find_same_bytes(digests, np.array([1, 2, 3, 4])).tolist() == [0, 1, 2, 2, 4]


def test_chains_of_links_are_one_group() -> None:
    links = np.array([[5, 4], [4, 3], [3, 2], [7, 6], [8, 7]])
    assert connect(10, links).tolist() == [0, 1, 2, 2, 2, 2, 6, 6, 6, 9]
    assert connect(3, np.zeros((0, 2), np.int64)).tolist() == [0, 1, 2]
