"""The sha256 of every image, in chunks that an interrupted run or another machine need not do again."""

import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data.encode import Encoder
from pipeline.data.listing import Listing
from pipeline.data.parallel import SharedCounter, counted, run_parallel
from pipeline.data.partial import Partial, Share
from pipeline.data.sources import ImageSource
from pipeline.errors import DataError

# Of a class this small every image is decoded before the split, so that the one for train is good.
TINY_CLASS = 5
NO_HASH = "0" * 64
# Not of this image, but of the machine: it would hit the next one too.
OWN_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True)
class Chunk:
    """Consecutive images by name; `to_check` are those that must be decoded too."""

    number: int
    names: list[str]
    to_check: list[bool]


def read_image(source: ImageSource, name: str) -> bytes:
    """The encoded image. Raises DataError with the reason when it cannot be read."""
    try:
        content = source.read(name)
    except OSError as error:
        if error.errno in OWN_TROUBLE:
            raise
        raise DataError(error.strerror or str(error)) from error
    if not content:
        raise DataError("the file is empty")
    return content


def hash_images(listing: Listing, source: ImageSource, encoder: Encoder, partial: Partial, share: Share, workers: int) -> None:
    """See to it that the hashes of every chunk are in `partial`: those of this job's share first, then any still missing."""
    missing = [number for number in range(listing.num_chunks) if not partial.hashes_path(number).exists()]
    if not missing:
        return
    already = listing.num_images - sum(listing.chunk_size(number) for number in missing)
    with counted("hash", listing.num_images, already) as counter:

        def hash_chunk(chunk: Chunk) -> None:
            partial.write_json(partial.hashes_path(chunk.number), _hash_chunk(chunk, source, encoder, counter))

        chunks = _chunks(listing, _in_turn(missing, share), partial)
        for _ in run_parallel(hash_chunk, chunks, workers, counter.look):
            pass


def _in_turn(numbers: list[int], share: Share) -> list[int]:
    """The numbers of this job, then those of others, in an order of its own so that helpers do not help with the same."""
    own = [number for number in numbers if share.has(number)]
    others = [number for number in numbers if not share.has(number)]
    return own + sorted(others, key=lambda number: hashlib.sha256(f"{share.part}/{number}".encode()).digest())


def _chunks(listing: Listing, numbers: list[int], partial: Partial) -> Iterator[Chunk]:
    num_by_label = listing.num_by_label()
    for number in numbers:
        if not partial.hashes_path(number).exists():  # another job may have done it by now
            images = listing.chunk(number)
            names = [name for name, _ in images]
            yield Chunk(number, names, [num_by_label[label] <= TINY_CLASS for _, label in images])


def _hash_chunk(chunk: Chunk, source: ImageSource, encoder: Encoder, counter: SharedCounter) -> dict[str, object]:
    hashes, sizes, rejected = [], [], {}
    for number, (name, to_check) in enumerate(zip(chunk.names, chunk.to_check, strict=True)):
        try:
            content = read_image(source, name)
            if to_check:
                encoder.encode(content, need_pixels=True)
            hashes.append(hashlib.sha256(content).hexdigest())
            sizes.append(len(content))
        except DataError as error:
            hashes.append(NO_HASH)
            sizes.append(0)
            rejected[number] = (name, str(error))
        counter.add()
    return {"sha256": "".join(hashes), "sizes": sizes, "rejected": rejected}


def read_contents(partial: Partial, num_chunks: int) -> Iterator[tuple[bytes | None, int, str | None]]:
    """Yield (sha256, size in bytes, None) or (None, 0, why it was rejected) of every image by name."""
    for number in range(num_chunks):
        values = json.loads(partial.hashes_path(number).read_bytes())
        rejected, hashes = values["rejected"], bytes.fromhex(values["sha256"])
        for place, size in enumerate(values["sizes"]):
            _, reason = rejected.get(str(place), (None, None))
            yield (None if reason else hashes[32 * place : 32 * place + 32]), size, reason
