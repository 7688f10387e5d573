"""Are images of the other splits also in train? Then results flatter, and nothing in the curves says so."""

import hashlib
from dataclasses import dataclass

import numpy as np

from pipeline.data.duplicates import NEAR, Duplicates, find_duplicates
from pipeline.data.figures import BLANK_SPREAD
from pipeline.data.findings import count_leaks
from pipeline.data.inspect_page import draw_small
from pipeline.data.measure import FACTS_ROW, Facts, mean_and_spread, perceptual_hash
from pipeline.data.order import mix
from pipeline.data.samples import Labels, Places, Samples
from pipeline.errors import DataError
from pipeline.preprocess import open_image
from pipeline.recipe.verdict import REMOTE_SHARDS, Subject, Verdict
from pipeline.report.html import Block, Cell, Picture, PictureGroup, Pictures, Table

# Up to so many images all files are compared; of more, a sample of each split with every file of its size.
MAX_HASHED = 20_000
HELD_OUT_COMPARED = 1000
MAX_DECODED = 4000
# Near copies are red above both: bursts of a camera leave some in any honest split, a split by frame leaves many.
NEAR_SHARE, NEAR_IMAGES = 0.01, 2
PAIRS_SHOWN = 8


@dataclass(frozen=True)
class Compared:
    """What was looked at: `hashed` places by their bytes, `decoded` ones of these by their pictures too."""

    hashed: Places
    decoded: Places


def check_leakage(subject: Subject) -> Verdict:
    """Compare the splits: one image with the same bytes in two of them is red, near copies above a stated share.

    Of a large data set HELD_OUT_COMPARED images of each split are compared: their bytes with all files of train of the same
    size, which finds every exact copy of them, their pictures with a sample of train. Blank images, all alike, are left out.
    """
    bound = f"{NEAR_SHARE:.0%} (and {NEAR_IMAGES} images) of near copies"
    expected = f"no image of one split byte-identical in another, at most {bound}"
    if subject.is_streamed or len(subject.manifest.splits) < 2:
        what = (
            "the training shards are streamed, so they cannot be compared" if subject.is_streamed else "there is only one split"
        )
        return Verdict("leakage", "skipped", None, expected, what)
    samples = Samples.open(subject.manifest, subject.config.data)
    compared = choose(samples, subject.config.seed)
    facts = _read_facts(samples, compared)
    usable = compared.hashed[~facts["decoded"][compared.hashed] | (facts["spread"][compared.hashed] >= BLANK_SPREAD)]
    duplicates = find_duplicates(samples, facts, Labels(samples), usable, workers=1)
    leaks = count_leaks(samples, duplicates)
    sizes = {split: _num_compared(samples, split, usable) for split in samples.indexes}
    faults = [
        f"{exact} images of {one} are byte-identical to images of {other}"
        for (one, other), (exact, _) in leaks.items()
        if exact
    ]
    for (one, other), (_, near) in leaks.items():
        if near > max(NEAR_IMAGES, NEAR_SHARE * sizes[one]):
            faults.append(f"{near} of {sizes[one]} images of {one} are near copies of images of {other} ({NEAR})")
    exact, near = (sum(counts[kind] for counts in leaks.values()) for kind in (0, 1))
    rows: list[list[Cell]] = [[one, other, sizes[one], *counts] for (one, other), counts in leaks.items()]
    table = Table(["images of", "copied in", "compared", "same bytes", "near copies"], rows)
    blocks: tuple[Block, ...] = (table, *_pairs(samples, duplicates))
    if faults:
        why = f"{'; '.join(faults)}. Remove them from one of the two: `shardline inspect` shows them all"
        return Verdict("leakage", "red", float(exact + near), expected, why, blocks)
    everything = "all" if len(compared.decoded) == len(samples) else f"{len(compared.hashed):,} of"
    why = f"{everything} {len(samples):,} images compared: {exact} copies across splits, {near} near copies"
    return Verdict("leakage", "green", float(exact + near), expected, why, blocks)


def choose(samples: Samples, seed: int) -> Compared:
    """The places to compare, within MAX_HASHED files and MAX_DECODED pictures."""
    draw = np.random.default_rng(mix(seed, len(samples)))
    reachable = {split: _reachable(samples, split, draw) for split in samples.indexes}
    places = np.concatenate(list(reachable.values()))
    if len(places) <= MAX_HASHED:
        hashed = places
    else:
        held_out = np.concatenate([_some(p, HELD_OUT_COMPARED, draw) for s, p in reachable.items() if s != "train"])
        sizes = samples.sizes()
        same_size = places[np.isin(sizes[places], sizes[held_out])]
        hashed = np.union1d(held_out, _some(same_size, MAX_HASHED, draw))
    train = samples.places("train") if "train" in samples.indexes else slice(0, 0)
    is_train = (hashed >= train.start) & (hashed < train.stop)
    half = MAX_DECODED // 2
    decoded = np.union1d(_some(hashed[~is_train], half, draw), _some(hashed[is_train], half, draw))
    return Compared(np.sort(hashed), decoded)


def _reachable(samples: Samples, split: str, draw: np.random.Generator) -> Places:
    """The places of a split; of a remote one those of a few shards."""
    rows, first = samples.indexes[split], samples.first[split]
    num_shards = len(samples.manifest.splits[split].shards)
    if samples.fetchers[split] is None or num_shards <= REMOTE_SHARDS:
        return np.arange(first, first + len(rows))
    return np.flatnonzero(np.isin(rows["shard"], draw.choice(num_shards, REMOTE_SHARDS, replace=False))) + first


def _some(places: Places, number: int, draw: np.random.Generator) -> Places:
    return np.sort(draw.choice(places, min(number, len(places)), replace=False))


def _read_facts(samples: Samples, compared: Compared) -> Facts:
    facts = np.zeros(len(samples), FACTS_ROW)
    to_decode = set(compared.decoded.tolist())
    for place, encoded in samples.read(compared.hashed.tolist()):
        fact = facts[place]
        fact["sha256"] = np.frombuffer(hashlib.sha256(encoded).digest()[:16], "<u8")
        # Hashes of pictures that were not looked at must not resemble each other.
        fact["phash"] = fact["sha256"][0]
        if place not in to_decode:
            continue
        try:
            image = open_image(encoded, samples.background)
        except DataError:
            continue
        _, spread = mean_and_spread(np.array(image.histogram(), np.int64).reshape(3, 256))
        fact["phash"], fact["spread"], fact["decoded"] = perceptual_hash(image), spread.max(), True
    return facts


def _num_compared(samples: Samples, split: str, usable: Places) -> int:
    places = samples.places(split)
    return int(((usable >= places.start) & (usable < places.stop)).sum())


def _pairs(samples: Samples, duplicates: Duplicates) -> list[Pictures]:
    pairs = [group.pair for group in duplicates.groups if len(group.splits) > 1][:PAIRS_SHOWN]
    if not pairs:
        return []
    places = sorted({place for pair in pairs for place in pair})
    content = {place: draw_small(encoded, samples.background) for place, encoded in samples.read(places)}
    keys = samples.keys(places)
    groups = [
        PictureGroup([Picture(content[place], [samples.split_of(place), keys[place]]) for place in pair]) for pair in pairs
    ]
    return [Pictures(groups, beside=True)]
