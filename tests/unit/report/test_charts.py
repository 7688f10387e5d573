import re

import pytest

from pipeline.report.charts import (
    CURVES_HEIGHT,
    HEADROOM,
    LINES_HEIGHT,
    MARGIN,
    MAX_POINTS,
    PLOT_HEIGHT,
    PLOT_WIDTH,
    TOP,
    BarChart,
    CurveChart,
    Histogram,
    LineChart,
    nice_ticks,
    thin_out,
)


def rectangles(markup: str) -> list[dict[str, str]]:
    return [dict(re.findall(r'(\w+)="([^"]*)"', rectangle)) for rectangle in re.findall(r"<rect [^>]*>", markup)]


def cells(markup: str) -> list[str]:
    return re.findall(r'<td class="number">([^<]*)</td>', markup)


def test_a_bar_is_as_long_as_its_share_of_the_longest_and_its_pieces_follow_each_other() -> None:
    bars = rectangles(BarChart(["a", "b"], ["train", "val"], [[30, 10], [10, 0]]).to_html())
    assert [(bar["class"], float(bar["x"]), float(bar["width"])) for bar in bars] == [
        ("s0", 0.0, 75.0),
        ("s1", 75.0, 25.0),
        ("s0", 0.0, 25.0),
    ]


def test_numbers_stand_beside_the_bars() -> None:
    assert cells(BarChart(["a"], ["train", "val"], [[1500, 500]], whole=8000).to_html()) == ["1,500", "500", "2,000", "25.0%"]
    assert cells(BarChart(["a"], ["train"], [[7]]).to_html()) == ["7"]


def test_one_of_many_can_be_told_from_none() -> None:
    bars = rectangles(BarChart(["many", "one", "none"], ["n"], [[1_000_000], [1], [0]]).to_html())
    assert [float(bar["width"]) for bar in bars] == [100.0, 0.4]


def test_a_chart_of_nothing_is_drawn_without_bars() -> None:
    assert rectangles(BarChart(["a"], ["n"], [[0]]).to_html()) == []
    assert rectangles(Histogram([0, 1, 2], ["n"], [[0, 0]]).to_html()) == []


def test_bars_of_a_histogram_reach_from_edge_to_edge_and_the_tallest_is_full() -> None:
    bars = rectangles(Histogram([0, 1, 2, 3], ["n"], [[5, 0, 10]]).to_html())
    assert [float(bar["x"]) for bar in bars] == [0.0, 2 * PLOT_WIDTH / 3]
    heights = [float(bar["height"]) for bar in bars]
    assert heights == [heights[1] / 2, PLOT_HEIGHT - 24]
    assert all(float(bar["y"]) + float(bar["height"]) == pytest.approx(PLOT_HEIGHT) for bar in bars)


def test_each_series_has_a_row_of_its_own_scale_over_one_axis() -> None:
    markup = Histogram([0, 1, 2], ["train", "val"], [[1000, 500], [1, 2]]).to_html()
    bars = rectangles(markup)
    assert [bar["class"] for bar in bars] == ["s0", "s0", "s1", "s1"]
    assert float(bars[0]["height"]) == float(bars[3]["height"])
    assert "1,500 in all, tallest bar 1,000" in markup
    assert "3 in all, tallest bar 2" in markup
    assert len(re.findall(r'text-anchor="(?:start|middle|end)">[\d.]+<', markup)) == 3  # one axis: 0, 1, 2


def test_edges_are_shown_as_the_caller_says() -> None:
    markup = Histogram([0, 1000], ["n"], [[1]], show_edge=lambda edge: f"{edge / 1000:g} kB").to_html()
    assert ">0 kB<" in markup
    assert ">1 kB<" in markup
    assert "<title>0 kB to 1 kB: 1</title>" in markup


def lines(markup: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline class="l\d" points="([^"]*)"', markup)
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in points.split())] for points in found]


def test_curves_share_both_axes_and_the_largest_value_leaves_room_for_its_number() -> None:
    markup = LineChart("step", "loss", {"long": [4.0, 2.0, 0.0], "short": [2.0, 1.0]}).to_html()
    middle = (LINES_HEIGHT + HEADROOM) / 2
    assert lines(markup) == [
        [(0.0, HEADROOM), (PLOT_WIDTH / 2, middle), (PLOT_WIDTH, LINES_HEIGHT)],
        [(0.0, middle), (PLOT_WIDTH / 2, (LINES_HEIGHT + middle) / 2)],
    ]
    assert "top: loss 4" in markup
    assert "step 2<" in markup
    assert "short, last 1<" in markup


def test_values_that_are_no_numbers_are_left_out_of_a_curve() -> None:
    assert lines(LineChart("step", "loss", {"n": [float("nan"), 1.0, float("inf")]}).to_html()) == [
        [(PLOT_WIDTH / 2, HEADROOM)]
    ]
    assert lines(LineChart("step", "loss", {"n": [float("nan")]}).to_html()) == [[]]


def test_curves_of_different_steps_share_one_axis() -> None:
    middle = (MARGIN + PLOT_WIDTH) / 2
    series = {"train": [(0.0, 0.0), (50.0, 1.0), (100.0, 0.0)], "val": [(50.0, 0.5), (100.0, 1.0)]}
    markup = CurveChart("Loss", "step", 100, series, {"best": 50}).to_html()
    assert lines(markup) == [
        [(MARGIN, CURVES_HEIGHT), (middle, TOP), (PLOT_WIDTH, CURVES_HEIGHT)],
        [(middle, (CURVES_HEIGHT + TOP) / 2), (PLOT_WIDTH, TOP)],
    ]
    assert f'class="mark" x1="{middle:.1f}"' in markup
    assert "step 100<" in markup
    assert "val, last 1<" in markup


def test_what_is_no_number_breaks_a_curve_and_a_point_between_two_is_drawn_alone() -> None:
    nan = float("nan")
    line = [(0.0, 1.0), (1.0, 2.0), (2.0, nan), (3.0, 3.0), (4.0, nan), (5.0, 1.0), (6.0, 1.0)]
    markup = CurveChart("Loss", "step", 6, {"train": line}).to_html()
    assert [len(piece) for piece in lines(markup)] == [2, 2]
    assert markup.count("<circle") == 1
    assert CurveChart("Loss", "step", 6, {"train": [(0.0, nan)]}).to_html() == ""


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.13, 2.3, [0, 0.5, 1, 1.5, 2, 2.5]), (3, 3, [1, 2, 3, 4, 5]), (0, 0, None)],
)
def test_ticks_are_round_and_hold_the_values(low: float, high: float, ticks: list[float] | None) -> None:
    found = nice_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 < len(found) <= 8
    assert ticks is None or found == ticks


def test_a_long_curve_keeps_its_peaks() -> None:
    line = [(float(step), 1.0) for step in range(100_000)]
    line[54_321] = (54_321.0, 9.0)
    line[77_777] = (77_777.0, float("nan"))
    kept = thin_out(line, MAX_POINTS)
    assert len(kept) <= MAX_POINTS + 1
    assert line[54_321] in kept
    assert line[77_777] in kept
    assert [*kept] == sorted(kept)
    assert thin_out(line[:MAX_POINTS], MAX_POINTS) == line[:MAX_POINTS]
