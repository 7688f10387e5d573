"""One pass over every image of a data set: a few facts about each, exact sums over all.

About 60 bytes a sample are kept, so that millions of images fit. The result is the same for any number of processes: facts lie
where their sample has its place, and sums are of whole numbers.
"""

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.console import progress
from pipeline.data.parallel import run_parallel
from pipeline.data.samples import Samples
from pipeline.errors import DataError
from pipeline.preprocess import FORMATS, open_image

# `sha256` is the first half of the digest; `mean` and `spread` (standard deviation of the liveliest channel) are of 0..255.
FACTS_ROW = np.dtype(
    [
        ("sha256", "<u8", (2,)),
        ("phash", "<u8"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("mean", "<f4", (3,)),
        ("spread", "<f4"),
        ("decoded", "?"),
    ]
)
Facts = npt.NDArray[np.void]
LEVELS = np.arange(256, dtype=np.int64)
SAMPLES_A_JOB = 128
FAILURES_KEPT = 1000
HASH_SIDE = 32
HASH_FREQUENCIES = 8


@dataclass(frozen=True)
class Measurement:
    """What the pass found. `histograms[split]` counts the levels of each channel over all pixels, (3, 256)."""

    facts: Facts  # (N,) FACTS_ROW
    histograms: dict[str, npt.NDArray[np.int64]]
    stored: dict[str, Counter[str]]  # format and colour mode as stored
    failures: list[tuple[int, str]]  # (place, reason), the first FAILURES_KEPT by place


@dataclass(frozen=True)
class _Piece:
    """The same for the samples of one job."""

    split: str
    places: slice
    facts: Facts
    histogram: npt.NDArray[np.int64]
    stored: Counter[str]
    failures: list[tuple[int, str]]


def measure(samples: Samples, workers: int | None = None) -> Measurement:
    """Decode every image once, in `workers` processes. Raises DataError for a shard that is cut short."""
    splits = list(samples.indexes)
    measured = Measurement(
        facts=np.zeros(len(samples), FACTS_ROW),
        histograms={split: np.zeros((3, 256), np.int64) for split in splits},
        stored={split: Counter() for split in splits},
        failures=[],
    )
    done = 0
    with progress("inspect", len(samples)) as show:
        for piece in run_parallel(lambda job: _measure_piece(samples, *job), _jobs(samples), workers):
            measured.facts[piece.places] = piece.facts
            measured.histograms[piece.split][:] += piece.histogram
            measured.stored[piece.split].update(piece.stored)
            measured.failures.extend(piece.failures)
            measured.failures.sort()
            del measured.failures[FAILURES_KEPT:]
            done += len(piece.facts)
            show(done)
    return measured


def _jobs(samples: Samples) -> Iterator[tuple[str, int, int]]:
    for split in samples.indexes:
        places = samples.places(split)
        for first in range(places.start, places.stop, SAMPLES_A_JOB):
            yield split, first, min(first + SAMPLES_A_JOB, places.stop)


def _measure_piece(samples: Samples, split: str, first: int, end: int) -> _Piece:
    piece = _Piece(split, slice(first, end), np.zeros(end - first, FACTS_ROW), np.zeros((3, 256), np.int64), Counter(), [])
    for place, encoded in samples.read(range(first, end)):
        facts = piece.facts[place - first]
        facts["sha256"] = np.frombuffer(hashlib.sha256(encoded).digest()[:16], "<u8")
        try:
            piece.stored[describe_stored(encoded)] += 1
            image = open_image(encoded, samples.background)
        except DataError as error:
            piece.failures.append((place, str(error)))
            continue
        histogram = np.array(image.histogram(), np.int64).reshape(3, 256)
        piece.histogram[:] += histogram
        mean, spread = mean_and_spread(histogram)
        facts["width"], facts["height"] = image.size
        facts["mean"], facts["spread"], facts["decoded"] = mean, spread.max(), True
        facts["phash"] = perceptual_hash(image)
    return piece


def describe_stored(encoded: bytes) -> str:
    """Format and colour mode of an image file by its header, such as `JPEG RGB`; `unreadable` where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                return f"{image.format} {image.mode}"
    except Exception:  # Pillow raises almost anything on corrupt bytes; decoding will say why
        return "unreadable"


def mean_and_spread(histogram: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of each channel, of 0..255, from how often each level occurs (3, 256)."""
    count = histogram[0].sum()
    if not count:
        return np.full(3, np.nan), np.full(3, np.nan)
    total, squares = histogram @ LEVELS, histogram @ (LEVELS * LEVELS)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean * mean, 0.0))


_COSINES = np.sqrt(2 / HASH_SIDE) * np.cos(
    np.pi * (2 * np.arange(HASH_SIDE)[None] + 1) * np.arange(HASH_FREQUENCIES)[:, None] / (2 * HASH_SIDE)
)  # (frequencies, HASH_SIDE)
_BIT_VALUES = np.uint64(1) << np.arange(64, dtype=np.uint64)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that survive another encoding and size: which low frequencies of the cosine transform exceed their median.

    Brightness does not count: it changes the mean alone, whose bit is always set. (pHash: Zauner, 2010. On crops of
    photographs its bits change less than those of a difference hash, and skies are not all alike.)
    """
    small = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    waves = _COSINES @ np.asarray(small, np.float64) @ _COSINES.T  # (frequencies, frequencies)
    above = waves.ravel() > np.median(waves)
    return int(_BIT_VALUES[above].sum())
