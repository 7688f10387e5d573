"""What a data set's images are like, in numbers: classes, sizes, colours, and the images that stand out."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.measure import Facts, Measurement
from pipeline.data.samples import Labels, Places, Samples

QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}
NUM_BINS = 24
LOG_RATIO = 20.0  # values that span more are binned by their logarithm
BRIGHTNESS_EDGES = np.arange(0.0, 257.0, 8.0)
ROUND_STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.4, 8.0)
COMMON_SIZES = 10
# What counts as standing out.
BLANK_SPREAD = 3.0  # standard deviation of the liveliest channel, in levels of 0..255
TINY_SIDE = 32
EXTREME_ASPECT = 4.0
DARK_LEVEL = 20.0
BRIGHT_LEVEL = 235.0

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bins:
    """How many values lie between each edge and the next."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class SplitFigures:
    """One split. `mean` and `std` are of all its pixels, each RGB channel, scaled to 0..1, NaN where nothing decodes."""

    num_samples: int
    num_shards: int
    num_bytes: int  # of the image files
    class_counts: list[int]
    num_unlabelled: int
    stored: dict[str, int]  # format and colour mode, most frequent first
    mean: list[float]
    std: list[float]
    brightness: list[int]  # images by their mean level, between BRIGHTNESS_EDGES
    sizes: dict[str, dict[str, float]]  # quantiles of width, height, aspect, megapixels, file_bytes


@dataclass(frozen=True)
class SizeFigures:
    """All splits together; sizes are those of the upright image in pixels, of what decodes."""

    quantiles: dict[str, dict[str, float]]
    longest_side: Bins
    file_bytes: Bins
    common: list[tuple[int, int, int]]  # (width, height, images), most frequent first
    num_sizes: int


@dataclass(frozen=True)
class Figures:
    """The whole data set. `suspicious` has the places of each kind, the most extreme first."""

    splits: dict[str, SplitFigures]
    sizes: SizeFigures
    suspicious: dict[str, Places]


def compute_figures(samples: Samples, labels: Labels, measured: Measurement) -> Figures:
    """Every figure of the report except duplicates."""
    file_bytes = samples.sizes()
    splits = {split: _split_figures(samples, labels, measured, file_bytes, split) for split in samples.indexes}
    return Figures(splits, _size_figures(measured.facts, file_bytes), find_suspicious(measured.facts))


def _split_figures(samples: Samples, labels: Labels, measured: Measurement, file_bytes: Places, split: str) -> SplitFigures:
    places = samples.places(split)
    facts = measured.facts[places]
    mean, std = pixel_statistics(measured.histograms[split])
    brightness = brightness_of(facts[facts["decoded"]])
    return SplitFigures(
        num_samples=len(facts),
        num_shards=len(samples.manifest.splits[split].shards),
        num_bytes=int(file_bytes[places].sum()),
        class_counts=labels.counts(split),
        num_unlabelled=labels.num_unlabelled(split),
        stored=dict(sorted(measured.stored[split].items(), key=lambda item: (-item[1], item[0]))),
        mean=mean,
        std=std,
        brightness=[int(count) for count in np.histogram(brightness, BRIGHTNESS_EDGES)[0]],
        sizes=size_quantiles(facts, file_bytes[places]),
    )


def _size_figures(facts: Facts, file_bytes: Places) -> SizeFigures:
    decoded = facts[facts["decoded"]]
    counted = Counter(zip(decoded["width"].tolist(), decoded["height"].tolist(), strict=True))
    common = sorted(((width, height, count) for (width, height), count in counted.items()), key=lambda size: (-size[2], size))
    longest = np.maximum(decoded["width"], decoded["height"]).astype(np.float64)
    return SizeFigures(
        quantiles=size_quantiles(facts, file_bytes),
        longest_side=bin_values(longest),
        file_bytes=bin_values(file_bytes.astype(np.float64)),
        common=common[:COMMON_SIZES],
        num_sizes=len(counted),
    )


def pixel_statistics(histogram: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel scaled to 0..1, from exact counts of its levels (3, 256)."""
    means, deviations = [], []
    for counts in histogram.tolist():
        # Python's whole numbers do not overflow, so that the figures are exact for any number of pixels.
        count = sum(counts)
        total = sum(level * number for level, number in enumerate(counts))
        squares = sum(level * level * number for level, number in enumerate(counts))
        means.append(total / count / 255 if count else math.nan)
        deviations.append(math.sqrt(squares * count - total * total) / count / 255 if count else math.nan)
    return [round(mean, 6) for mean in means], [round(deviation, 6) for deviation in deviations]


def brightness_of(facts: Facts) -> Values:
    """Mean level of each image over its three channels, of 0..255."""
    brightness: Values = facts["mean"].astype(np.float64).mean(axis=1)
    return brightness


def aspect_of(facts: Facts) -> Values:
    """Width over height of each image."""
    aspect: Values = facts["width"] / np.maximum(facts["height"], 1)
    return aspect


def size_quantiles(facts: Facts, file_bytes: Places) -> dict[str, dict[str, float]]:
    """Quantiles of what is large or small about images; of pixels only where an image decodes."""
    decoded = facts[facts["decoded"]]
    measures = {
        "width": decoded["width"].astype(np.float64),
        "height": decoded["height"].astype(np.float64),
        "aspect": aspect_of(decoded),
        "megapixels": decoded["width"].astype(np.float64) * decoded["height"] / 1e6,
        "file_bytes": file_bytes.astype(np.float64),
    }
    return {name: quantiles(values) for name, values in measures.items()}


def quantiles(values: Values) -> dict[str, float]:
    """Values that occur (none between two), by how many lie at or below them; empty for no values."""
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    return {name: round(float(value), 6) for name, value in zip(QUANTILES, found, strict=True)}


def bin_values(values: Values) -> Bins:
    """Count values in about NUM_BINS bins with round edges, of equal width or, over a wide span, of equal ratio."""
    if not len(values):
        return Bins([], [])
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > LOG_RATIO:
        edges = _log_edges(low, high)
    else:
        step = _round_step((high - low) / NUM_BINS)
        first = math.floor(low / step)
        edges = [round(number * step, 9) for number in range(first, math.floor(high / step) + 2)]
    # A value on an edge belongs to the bin above; the last edge is beyond the largest value.
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1)
    return Bins(edges, [int(count) for count in counts])


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... that is at least `least`; images have whole sizes."""
    power = 10.0 ** math.floor(math.log10(max(least, 1.0)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def _log_edges(low: float, high: float) -> list[float]:
    """Ten round edges a decade, from the one at or below `low` to the one above `high`."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    edges = [round(step * 10.0**decade, 9) for decade in decades for step in ROUND_STEPS]
    first = max(number for number, edge in enumerate(edges) if edge <= low)
    last = min(number for number, edge in enumerate(edges) if edge > high)
    return edges[first : last + 1]


def find_suspicious(facts: Facts) -> dict[str, Places]:
    """The places of images that stand out, of each kind, the most extreme first. A blank one is neither dark nor bright."""
    decoded = facts["decoded"]
    blank = decoded & (facts["spread"] < BLANK_SPREAD)
    lively = decoded & ~blank
    shortest = np.minimum(facts["width"], facts["height"]).astype(np.float64)
    aspect = np.maximum(aspect_of(facts), 1 / np.maximum(aspect_of(facts), 1e-9))
    brightness = brightness_of(facts)
    return {
        "undecodable": np.flatnonzero(~decoded),
        "blank": _ranked(blank, facts["spread"]),
        "tiny": _ranked(decoded & (shortest < TINY_SIDE), shortest),
        "elongated": _ranked(decoded & (aspect > EXTREME_ASPECT), -aspect),
        "very dark": _ranked(lively & (brightness < DARK_LEVEL), brightness),
        "very bright": _ranked(lively & (brightness > BRIGHT_LEVEL), -brightness),
    }


def _ranked(chosen: npt.NDArray[np.bool_], order: npt.NDArray[np.floating]) -> Places:
    places = np.flatnonzero(chosen)
    return places[np.argsort(order[places], kind="stable")]


DESCRIPTIONS = {
    "undecodable": "damaged, or of no known format",
    "blank": f"nearly one colour (no channel varies by more than {BLANK_SPREAD:g} of 255)",
    "tiny": f"a side below {TINY_SIDE} pixels",
    "elongated": f"more than {EXTREME_ASPECT:g} times as long as wide",
    "very dark": f"mean level below {DARK_LEVEL:g} of 255",
    "very bright": f"mean level above {BRIGHT_LEVEL:g} of 255",
}
