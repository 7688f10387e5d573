import itertools
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.config import DatasetConfig
from pipeline.data.plan import Layout, ShardPlan, plan_layout
from pipeline.errors import DataError
from tests.unit.conftest import TINY_SPLIT
from tests.unit.data.given import Given, classes, listing_of

NAMES = [f"class-{number}" for number in range(20)]


class Planned:
    """A layout and the names in each split, in order."""

    def __init__(self, images: Iterable[Given], path: Path, config: DatasetConfig = TINY_SPLIT) -> None:
        images = list(images)
        with listing_of(images, path / "images.sqlite") as listing:
            self.layout: Layout = plan_layout(
                listing, config, NAMES[: 1 + max(label for image in images for label in image.labels)]
            )
            self.in_order: dict[str, list[str]] = {}
            for shard in self.layout.shards(config.samples_per_shard):
                placed = listing.placed(shard.first_of_all, shard.count)
                assert len(placed) == shard.count
                self.in_order.setdefault(shard.split, []).extend(image.name for image in placed)

    @property
    def names(self) -> dict[str, set[str]]:
        return {split: set(names) for split, names in self.in_order.items()}

    def split_of(self, name: str) -> str:
        (split,) = [split for split, names in self.in_order.items() if name in names]
        return split


# ---- shares ----


@pytest.mark.parametrize(
    ("fraction", "count", "expected"),
    [(0.2, 20, 4), (0.2, 21, 5), (0.15, 20, 3), (0.1, 30, 3), (0.01, 50, 1), (0.28, 25, 7), (0.07, 100, 7)],
)
def test_each_class_gives_the_fraction_rounded_up_to_the_test_split(
    fraction: float, count: int, expected: int, tmp_path: Path
) -> None:
    # In binary 0.28 * 25 is 7.000000000000001 and 0.07 * 100 too: what was asked for is 7.
    planned = Planned(classes(count, count), tmp_path, DatasetConfig(val_fraction=0.0, test_fraction=fraction))
    assert planned.layout.class_counts["test"] == {0: expected, 1: expected}
    assert planned.layout.class_counts["train"] == {0: count - expected, 1: count - expected}


def test_the_splits_share_no_image_and_lose_none(tmp_path: Path) -> None:
    images = classes(37, 11, 5)
    planned = Planned(images, tmp_path)
    assert sum(map(len, planned.in_order.values())) == 53
    assert set.union(*planned.names.values()) == {image.name for image in images}


def test_a_fraction_of_nothing_makes_no_split(tmp_path: Path) -> None:
    planned = Planned(classes(4, 4), tmp_path, DatasetConfig(val_fraction=0.25, test_fraction=0.0))
    assert planned.layout.num_images == {"train": 6, "val": 2}


@pytest.mark.parametrize("number", range(21, 27))  # the new image's content decides where it comes to lie
def test_a_new_image_moves_at_most_one_other_across_each_border(number: int, tmp_path: Path) -> None:
    before = Planned(classes(21, 21), tmp_path).names  # 5, 5 and 11 of each class, of 22 images also 5, 5 and 12
    after = Planned([*classes(21, 21), Given(f"1/{number:04d}.jpg", (1,))], tmp_path).names
    for split, names in before.items():
        assert len(names - after[split]) <= 1
        assert {name for name in names if name.startswith("0/")} <= after[split]  # the other class is not touched


def test_an_image_stays_in_its_split_when_it_is_renamed(tmp_path: Path) -> None:
    images = [
        Given(f"{label}/{number}.jpg", (label,), None, b"%d-%d" % (label, number)) for label in (0, 1) for number in range(9)
    ]
    renamed = [Given(f"new/{image.name}", image.labels, None, image.content) for image in images]
    before, after = Planned(images, tmp_path).names, Planned(renamed, tmp_path).names
    assert after == {split: {f"new/{name}" for name in names} for split, names in before.items()}


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    images = classes(30, 30)
    other = Planned(images, tmp_path, DatasetConfig(split_seed=1))
    assert other.names["test"] != Planned(images, tmp_path, DatasetConfig(split_seed=0)).names["test"]
    assert other.layout.num_images == {"train": 36, "val": 12, "test": 12}


# ---- byte-identical images ----


def with_duplicates(seed: int, labels: int = 4) -> list[Given]:
    """200 images of 60 contents, some of them under several labels."""
    pick = random.Random(seed)
    return [
        Given(f"{number:03d}.jpg", (pick.randrange(labels),), None, b"content-%d" % pick.randrange(60)) for number in range(200)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_byte_identical_images_never_straddle_splits_not_even_under_other_labels(seed: int, tmp_path: Path) -> None:
    images = with_duplicates(seed)
    planned = Planned(images, tmp_path)
    splits_of_content: dict[object, set[str]] = {}
    for image in images:
        splits_of_content.setdefault(image.content, set()).add(planned.split_of(image.name))
    assert [splits for splits in splits_of_content.values() if len(splits) > 1] == []
    assert planned.layout.num_images.keys() == {"train", "val", "test"}


@pytest.mark.parametrize("seed", range(5))
def test_whole_groups_of_duplicates_never_overfill_a_split(seed: int, tmp_path: Path) -> None:
    images = with_duplicates(seed, labels=1)
    counts = Planned(images, tmp_path, DatasetConfig(val_fraction=0.2, test_fraction=0.1)).layout.num_images
    assert counts["val"] <= 40
    assert counts["test"] <= 20
    # The largest group has about 9 images, and smaller ones follow it.
    assert counts["val"] >= 37
    assert counts["test"] >= 17


def test_many_copies_of_one_image_stay_in_train(tmp_path: Path) -> None:
    images = [*classes(20), *(Given(f"copy-{number}.jpg", (0,), None, b"blank") for number in range(20))]
    planned = Planned(images, tmp_path)
    assert {planned.split_of(f"copy-{number}.jpg") for number in range(20)} == {"train"}
    assert planned.layout.num_images == {"train": 24, "val": 8, "test": 8}


@pytest.mark.parametrize("seed", range(12))
def test_a_class_of_nothing_but_copies_of_another_still_has_an_image_in_train(seed: int, tmp_path: Path) -> None:
    images = [*classes(10), Given("z.jpg", (1,), None, b"0/0003.jpg")]  # the content of 0/0003.jpg, whose class draws lots
    planned = Planned(images, tmp_path, DatasetConfig(split_seed=seed))
    assert planned.split_of("z.jpg") == planned.split_of("0/0003.jpg") == "train"


# ---- tiny classes ----


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"train": 1}),
        (2, {"train": 1, "test": 1}),
        (3, {"train": 1, "test": 1, "val": 1}),
        (4, {"train": 2, "test": 1, "val": 1}),
    ],
)
def test_a_tiny_class_is_in_train_and_as_far_as_it_reaches_in_the_others(
    count: int, expected: dict[str, int], tmp_path: Path
) -> None:
    counts = Planned(classes(10, count), tmp_path).layout.class_counts
    assert {split: by_label[1] for split, by_label in counts.items() if 1 in by_label} == expected


def test_a_share_that_would_take_all_of_a_class_is_not_taken(tmp_path: Path) -> None:
    counts = Planned(classes(10, 3), tmp_path, DatasetConfig(val_fraction=0.4, test_fraction=0.4)).layout.class_counts
    assert {split: by_label.get(1, 0) for split, by_label in counts.items()} == {"train": 1, "test": 2, "val": 0}


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        ((9, 9), []),
        ((9, 2), ["1 class has too few images for every split: class-1"]),
        ((9, 1, 2), ["2 classes have too few images for every split: class-1, class-2"]),
        (
            (9, *[1] * 7),
            ["7 classes have too few images for every split: class-1, class-2, class-3, class-4, class-5 and 2 more"],
        ),
    ],
)
def test_classes_that_are_not_in_every_split_are_named_in_one_line(
    counts: tuple[int, ...], note: list[str], tmp_path: Path
) -> None:
    assert Planned(classes(*counts), tmp_path).layout.notes == note


# ---- splits that the source names ----


def named(*splits: str | None, each: int = 10) -> list[Given]:
    return [
        Given(f"{split}/{label}/{number}.jpg", (label,), split)
        for split in splits
        for label in (0, 1)
        for number in range(each)
    ]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "val", "test"), {"train": 20, "val": 20, "test": 20}),
        (("train", "val"), {"train": 20, "val": 20}),
        (("train", "test"), {"train": 16, "val": 4, "test": 20}),
        (("train",), {"train": 12, "val": 4, "test": 4}),
        ((None, "test"), {"train": 16, "val": 4, "test": 20}),
    ],
)
def test_named_splits_are_kept_and_missing_ones_come_out_of_train(
    splits: tuple[str | None, ...], expected: dict[str, int], tmp_path: Path
) -> None:
    planned = Planned(named(*splits), tmp_path)
    assert planned.layout.num_images == expected
    for split in ("val", "test"):
        if split in splits:
            assert {name.split("/")[0] for name in planned.in_order[split]} == {split}


def test_without_an_image_for_train_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image is left for the train split: the source puts all of them into test and val"):
        Planned(named("val", "test"), tmp_path)


def test_duplicates_across_splits_that_the_source_names_are_kept_and_counted(tmp_path: Path) -> None:
    images = [*named("train", "test"), Given("train/copy.jpg", (0,), "train", b"test/1/3.jpg")]
    planned = Planned(images, tmp_path)
    assert sum(planned.layout.num_images.values()) == 41
    assert planned.layout.notes == ["2 images have a byte-identical one in another split that the source names; all are kept"]


# ---- several labels ----


def test_images_of_several_labels_are_shared_out_by_their_first_and_those_of_none_apart(tmp_path: Path) -> None:
    images = [Given(f"{number:03d}.jpg", ((), (0, 1), (1,))[number % 3]) for number in range(60)]
    counts = Planned(images, tmp_path).layout.class_counts
    assert counts == {split: dict.fromkeys((-1, 0, 1), number) for split, number in (("train", 12), ("val", 4), ("test", 4))}


# ---- order and shards ----


def test_the_order_inside_the_shards_mixes_the_classes(tmp_path: Path) -> None:
    labels = [name[0] for name in Planned(classes(50, 50), tmp_path).in_order["train"]]
    changes = sum(first != second for first, second in itertools.pairwise(labels))
    # 60 images of two classes in random order: 30 changes on average, with a standard deviation of 3.8; sorted, 1.
    assert changes == pytest.approx(30, abs=4 * 3.8)


def test_the_order_of_the_list_changes_nothing(tmp_path: Path) -> None:
    images = with_duplicates(3)
    shuffled = random.Random(1).sample(images, len(images))
    assert Planned(shuffled, tmp_path).in_order == Planned(images, tmp_path).in_order


def test_shards_cut_each_split_and_are_numbered_throughout() -> None:
    layout = Layout({"train": {0: 3, 1: 2}, "test": {0: 3}}, num_listed=8, notes=[])
    assert layout.shards(samples_per_shard=2) == [
        ShardPlan(0, "train-000000.tar", "train", 0, 0, 2),
        ShardPlan(1, "train-000001.tar", "train", 2, 2, 2),
        ShardPlan(2, "train-000002.tar", "train", 4, 4, 1),
        ShardPlan(3, "test-000000.tar", "test", 0, 5, 2),
        ShardPlan(4, "test-000001.tar", "test", 2, 7, 1),
    ]


# ---- rejected before the split ----


def test_rejected_images_take_no_place(tmp_path: Path) -> None:
    images = [*classes(10, 10), Given("1/bad.jpg", (1,), None, OSError("gone"))]
    planned = Planned(images, tmp_path)
    assert planned.layout.num_listed == 21
    assert Counter(planned.layout.num_images) == {"train": 12, "val": 4, "test": 4}


def test_a_class_of_which_every_image_was_rejected_is_named(tmp_path: Path) -> None:
    images = [*classes(10), *(Given(f"1/{number}.jpg", (1,), None, OSError("gone")) for number in range(4))]
    with pytest.raises(
        DataError, match=r"class `class-1`: none of its 4 images can be used: 1/0\.jpg \(gone\); 1/1\.jpg \(gone\); 1/2"
    ):
        Planned(images, tmp_path)
