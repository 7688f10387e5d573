import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from pipeline.comparison import (
    Z,
    compare_paired,
    mcnemar_p_value,
    paired_interval,
    read_correct,
    wilson_interval,
)
from pipeline.errors import DataError

HEADER = "index,key,label,predicted,confidence\n"


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe (1998), table III
        ((53, 0, 0, 1), -0.0729, 0.0729),
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al., Statistics with Confidence (2000), p. 52
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014)
    ],
)
def test_the_interval_is_the_published_one(table: tuple[int, int, int, int], low: float, high: float) -> None:
    digits = 4 if len(f"{low}".lstrip("-")) > 5 else 3
    # As many digits as the publication gives.
    assert paired_interval(*table) == pytest.approx((low, high), abs=0.6 * 10**-digits)


def test_an_interval_holds_the_true_difference_in_nineteen_of_twenty_cases() -> None:
    rng = np.random.default_rng(4)
    for shares in [(0.90, 0.04, 0.02, 0.04), (0.6, 0.1, 0.1, 0.2), (0.97, 0.01, 0.005, 0.015)]:
        truth = shares[1] - shares[2]
        tables = rng.multinomial(400, shares, size=3000)
        intervals = [paired_interval(*map(int, table)) for table in tables]
        coverage = np.mean([low <= truth <= high for low, high in intervals])
        # 3000 draws: four standard errors are 0.016; small samples are covered a little more often than asked.
        assert 0.934 < coverage < 0.985, (shares, coverage)


def test_pairing_finds_a_difference_that_two_separate_intervals_would_hide() -> None:
    ours = [True] * 950 + [False] * 50
    theirs = [True] * 935 + [False] * 65
    paired = compare_paired(ours, theirs)
    assert paired.low > 0
    assert paired.p_value < 1e-4
    assert wilson_interval(950, 1000)[0] < wilson_interval(935, 1000)[1]


def test_ours_and_theirs_change_places() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = (list(map(bool, rng.random(300) < share)) for share in (0.9, 0.85))
    one, other = compare_paired(ours, theirs), compare_paired(theirs, ours)
    assert (one.difference, one.p_value) == (-other.difference, other.p_value)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)
    assert (one.only_ours, one.only_theirs) == (other.only_theirs, other.only_ours)
    assert one.ours == sum(ours) / 300


def test_equal_answers_differ_by_nothing_and_the_interval_still_has_a_width() -> None:
    same = compare_paired([True] * 90 + [False] * 10, [True] * 90 + [False] * 10)
    assert (same.difference, same.p_value, same.only_ours, same.only_theirs) == (0.0, 1.0, 0, 0)
    assert -0.05 < same.low < 0 < same.high < 0.05


@pytest.mark.parametrize(("first", "second"), [(0, 5), (1, 7), (6, 16), (3, 3), (0, 0), (480, 530), (20_000, 20_400)])
def test_the_p_value_is_that_of_a_fair_coin(first: int, second: int) -> None:
    wanted = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_p_value(first, second) == pytest.approx(wanted, rel=1e-7)
    assert mcnemar_p_value(first, second) == mcnemar_p_value(second, first)


@pytest.mark.parametrize(("hits", "number"), [(0, 9), (9, 9), (3, 10), (97, 100), (49_812, 50_000)])
def test_wilson_agrees_with_scipy(hits: int, number: int) -> None:
    wanted = stats.binomtest(hits, number).proportion_ci(method="wilson")
    assert wilson_interval(hits, number) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert pytest.approx(stats.norm.ppf(0.975), abs=1e-15) == Z


def test_a_single_sample_has_an_interval() -> None:
    assert not math.isnan(compare_paired([True], [True]).low)


def test_predictions_are_read_by_key() -> None:
    text = HEADER + '0,a,cat,cat,0.9\n1,"b, or c",cat,dog,0.6\n'
    assert read_correct(text) == {"a": True, "b, or c": False}


def test_of_several_labels_all_must_be_right() -> None:
    text = HEADER + "0,a,cat|dog,cat|dog,0.9|0.8\n1,b,cat|dog,cat,0.9\n2,c,,,\n3,d,,cat,0.7\n4,e,cat,cat|dog,1|1\n"
    assert read_correct(text) == {"a": True, "b": False, "c": True, "d": False, "e": False}


def test_a_bar_in_the_name_of_a_class_does_not_make_it_another() -> None:
    assert read_correct(HEADER + "0,a,left|right,right|left,0.9\n1,b,a,a|a,0.9\n") == {"a": False, "b": False}


def test_a_key_that_two_samples_share_is_told_apart_by_the_index_in_any_order() -> None:
    rows = ["0,a,cat,cat,0.9\n", "7,a,cat,dog,0.9\n", "8,b,cat,cat,0.9\n"]
    assert read_correct(HEADER + "".join(rows)) == {"a#0": True, "a#7": False, "b": True}
    assert read_correct(HEADER + "".join(rows[::-1])) == read_correct(HEADER + "".join(rows))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has the columns None"),
        ("key,label\na,cat\n", "has the columns"),
        (HEADER, "has no rows"),
        (HEADER + "0,a,cat\n", "row 1 is cut short"),
        (HEADER + "0,a,cat,cat,0.9\n0,a,cat,cat,0.9\n", "row 2 is cut short or a repetition"),
    ],
)
def test_a_table_that_is_not_whole_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        read_correct(text)


def test_comparing_needs_no_torch() -> None:
    code = "import sys, pipeline.comparison; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
