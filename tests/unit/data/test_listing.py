import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data import listing as listing_module
from pipeline.data.listing import Fingerprint, Listing
from pipeline.data.sources import ListedImage
from pipeline.errors import DataError
from tests.unit.data.given import Given, GivenImages, classes, listing_of

ODD_NAMES = ["a b/ü.jpg", "caf\udce9.png", "\ud800/1.jpg", "line\nbreak.jpg", "z"]


@pytest.fixture
def listing(tmp_path: Path) -> Iterator[Listing]:
    with Listing(tmp_path / "made" / "images.sqlite") as made:
        yield made


def fingerprint_of(images: list[ListedImage]) -> str:
    fingerprint = Fingerprint()
    for image in images:
        fingerprint.add(image)
    return fingerprint.hexdigest()


def test_the_order_of_the_list_does_not_change_the_fingerprint() -> None:
    images = list(GivenImages(classes(20, 5)).images())
    shuffled = random.Random(1).sample(images, len(images))
    assert fingerprint_of(shuffled) == fingerprint_of(images)


@pytest.mark.parametrize(
    "change",
    [{"name": "b"}, {"labels": (1,)}, {"labels": (0, 1)}, {"split": "val"}, {"facts": (7, 1)}, {"facts": (8, 2)}],
    ids=str,
)
def test_whatever_changes_of_an_image_changes_the_fingerprint(change: dict[str, object]) -> None:
    image = ListedImage("a", (0,), None, (8, 1))
    other = ListedImage("other", (0,), None, (8, 1))
    assert fingerprint_of([dataclasses.replace(image, **change), other]) != fingerprint_of([image, other])  # type: ignore[arg-type]
    assert fingerprint_of([image]) != fingerprint_of([image, other])


def test_names_come_back_in_their_own_order_however_odd_they_are(listing: Listing) -> None:
    listing.fill(ListedImage(name, (3,), None, (1, 1)) for name in ODD_NAMES)
    assert (listing.num_images, listing.num_chunks) == (5, 1)
    assert listing.chunk(0) == [(name, 3) for name in sorted(ODD_NAMES, key=lambda name: name.encode(errors="surrogatepass"))]


def test_chunks_cut_the_list_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_module, "CHUNK_IMAGES", 4)
    images = list(GivenImages(classes(6, 3)).images())
    with Listing(tmp_path / "images.sqlite") as listing:
        listing.fill(reversed(images))
        sizes = [listing.chunk_size(number) for number in range(listing.num_chunks)]
        chunks = [listing.chunk(number) for number in range(listing.num_chunks)]
    assert sizes == [len(chunk) for chunk in chunks] == [4, 4, 1]
    assert [name for chunk in chunks for name, _ in chunk] == [image.name for image in images]


def test_byte_identical_images_belong_to_the_class_of_the_first_by_name(tmp_path: Path) -> None:
    images = [*classes(3, 3), Given("9.jpg", (0,), None, b"same"), Given("10.jpg", (1,), None, b"same")]
    with listing_of(images, tmp_path / "images.sqlite") as listing:
        assert listing.num_open_by_label() == {0: 3, 1: 5}
        assert [(group.label, group.size) for group in listing.open_groups(lambda content: content) if group.size > 1] == [
            (1, 2)
        ]


def test_a_name_that_comes_twice_is_refused(listing: Listing) -> None:
    image = ListedImage("a", (0,), None, (8, 1))
    with pytest.raises(DataError, match="lists an image twice under one name"):
        listing.fill([image, image])


def test_the_table_is_gone_when_it_is_closed(tmp_path: Path) -> None:
    with listing_of(classes(3), tmp_path / "images.sqlite") as listing:
        assert listing.path.exists()
    assert list(tmp_path.iterdir()) == []
