"""Two models on the same samples: how far apart their accuracies are, and whether that could be chance.

Both answered each image, so what counts is where exactly one of them is right. Treating the two accuracies as independent
would throw that away, and call real differences chance. No torch here: a verb that only compares starts at once.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import DataError

# The 97.5 % point of the normal distribution: intervals hold the true value in 95 of 100 cases.
Z = 1.959963984540054
COLUMNS = ["index", "key", "label", "predicted", "confidence"]


@dataclass(frozen=True)
class Comparison:
    """Accuracies of two models on the same `num_samples`; `difference` is ours less theirs, `low` to `high` its 95 % interval.

    `only_ours` samples are right with ours alone, `only_theirs` with theirs alone. `p_value` is how often models of equal
    accuracy would differ at least this much.
    """

    num_samples: int
    ours: float
    theirs: float
    difference: float
    low: float
    high: float
    p_value: float
    only_ours: int
    only_theirs: int


def compare_paired(ours: Sequence[bool], theirs: Sequence[bool]) -> Comparison:
    """Compare two models by whether each was right on each sample, (N,) and (N,), in the same order of samples."""
    assert len(ours) == len(theirs) > 0
    pairs = list(zip(ours, theirs, strict=True))
    both = sum(one and other for one, other in pairs)
    only_ours = sum(one and not other for one, other in pairs)
    only_theirs = sum(other and not one for one, other in pairs)
    number = len(pairs)
    low, high = paired_interval(both, only_ours, only_theirs, number - both - only_ours - only_theirs)
    return Comparison(
        num_samples=number,
        ours=(both + only_ours) / number,
        theirs=(both + only_theirs) / number,
        difference=(only_ours - only_theirs) / number,
        low=low,
        high=high,
        p_value=mcnemar_p_value(only_ours, only_theirs),
        only_ours=only_ours,
        only_theirs=only_theirs,
    )


def paired_interval(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired proportions, from the four counts of the 2 x 2 table.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998), 2635-2650: the Wilson intervals of both proportions, squared and
    added, less what their correlation explains.
    """
    number = both + first + second + neither
    one, other = (both + first) / number, (both + second) / number
    low_one, high_one = wilson_interval(both + first, number)
    low_other, high_other = wilson_interval(both + second, number)
    phi = _correlation(both, first, second, neither)
    below = _distance(one - low_one, high_other - other, phi)
    above = _distance(high_one - one, other - low_other, phi)
    return one - other - below, one - other + above


def _distance(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """The phi coefficient with Newcombe's continuity correction where it is positive; 0 where a margin is empty."""
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if margins == 0:
        return 0.0
    excess = both * neither - first * second
    corrected = excess if excess < 0 else max(excess - (both + first + second + neither) / 2, 0.0)
    return corrected / math.sqrt(margins)


def wilson_interval(hits: int, number: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927): also right near 0 and 1, where the textbook's has no width."""
    centre = hits + Z * Z / 2
    half = Z * math.sqrt(hits * (number - hits) / number + Z * Z / 4)
    low, high = (centre - half) / (number + Z * Z), (centre + half) / (number + Z * Z)
    # Exactly so; rounding would miss it by a hair.
    return (0.0 if hits == 0 else low), (1.0 if hits == number else high)


def mcnemar_p_value(first: int, second: int) -> float:
    """Exact two-sided McNemar test: `first` and `second` discordant pairs, which of equal models are a fair coin's throws."""
    number, fewer = first + second, min(first, second)
    if 2 * fewer == number:
        return 1.0
    # Logarithms: of ten thousand throws, the binomial coefficients do not fit a float.
    logs = [math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) for k in range(fewer + 1)]
    largest = max(logs)
    tail = math.fsum(math.exp(log - largest) for log in logs)
    return min(1.0, 2 * math.exp(largest + math.log(tail) - number * math.log(2)))


def read_correct(text: str) -> dict[str, bool]:
    """Whether each sample, by its key, was answered rightly, from the text of a predictions.csv. Raises DataError.

    Of several labels an image all must be right; both cells name them in the order of the classes. A key that two samples
    share (in shards of others) becomes `KEY#INDEX`.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if reader.fieldnames != COLUMNS:
        raise DataError(f"predictions.csv has the columns {reader.fieldnames}, not {COLUMNS}. Run `shardline evaluate` again.")
    rows = list(reader)
    uses = Counter(row["key"] for row in rows)
    correct: dict[str, bool] = {}
    for number, row in enumerate(rows, start=1):
        key = row["key"] if uses[row["key"]] == 1 else f"{row['key']}#{row['index']}"
        if None in row.values() or key in correct:
            raise DataError(f"predictions.csv: row {number} is cut short or a repetition. Run `shardline evaluate` again.")
        correct[key] = row["label"] == row["predicted"]
    if not correct:
        raise DataError("predictions.csv has no rows. Run `shardline evaluate` again.")
    return correct
