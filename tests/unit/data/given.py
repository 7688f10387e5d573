"""A source whose images a test gives one by one."""

import contextlib
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data.listing import Listing
from pipeline.data.sources import ImageSource, ListedImage
from pipeline.manifest import Task


@dataclass(frozen=True)
class Given:
    """An image; `content` may be the error that reading it raises."""

    name: str
    labels: tuple[int, ...] = (0,)
    split: str | None = None
    content: bytes | Exception | None = None

    @property
    def encoded(self) -> bytes | Exception:
        """What reading gives: a picture of its own for every name unless the test gave something else."""
        return picture(self.name) if self.content is None else self.content


class GivenImages(ImageSource):
    """The images that a test gave, in the order in which it gave them."""

    kind = "given"

    def __init__(self, images: Iterable[Given], class_names: list[str] | None = None, task: Task = "single") -> None:
        self.given = {image.name: image for image in images}
        labels = {label for image in self.given.values() for label in image.labels}
        self.class_names = class_names or [f"class-{label}" for label in range(max(labels) + 1)]
        self.task = task

    def images(self) -> Iterator[ListedImage]:
        for image in self.given.values():
            encoded = image.encoded
            size = len(encoded) if isinstance(encoded, bytes) else 0
            yield ListedImage(image.name, image.labels, image.split, (size, 1))

    def read(self, name: str) -> bytes:
        encoded = self.given[name].encoded
        if isinstance(encoded, Exception):
            raise encoded
        return encoded


def picture(text: str, side: int = 8) -> bytes:
    """A JPEG whose pixels depend on `text`."""
    buffer = io.BytesIO()
    colour = tuple(hashlib.sha256(text.encode(errors="replace")).digest()[:3])
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG", comment=text.encode(errors="replace"))
    return buffer.getvalue()


def classes(*counts: int) -> list[Given]:
    """So many images of each class."""
    return [Given(f"{label}/{number:04d}.jpg", (label,)) for label, count in enumerate(counts) for number in range(count)]


@contextlib.contextmanager
def listing_of(images: Iterable[Given], path: Path) -> Iterator[Listing]:
    """A filled listing in which an image's content stands for its own hash; those that cannot be read are rejected."""
    source = GivenImages(images)
    with Listing(path) as listing:
        listing.fill(source.images())
        listing.set_contents(
            (None, 0, str(content)) if isinstance(content, Exception) else (content, len(content), None)
            for name in sorted(source.given, key=lambda name: name.encode(errors="surrogatepass"))
            for content in [source.given[name].content or name.encode(errors="surrogatepass")]
        )
        yield listing
