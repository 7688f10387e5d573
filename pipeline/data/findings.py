"""What deserves a person's attention in a data set: short sentences, each with the threshold that it crossed.

A finding is no verdict. Dark images may be the point of a data set; but nobody should train before having looked.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.duplicates import NEAR, Duplicates
from pipeline.data.figures import DESCRIPTIONS, Figures, SplitFigures, brightness_of
from pipeline.data.measure import Facts
from pipeline.data.samples import Samples
from pipeline.manifest import DatasetManifest
from pipeline.report.html import Finding, Level

MAX_IMBALANCE = 10.0
FEW_SAMPLES = 10
NAMED = 5
NAME_LENGTH = 32
# A split differs visibly from train when it does by this much and by more than chance explains (so many standard errors).
BRIGHTNESS_SHIFT = 0.25  # of the standard deviation between images of train
CLASS_SHIFT = 0.1  # share of the samples that would have to change class
SIZE_RATIO = 1.25  # of the median numbers of pixels
STANDARD_ERRORS = 4.0
STATED_STATISTICS_OFF = 0.02  # of 0..1
HOW_GRAVE = {"problem": 0, "look": 1, "note": 2, "good": 3}


def find_findings(samples: Samples, facts: Facts, figures: Figures, duplicates: Duplicates) -> list[Finding]:
    """All findings, the gravest first; one that says so when there is none."""
    found = [
        *_copies(samples, duplicates),
        *_classes(samples.manifest, figures),
        *_suspicious(samples, figures),
        *_differences(samples, facts, figures),
        *_stated_statistics(samples.manifest, figures),
    ]
    found.sort(key=lambda finding: HOW_GRAVE[finding.level])
    return found or [Finding("good", "Nothing stands out. Look at the samples below all the same.")]


# ---- copies ----


def count_leaks(samples: Samples, duplicates: Duplicates) -> dict[tuple[str, str], tuple[int, int]]:
    """Images of the first split with the same bytes as one of the second, and with only a near copy there."""
    names = list(samples.indexes)
    splits = samples.split_numbers(np.arange(len(samples)))
    leaks = {}
    for one, other in (("test", "train"), ("val", "train"), ("test", "val")):
        if one in names and other in names:
            mine, theirs = splits == names.index(one), splits == names.index(other)
            exact = mine & np.isin(duplicates.same_bytes, duplicates.same_bytes[theirs])
            near = mine & np.isin(duplicates.same_picture, duplicates.same_picture[theirs]) & ~exact
            leaks[one, other] = int(exact.sum()), int(near.sum())
    return leaks


def count_repeats(samples: Samples, duplicates: Duplicates) -> dict[str, tuple[int, int]]:
    """Images of each split that repeat an earlier one of the same split: with the same bytes, and as near copies."""
    repeats = {}
    for split in samples.indexes:
        places = samples.places(split)
        num_files = len(np.unique(duplicates.same_bytes[places]))
        num_pictures = len(np.unique(duplicates.same_picture[places]))
        repeats[split] = places.stop - places.start - num_files, num_files - num_pictures
    return repeats


def _copies(samples: Samples, duplicates: Duplicates) -> Iterator[Finding]:
    for (one, other), (exact, near) in count_leaks(samples, duplicates).items():
        size = len(samples.indexes[one])
        if exact:
            text = f"{_images(exact, size)} of {one} {_are(exact)} byte-identical to images of {other}"
            yield Finding("problem", f"{text}: results on {one} flatter. Remove them from one of the two.")
        if near:
            copies = "is a near copy" if near == 1 else "are near copies"
            text = f"{_images(near, size)} of {one} {copies} of images of {other} ({NEAR})"
            yield Finding("problem", f"{text}: look at the pairs; real copies flatter the results on {one}.")
    differing = [group for group in duplicates.groups if group.labels_differ]
    for exact_ones, what in ((True, "byte-identical images"), (False, "near copies")):
        number = sum(group.exact == exact_ones for group in differing)
        if number:
            groups = f"1 group of {what} carries" if number == 1 else f"{number:,} groups of {what} carry"
            yield Finding("problem" if exact_ones else "look", f"{groups} different labels.")
    for split, (exact, near) in count_repeats(samples, duplicates).items():
        if exact + near:
            parts = [f"{exact:,} byte for byte"] * bool(exact) + [f"{near:,} as near copies"] * bool(near)
            verb = "repeats" if exact + near == 1 else "repeat"
            text = f"{_images(exact + near, len(samples.indexes[split]))} of {split} {verb} others of {split}"
            yield Finding("note", f"{text} ({', '.join(parts)}).")
    if not duplicates.complete:
        yield Finding("note", "So many images resemble each other that not all pairs were compared: there may be more copies.")


# ---- classes ----


def _classes(manifest: DatasetManifest, figures: Figures) -> Iterator[Finding]:
    names = manifest.class_names
    for split, entry in figures.splits.items():
        absent = [name for name, count in zip(names, entry.class_counts, strict=True) if not count]
        if absent:
            level: Level = "problem" if split == "train" else "look"
            number = "1 class has" if len(absent) == 1 else f"{len(absent):,} classes have"
            yield Finding(level, f"{number} no sample in {split}: {enumerate_names(absent)}.")
        if entry.num_unlabelled:
            verb = "has" if entry.num_unlabelled == 1 else "have"
            yield Finding("note", f"{_images(entry.num_unlabelled, entry.num_samples)} of {split} {verb} no label at all.")
    reference = figures.splits.get("train")
    if reference is None:
        return
    present = [(count, name) for name, count in zip(names, reference.class_counts, strict=True) if count]
    ratio = imbalance(reference.class_counts)
    if ratio is not None and ratio > MAX_IMBALANCE:
        (least, rare), (most, frequent) = min(present), max(present)
        text = f"`{shorten(frequent)}` has {ratio:,.0f} times the samples of `{shorten(rare)}` in train ({most:,} and {least:,}"
        yield Finding("look", f"{text}; threshold {MAX_IMBALANCE:g} times).")
    few = [name for count, name in present if count < FEW_SAMPLES]
    if few:
        number = "1 class has" if len(few) == 1 else f"{len(few):,} classes have"
        yield Finding("look", f"{number} fewer than {FEW_SAMPLES} samples in train: {enumerate_names(few)}.")


def imbalance(class_counts: Sequence[int]) -> float | None:
    """Samples of the most frequent class over those of the least frequent that has any."""
    present = [count for count in class_counts if count]
    return max(present) / min(present) if present else None


def enumerate_names(names: Sequence[str], at_most: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - at_most
    return ", ".join(map(shorten, names[:at_most])) + (f" and {more:,} more" if more > 0 else "")


def shorten(name: str) -> str:
    """A class name that leaves room for the sentence around it."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1].rstrip()}…"


# ---- images that stand out ----


def _suspicious(samples: Samples, figures: Figures) -> Iterator[Finding]:
    for kind, places in figures.suspicious.items():
        if len(places):
            level: Level = "problem" if kind == "undecodable" else "note" if len(places) > len(samples) / 2 else "look"
            text = f"{_images(len(places), len(samples))} {_are(len(places))} {kind}: {DESCRIPTIONS[kind]}."
            yield Finding(level, text)


def _images(number: int, of: int) -> str:
    if number == of:
        return f"All {number:,} images" if number > 1 else "The only image"
    share = 100 * number / of
    shown = f"{share:.1f}" if share >= 0.1 else f"{share:.1g}"
    return f"{number:,} image{'' if number == 1 else 's'} ({shown} %)"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


# ---- val and test against train ----


def _differences(samples: Samples, facts: Facts, figures: Figures) -> Iterator[Finding]:
    if "train" not in figures.splits:
        return
    reference, reference_facts = figures.splits["train"], facts[samples.places("train")]
    for split, entry in figures.splits.items():
        if split != "train":
            yield from _brightness_difference(split, facts[samples.places(split)], reference_facts)
            yield from _size_difference(split, entry, reference)
            yield from _class_difference(split, entry, reference)


def _brightness_difference(split: str, facts: Facts, reference: Facts) -> Iterator[Finding]:
    here, there = brightness_of(facts[facts["decoded"]]), brightness_of(reference[reference["decoded"]])
    if len(here) < 2 or len(there) < 2:
        return
    difference, deviation = float(here.mean() - there.mean()), max(float(there.std()), 1.0)
    chance = deviation * math.sqrt(1 / len(here) + 1 / len(there))
    if abs(difference) > BRIGHTNESS_SHIFT * deviation and abs(difference) > STANDARD_ERRORS * chance:
        text = f"Images of {split} are {'brighter' if difference > 0 else 'darker'} than those of train: mean level"
        text += f" {here.mean():.0f} and {there.mean():.0f} of 255, {abs(difference) / deviation:.2f} standard deviations"
        yield Finding("look", f"{text} (threshold {BRIGHTNESS_SHIFT:g}).")


def _size_difference(split: str, entry: SplitFigures, reference: SplitFigures) -> Iterator[Finding]:
    here, there = (figures.sizes["megapixels"].get("median", 0.0) for figures in (entry, reference))
    if min(here, there) > 0 and max(here / there, there / here) > SIZE_RATIO and entry.num_samples >= FEW_SAMPLES:
        text = f"Images of {split} have another size than those of train: half have at most {here:.3g} megapixels"
        yield Finding("look", f"{text}, in train {there:.3g} (threshold {SIZE_RATIO:g} times).")


def _class_difference(split: str, entry: SplitFigures, reference: SplitFigures) -> Iterator[Finding]:
    here, there = np.array(entry.class_counts, float), np.array(reference.class_counts, float)
    if not here.sum() or not there.sum():
        return
    share, expected = here / here.sum(), there / there.sum()
    moved = float(np.abs(share - expected).sum() / 2)
    # By chance alone each share varies by its standard error; the mean of |x| is 0.8 of it.
    chance = 0.4 * float(np.sqrt(expected * (1 - expected) * (1 / here.sum() + 1 / there.sum())).sum())
    if moved > CLASS_SHIFT and moved > 2 * chance:
        text = f"Classes are distributed otherwise in {split} than in train: {moved:.0%} of the samples would have to change"
        yield Finding("look", f"{text} class (threshold {CLASS_SHIFT:.0%}).")


def _stated_statistics(manifest: DatasetManifest, figures: Figures) -> Iterator[Finding]:
    stated = manifest.image_stats
    entry = figures.splits.get(stated.split)
    if entry is None or any(math.isnan(value) for value in entry.mean):
        return
    pairs = [*zip(stated.mean, entry.mean, strict=True), *zip(stated.std, entry.std, strict=True)]
    worst = max(abs(one - other) for one, other in pairs)
    if worst > STATED_STATISTICS_OFF:
        text = f"dataset.json states mean and deviation of the pixels of {stated.split} that are off by {worst:.3f} of 1"
        yield Finding("look", f"{text} (threshold {STATED_STATISTICS_OFF:g}); a network normalised by them sees shifted input.")
