"""Which image goes to which split, in which order, and into which shard.

A pure function of the images and the seed. Byte-identical images are the unit of the split, so that no image of the test split
was also trained on; hashes of the seed and the content decide, so that adding images moves few others.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config import DatasetConfig
from pipeline.data.listing import Listing
from pipeline.errors import DataError
from pipeline.manifest import Task

SPLITS = ("train", "val", "test")
CLASSES_NAMED = 5
IMAGES_NAMED = 3


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to be: its number among all shards, and which positions of its split it takes."""

    number: int
    name: str
    split: str
    first: int  # in its split
    first_of_all: int
    count: int


@dataclass(frozen=True)
class Layout:
    """How many images of each class every split will hold, before any is found to be undecodable, and what to tell of it."""

    class_counts: dict[str, dict[int, int]]  # split -> first label (-1 for none) -> images
    num_listed: int
    notes: list[str]

    @property
    def num_images(self) -> dict[str, int]:
        """Images of each split that has any."""
        return {split: sum(counts.values()) for split, counts in self.class_counts.items()}

    def shards(self, samples_per_shard: int) -> list[ShardPlan]:
        """The shards of all splits, in order."""
        shards: list[ShardPlan] = []
        before = 0
        for split, num_images in self.num_images.items():
            for number, first in enumerate(range(0, num_images, samples_per_shard)):
                count = min(samples_per_shard, num_images - first)
                shards.append(ShardPlan(len(shards), f"{split}-{number:06d}.tar", split, first, before + first, count))
            before += num_images
        return shards


def plan_layout(listing: Listing, config: DatasetConfig, class_names: list[str], task: Task = "single") -> Layout:
    """Assign every good image of `listing` a split and a position. Raises DataError when a class or train is left empty."""
    _require_images_of_every_class(listing, class_names)
    named = listing.named_splits()
    fractions = {
        "test": 0.0 if named & {"val", "test"} else config.test_fraction,
        "val": 0.0 if "val" in named else config.val_fraction,
    }
    listing.move(_shares(listing, fractions, config.split_seed))
    _return_to_train(listing, config.split_seed)
    counts: dict[str, dict[int, int]] = {split: {} for split in SPLITS}
    for split, label, number in listing.class_counts():
        counts[split][label] = number
    if not counts["train"]:
        raise DataError(
            "no image is left for the train split"
            + (f": the source puts all of them into {' and '.join(sorted(named))}." if named else ".")
        )
    notes = _notes(counts, fractions, class_names, task)
    if named and (number := listing.num_across_splits()):
        notes.append(f"{number:,} images have a byte-identical one in another split that the source names; all are kept")
    for split in SPLITS:
        listing.place(split, lambda content, name: _hash(config.split_seed, "order", content + name))
    return Layout({split: counts[split] for split in SPLITS if counts[split]}, listing.num_images, notes)


def _require_images_of_every_class(listing: Listing, class_names: list[str]) -> None:
    good: dict[int, int] = {}
    for _, label, number in listing.class_counts():
        good[label] = good.get(label, 0) + number
    for label, listed in listing.num_by_label().items():
        if label >= 0 and label not in good:
            named = "; ".join(f"{name} ({reason})" for name, reason in listing.rejected_of(label, IMAGES_NAMED))
            raise DataError(
                f"class `{class_names[label]}`: none of its {listed} images can be used: {named}. "
                "Replace them or remove the class."
            )


def _shares(listing: Listing, fractions: dict[str, float], seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (split, content) of every group that leaves train: of each class its share, as far as whole groups fit into it."""
    totals = listing.num_open_by_label()
    groups = listing.open_groups(lambda content: _hash(seed, "split", content))
    for label, members in itertools.groupby(groups, key=lambda group: group.label):
        room = _room(totals[label], fractions)
        for group in members:
            for split, left in room.items():
                if group.size <= left:
                    room[split] -= group.size
                    yield split, group.content
                    break


def _room(total: int, fractions: dict[str, float]) -> dict[str, int]:
    """Images that each split takes of a class of `total`; a share that would leave train without any is not taken."""
    room: dict[str, int] = {}
    for split, fraction in fractions.items():
        share = _share(total, fraction)
        if sum(room.values()) + share < total:
            room[split] = share
    return room


def _share(number: int, fraction: float) -> int:
    # 25 * 0.28 is 7.000000000000001, which is meant to be 7.
    return math.ceil(round(number * fraction, 9))


def _return_to_train(listing: Listing, seed: int) -> None:
    """Bring a group back to train for each class that has none there: its images equal those of a class that drew lots."""
    for label in listing.labels_without_train():
        content = min(listing.open_contents_of(label), key=lambda content: _hash(seed, "split", content))
        listing.move([("train", content)])


def _notes(counts: dict[str, dict[int, int]], fractions: dict[str, float], class_names: list[str], task: Task) -> list[str]:
    shared = [split for split, fraction in fractions.items() if fraction > 0]
    few = [label for label in counts["train"] if label >= 0 and any(label not in counts[split] for split in shared)]
    # The counts are by an image's first label, so only where each has one do they tell which classes have none.
    untrained = [label for label in range(len(class_names)) if label not in counts["train"]] if task == "single" else []
    notes = []
    for labels, one, several in (
        (few, "class has too few images for every split", "classes have too few images for every split"),
        (untrained, "class has no image in train", "classes have no image in train"),
    ):
        if labels:
            named = ", ".join(class_names[label] for label in labels[:CLASSES_NAMED])
            more = f" and {len(labels) - CLASSES_NAMED} more" if len(labels) > CLASSES_NAMED else ""
            notes.append(f"{len(labels)} {one if len(labels) == 1 else several}: {named}{more}")
    return notes


def _hash(seed: int, purpose: str, thing: bytes) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/".encode() + thing).digest()
