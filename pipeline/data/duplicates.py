"""Copies among the images of a data set: the same bytes, or nearly the same picture.

NEAR says what a near copy is. They are found in two steps: perceptual hashes within MAX_BITS of each other make candidates,
without comparing all with all; small thumbnails of the candidates, decoded a second time, then decide. Similar handwriting may
share a hash, but only a copy shares its pixels. Blank images are left out: they are all alike and have a heading of their own.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.console import progress
from pipeline.data.measure import Facts
from pipeline.data.parallel import run_parallel
from pipeline.data.samples import Labels, Places, Samples
from pipeline.preprocess import open_image

MAX_BITS = 4  # of 64
MAX_LEVELS = 8.0  # root mean square difference of the thumbnails, of 0..255
# Skies differ by less than that: the difference must also be small beside what varies in the picture.
MAX_SHARE_OF_CONTRAST = 0.25
ALWAYS_ALIKE_LEVELS = 2.0
NUM_BANDS = 6  # four differing bits leave two of six bands untouched
THUMBNAIL_SIDE = 16
NEAR = (
    f"perceptual hashes within {MAX_BITS} of 64 bits, thumbnails within {MAX_LEVELS:g} of 255 levels and "
    f"{MAX_SHARE_OF_CONTRAST:.0%} of their contrast"
)
# Bounds of time and memory for a set in which everything resembles everything (frames of a film).
MAX_NEIGHBOURS = 256
MAX_PAIRS = 2_000_000
MAX_CANDIDATES = 200_000
SAMPLES_A_JOB = 128
PAIRS_AT_A_TIME = 10_000
PAIRS_WEIGHED = 2000


@dataclass(frozen=True)
class CopyGroup:
    """Images that are copies or near copies of each other, as places in ascending order.

        `pair` are the two members that say most: of different splits and labels where there are such. `pair_exact`, `bits` and
    `levels` tell how far those two are apart. Near copies are linked from one to the next, so the ends may be further apart.
    """

    members: tuple[int, ...]
    splits: tuple[str, ...]
    exact: bool
    labels_differ: bool
    pair: tuple[int, int]
    pair_exact: bool
    bits: int
    levels: float


@dataclass(frozen=True)
class Duplicates:
    """All groups of copies, the most serious first. `complete` is False where a bound cut the search short."""

    groups: list[CopyGroup]
    same_bytes: Places  # (N,) place of the first image with the same bytes
    same_picture: Places  # (N,) place of the first image of the same group
    complete: bool


def find_duplicates(samples: Samples, facts: Facts, labels: Labels, usable: Places, workers: int | None = None) -> Duplicates:
    """Group the copies among the images at the places `usable` (ascending)."""
    same_bytes = find_same_bytes(facts["sha256"], usable)
    distinct = usable[same_bytes[usable] == usable]
    pairs, complete = find_candidates(facts["phash"][distinct], distinct)
    candidates = np.unique(pairs)
    if len(candidates) > MAX_CANDIDATES:
        candidates, complete = candidates[:MAX_CANDIDATES], False
        pairs = pairs[(pairs <= candidates[-1]).all(axis=1)]
    thumbnails = read_thumbnails(samples, candidates, workers)
    pairs = pairs[thumbnails.alike(pairs)]
    same_picture = connect(len(facts), np.concatenate([np.stack([same_bytes[usable], usable], axis=1), pairs]))
    described = _Describer(samples, facts, labels.signatures(), same_bytes, thumbnails)
    groups = [described.group(members) for members in _groups(same_picture, usable)]
    groups.sort(key=lambda group: (_seriousness(group), group.members))
    return Duplicates(groups, same_bytes, same_picture, complete)


def find_same_bytes(digests: npt.NDArray[np.uint64], usable: Places) -> Places:
    """For each of N digests (N, 2) the first place among `usable` with the same one; any other place is its own."""
    first = np.arange(len(digests))
    order = usable[np.lexsort((usable, digests[usable, 1], digests[usable, 0]))]
    starts = np.ones(len(order), bool)
    starts[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def find_candidates(hashes: npt.NDArray[np.uint64], places: Places) -> tuple[Places, bool]:
    """Pairs of places (P, 2), ascending, whose hashes differ by at most MAX_BITS, and whether these are all there are.

    Sorting by each choice of two of six bands brings every such pair next to each other: 15 sorts instead of N * N distances.
    """
    bands = [np.uint64(((1 << width) - 1) << low) for low, width in _band_bits()]
    found = np.zeros((0,), np.int64)
    complete = True
    for one, two in itertools.combinations(bands, 2):
        keys = hashes & (one | two)
        order = np.lexsort((hashes, keys))
        pairs, all_compared = _neighbours(keys[order], hashes[order])
        complete &= all_compared
        low, high = np.sort(order[pairs], axis=1).T
        found = np.unique(np.concatenate([found, low * len(hashes) + high]))
        if len(found) > MAX_PAIRS:
            complete = False
            break
    pairs = np.stack([found // max(1, len(hashes)), found % max(1, len(hashes))], axis=1)
    return places[pairs], complete


def _band_bits() -> Iterator[tuple[int, int]]:
    edges = [round(64 * number / NUM_BANDS) for number in range(NUM_BANDS + 1)]
    for low, high in itertools.pairwise(edges):
        yield low, high - low


def _neighbours(keys: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64]) -> tuple[Places, bool]:
    """Pairs (P, 2) of equal keys in a sorted list whose hashes are near, at most MAX_NEIGHBOURS apart."""
    pairs, left = [np.zeros((0, 2), np.int64)], np.arange(len(keys) - 1)
    num_pairs = 0
    for distance in range(1, MAX_NEIGHBOURS + 1):
        left = left[left + distance < len(keys)]
        # Equal keys stand together: whoever has no partner at this distance has none further on.
        left = left[keys[left] == keys[left + distance]]
        if not len(left) or num_pairs > MAX_PAIRS:
            break
        near = left[np.bitwise_count(hashes[left] ^ hashes[left + distance]) <= MAX_BITS]
        pairs.append(np.stack([near, near + distance], axis=1))
        num_pairs += len(near)
    return np.concatenate(pairs), not len(left)


@dataclass(frozen=True)
class Thumbnails:
    """Tiny upright pictures of the images at some places, (n, side, side, 3)."""

    places: Places  # (n,) ascending
    pixels: npt.NDArray[np.uint8]

    def alike(self, pairs: Places) -> npt.NDArray[np.bool_]:
        """Whether each pair of places (P, 2) shows the same picture, (P,)."""
        pieces = range(0, len(self.pixels), PAIRS_AT_A_TIME)
        deviations = [self.pixels[first : first + PAIRS_AT_A_TIME].std(axis=(1, 2)).max(axis=1) for first in pieces]
        contrast = np.concatenate([*deviations, np.zeros(0)])  # (n,)
        smaller = contrast[np.searchsorted(self.places, pairs)].min(axis=1)
        limits = np.clip(MAX_SHARE_OF_CONTRAST * smaller, ALWAYS_ALIKE_LEVELS, MAX_LEVELS)
        return np.asarray(self.distances(pairs) <= limits)

    def distances(self, pairs: Places) -> npt.NDArray[np.float64]:
        """Root mean square difference of each pair of places (P, 2), (P,), in levels of 0..255."""
        rows = np.searchsorted(self.places, pairs)
        distances = np.zeros(len(pairs))
        for first in range(0, len(pairs), PAIRS_AT_A_TIME):
            part = rows[first : first + PAIRS_AT_A_TIME]
            difference = self.pixels[part[:, 0]].astype(np.int64) - self.pixels[part[:, 1]]
            distances[first : first + len(part)] = np.sqrt((difference * difference).mean(axis=(1, 2, 3)))
        return distances


def read_thumbnails(samples: Samples, places: Places, workers: int | None = None) -> Thumbnails:
    """Decode the images at `places` (ascending) once more."""
    pixels = np.zeros((len(places), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)
    jobs = range(0, len(places), SAMPLES_A_JOB)
    if not len(places):
        return Thumbnails(places, pixels)
    with progress("compare", len(places)) as show:
        done = 0
        for first, piece in run_parallel(lambda first: (first, _shrink(samples, places, first)), jobs, workers):
            pixels[first : first + len(piece)] = piece
            done += len(piece)
            show(done)
    return Thumbnails(places, pixels)


def _shrink(samples: Samples, places: Places, first: int) -> npt.NDArray[np.uint8]:
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    wanted = [int(place) for place in places[first : first + SAMPLES_A_JOB]]
    images = (open_image(encoded, samples.background) for _, encoded in samples.read(wanted))
    return np.stack([np.asarray(image.resize(side, Image.Resampling.BILINEAR, reducing_gap=2.0)) for image in images])


def connect(number: int, links: Places) -> Places:
    """For each of `number` nodes the smallest node that links (L, 2) connect it with."""
    first = np.arange(number)
    one, other = links[:, 0], links[:, 1]
    while True:
        before = first.copy()
        smaller = np.minimum(first[one], first[other])
        np.minimum.at(first, first[one], smaller)
        np.minimum.at(first, first[other], smaller)
        first = first[first]
        if np.array_equal(before, first):
            return first


def _groups(same_picture: Places, usable: Places) -> Iterator[Places]:
    """The places of each group of two or more."""
    order = usable[np.argsort(same_picture[usable], kind="stable")]
    edges = np.flatnonzero(np.diff(same_picture[order], prepend=-1, append=-1))
    for start, end in itertools.pairwise(edges):
        if end - start > 1:
            yield order[start:end]


@dataclass(frozen=True)
class _Describer:
    samples: Samples
    facts: Facts
    signatures: npt.NDArray[np.int64]  # (N,) equal where labels are
    same_bytes: Places
    thumbnails: Thumbnails

    def group(self, members: Places) -> CopyGroup:
        splits = self.samples.split_numbers(members)
        originals = self.same_bytes[members]
        one, other = self._most_telling_pair(splits, self.signatures[members], originals)
        exact_pair = originals[one] == originals[other]
        hashes = self.facts["phash"][members[[one, other]]]
        levels = 0.0 if exact_pair else float(self.thumbnails.distances(originals[None, [one, other]])[0])
        names = list(self.samples.indexes)
        return CopyGroup(
            members=tuple(int(place) for place in members),
            splits=tuple(names[number] for number in np.unique(splits)),
            exact=len(np.unique(originals)) == 1,
            labels_differ=len(np.unique(self.signatures[members])) > 1,
            pair=(int(members[one]), int(members[other])),
            pair_exact=bool(exact_pair),
            bits=0 if exact_pair else int(np.bitwise_count(hashes[0] ^ hashes[1])),
            levels=round(levels, 2),
        )

    def _most_telling_pair(self, splits: Places, signatures: Places, originals: Places) -> tuple[int, int]:
        """Two members, by their place in the group: of different labels, else of different splits, else of the same bytes."""
        best, best_pair = -1, (0, 1)
        for one, other in itertools.islice(itertools.combinations(range(len(splits)), 2), PAIRS_WEIGHED):
            says = 4 * int(signatures[one] != signatures[other]) + 2 * int(splits[one] != splits[other])
            says += int(originals[one] == originals[other])
            if says > best:
                best, best_pair = says, (one, other)
        return best_pair


def _seriousness(group: CopyGroup) -> int:
    across = len(group.splits) > 1
    return 0 if across and group.labels_differ else 1 if across else 2 if group.labels_differ else 3
