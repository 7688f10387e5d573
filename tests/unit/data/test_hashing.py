import errno
import hashlib
from pathlib import Path

import pytest

from pipeline.config import DatasetConfig
from pipeline.data import hashing
from pipeline.data import listing as listing_module
from pipeline.data.encode import Encoder
from pipeline.data.hashing import hash_images, read_contents, read_image
from pipeline.data.listing import Listing
from pipeline.data.partial import Partial, Share
from pipeline.errors import DataError
from tests.unit.data.given import Given, GivenImages, classes

Content = tuple[bytes | None, int, str | None]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_module, "CHUNK_IMAGES", 4)


class Counting(GivenImages):
    """Notes what is read."""

    def __init__(self, images: list[Given]) -> None:
        super().__init__(images)
        self.read_names: list[str] = []

    def read(self, name: str) -> bytes:
        self.read_names.append(name)
        return super().read(name)


def hash_all(source: GivenImages, folder: Path, share: Share | None = None, workers: int = 1) -> list[Content]:
    share = share or Share()
    partial = Partial(folder, share.owner)
    with Listing(folder / f"images{share.owner}.sqlite") as listing:
        listing.fill(source.images())
        hash_images(listing, source, Encoder(DatasetConfig()), partial, share, workers)
        return list(read_contents(partial, listing.num_chunks))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_image_has_its_hash_and_size_by_name(workers: int, tmp_path: Path) -> None:
    images = classes(9, 8)
    expected = [
        (hashlib.sha256(image.encoded).digest(), len(image.encoded), None)
        for image in images
        if isinstance(image.encoded, bytes)
    ]
    assert hash_all(GivenImages(reversed(images)), tmp_path, workers=workers) == expected


def test_a_chunk_that_is_there_is_not_hashed_again(tmp_path: Path) -> None:
    source = Counting(classes(17))
    before = hash_all(source, tmp_path)
    (tmp_path / ".partial/hashes/000002.json").unlink()
    source.read_names.clear()
    assert hash_all(source, tmp_path) == before
    assert source.read_names == [f"0/{number:04d}.jpg" for number in range(8, 12)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a.jpg"), "Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (DataError("the archive is cut short"), "the archive is cut short"),
        (b"", "the file is empty"),
    ],
)
def test_an_image_that_cannot_be_read_is_rejected_with_its_reason(
    content: bytes | Exception, reason: str, tmp_path: Path
) -> None:
    found = hash_all(GivenImages([*classes(6), Given("1.jpg", (0,), None, content)]), tmp_path)
    assert found[-1] == (None, 0, reason)
    assert [size > 0 for _, size, _ in found[:-1]] == [True] * 6


def test_trouble_of_the_machine_is_not_held_against_the_image() -> None:
    source = GivenImages([Given("a.jpg", (0,), None, OSError(errno.EMFILE, "Too many open files"))])
    with pytest.raises(OSError, match="Too many open files"):
        read_image(source, "a.jpg")


def test_images_of_a_tiny_class_are_decoded_before_the_split(tmp_path: Path) -> None:
    bad = [Given(f"{label}/bad.jpg", (label,), None, b"\xff\xd8garbage") for label in (0, 1)]
    found = hash_all(GivenImages([*classes(hashing.TINY_CLASS, hashing.TINY_CLASS - 1), *bad]), tmp_path)
    reasons = [reason for _, _, reason in found]
    assert reasons[hashing.TINY_CLASS] is None  # of a larger class: the writing will tell
    assert reasons[-1] is not None
    assert "cannot identify" in reasons[-1]
    assert sum(reason is None for reason in reasons) == len(found) - 1


def test_a_part_does_its_own_chunks_first_and_then_those_that_nobody_did(tmp_path: Path) -> None:
    source = Counting(classes(26))  # chunks 0 to 6
    hash_all(source, tmp_path, Share(2, 3))
    chunks = list(dict.fromkeys(int(name[2:6]) // 4 for name in source.read_names))
    assert chunks[:2] == [1, 4]
    assert sorted(chunks) == [0, 1, 2, 3, 4, 5, 6]


def test_parts_help_with_other_chunks_in_different_orders() -> None:
    orders = {tuple(hashing._in_turn(list(range(40)), Share(part, 20))[2:8]) for part in range(1, 21)}
    assert len(orders) == 20


def test_a_chunk_that_another_part_finishes_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    class Helped(Counting):
        def read(self, name: str) -> bytes:
            if not self.read_names:  # while the first chunk is hashed, somebody does all others
                hash_all(GivenImages(self.given.values()), tmp_path, Share(1, 2))
            return super().read(name)

    source = Helped(classes(26))
    hash_all(source, tmp_path, Share(2, 2))
    assert len(source.read_names) == 8  # two chunks were under way
