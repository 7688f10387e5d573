"""Bar charts, histograms and curves as inline SVG: blocks of a report's page.

Only bars and lines are drawn; names and numbers are text of the page, so that they wrap, are read aloud and can be searched.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.report.html import escape, format_cell

MAX_SERIES = 4  # as many colours as STYLE has
PLOT_WIDTH, PLOT_HEIGHT = 720, 96
TICK_HEIGHT = 18
LINES_HEIGHT, HEADROOM = 160, 20
CURVES_HEIGHT, TOP, MARGIN = 190, 20, 46
MAX_POINTS = 600  # of a line: more than the picture has pixels to show them
SMALLEST_SPAN = 1e-6
SMALLEST_BAR = 0.4  # of 100: a class with one image must not look like one with none


@dataclass(frozen=True)
class BarChart:
    """One horizontal bar a row, made of one piece a series: `values[row][series]`. The numbers stand beside it.

    `whole` adds each row's share of that number.
    """

    labels: Sequence[str]
    series: Sequence[str]
    values: Sequence[Sequence[float]]
    whole: float | None = None

    def to_html(self) -> str:
        """The chart as a table with a bar in each row."""
        assert len(self.series) <= MAX_SERIES
        largest = max((sum(row) for row in self.values), default=0) or 1
        columns = "".join(
            f'<th scope="col" class="number"><i class="s{n}"></i>{escape(s)}</th>' for n, s in enumerate(self.series)
        )
        columns += '<th scope="col" class="number">all</th>' if len(self.series) > 1 else ""
        columns += '<th scope="col" class="number">share</th>' if self.whole else ""
        rows = "".join(self._row(label, row, largest) for label, row in zip(self.labels, self.values, strict=True))
        return (
            '<div class="wide chart"><table class="bars"><thead><tr><td></td><td class="bar"></td>'
            f"{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
        )

    def _row(self, label: str, values: Sequence[float], largest: float) -> str:
        pieces, left = "", 0.0
        for number, value in enumerate(values):
            width = max(100 * value / largest, SMALLEST_BAR) if value else 0.0
            pieces += f'<rect class="s{number}" x="{left:.2f}" width="{width:.2f}" height="10"/>' if width else ""
            left += width
        numbers = [format_cell(value) for value in values]
        numbers += [format_cell(sum(values))] if len(values) > 1 else []
        numbers += [f"{sum(values) / self.whole:.1%}"] if self.whole else []
        cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
        name = escape(label)
        return (
            f'<tr><th scope="row" title="{name}"><span>{name}</span></th>'
            f'<td class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{pieces}</svg></td>'
            f"{cells}</tr>"
        )


@dataclass(frozen=True)
class Histogram:
    """How often values fall between edges: `counts[series][bin]`, len(edges) - 1 bins, all drawn equally wide.

    Each series has its own row over the same axis, as tall as its own largest bin, so that a small split can be compared
    with a large one.
    """

    edges: Sequence[float]
    series: Sequence[str]
    counts: Sequence[Sequence[int]]
    title: str = ""
    show_edge: Callable[[float], str] = format_cell

    def to_html(self) -> str:
        """The rows and their axis as one SVG below the title."""
        assert len(self.series) <= MAX_SERIES
        height = len(self.series) * PLOT_HEIGHT + TICK_HEIGHT
        rows = "".join(self._row(number) for number in range(len(self.series)))
        title = f"<h3>{escape(self.title)}</h3>" if self.title else ""
        return (
            f'<div class="chart">{title}<svg class="histogram" viewBox="0 0 {PLOT_WIDTH} {height}" role="img" '
            f'aria-label="{escape(self.title or "histogram")}">{rows}{self._ticks(height)}</svg></div>'
        )

    def _row(self, number: int) -> str:
        counts, base = self.counts[number], (number + 1) * PLOT_HEIGHT
        largest, width = max(counts, default=0) or 1, PLOT_WIDTH / max(1, len(counts))
        bars = ""
        for place, count in enumerate(counts):
            tall = max(1.0, count / largest * (PLOT_HEIGHT - 24)) if count else 0.0
            if tall:
                low, high = self.show_edge(self.edges[place]), self.show_edge(self.edges[place + 1])
                bars += (
                    f'<rect class="s{number}" x="{place * width:.2f}" y="{base - tall:.2f}" width="{max(1.0, width - 1):.2f}" '
                    f'height="{tall:.2f}"><title>{escape(f"{low} to {high}: {count:,}")}</title></rect>'
                )
        top = base - PLOT_HEIGHT + 14
        name = f'<text x="0" y="{top}">{escape(self.series[number])}</text>'
        scale = f'<text x="{PLOT_WIDTH}" y="{top}" text-anchor="end">{sum(counts):,} in all, tallest bar {largest:,}</text>'
        return f'{bars}{name}{scale}<line x1="0" x2="{PLOT_WIDTH}" y1="{base}" y2="{base}"/>'

    def _ticks(self, height: int) -> str:
        num_bins = len(self.edges) - 1
        step = math.ceil(num_bins / 8)
        marks = ""
        for place in range(0, num_bins + 1, step):
            x = place * PLOT_WIDTH / num_bins
            anchor = "start" if place == 0 else "end" if place == num_bins else "middle"
            text = escape(self.show_edge(self.edges[place]))
            marks += f'<text x="{x:.1f}" y="{height - 4}" text-anchor="{anchor}">{text}</text>'
        return marks


@dataclass(frozen=True)
class LineChart:
    """Values at 0, 1, 2, ... of each series over one axis, from 0 (or the smallest value) to the largest."""

    x_name: str
    y_name: str
    series: Mapping[str, Sequence[float]]

    def to_html(self) -> str:
        """The lines as one SVG, each named in its colour above."""
        assert len(self.series) <= MAX_SERIES
        values = [value for line in self.series.values() for value in line if math.isfinite(value)]
        low, high = min([0.0, *values]), max([*values, SMALLEST_SPAN])
        longest = max(map(len, self.series.values()), default=1)
        lines = "".join(
            f'<polyline class="l{number}" points="{self._points(line, longest, low, high)}"/>'
            for number, line in enumerate(self.series.values())
        )
        legend = "".join(
            f'<span><i class="s{number}"></i>{escape(name)}, last {escape(format_cell(float(line[-1])))}</span>'
            for number, (name, line) in enumerate(self.series.items())
        )
        axes = (
            f'<line x1="0" x2="{PLOT_WIDTH}" y1="{LINES_HEIGHT}" y2="{LINES_HEIGHT}"/>'
            f'<text x="0" y="{LINES_HEIGHT + 14}">0</text>'
            f'<text x="{PLOT_WIDTH}" y="{LINES_HEIGHT + 14}" text-anchor="end">{escape(self.x_name)} {longest - 1:,}</text>'
            f'<text x="{PLOT_WIDTH}" y="12" text-anchor="end">top: {escape(self.y_name)} {escape(format_cell(high))}</text>'
        )
        name = escape(f"{self.y_name} by {self.x_name}")
        return (
            f'<div class="chart"><div class="legend">{legend}</div><svg class="histogram" role="img" aria-label="{name}" '
            f'viewBox="0 0 {PLOT_WIDTH} {LINES_HEIGHT + TICK_HEIGHT}">{axes}{lines}</svg></div>'
        )

    @staticmethod
    def _points(line: Sequence[float], longest: int, low: float, high: float) -> str:
        scale = (LINES_HEIGHT - HEADROOM) / (high - low)
        return " ".join(
            f"{place * PLOT_WIDTH / max(1, longest - 1):.1f},{LINES_HEIGHT - (value - low) * scale:.1f}"
            for place, value in enumerate(line)
            if math.isfinite(value)
        )


@dataclass(frozen=True)
class CurveChart:
    """Lines of points (x, y) over one axis of x from 0 to `last_x`, such as a loss by step, each with points of its own.

    `marks` are positions on x with a word each, such as the best checkpoint's step. A value that is no number breaks a line.
    """

    title: str
    x_name: str
    last_x: float
    series: Mapping[str, Sequence[tuple[float, float]]]
    marks: Mapping[str, float] = field(default_factory=dict)

    def to_html(self) -> str:
        """The lines as one SVG over labelled grid lines, each named in its colour above with its last value."""
        assert len(self.series) <= MAX_SERIES
        finite = [point for line in self.series.values() for point in line if math.isfinite(point[1])]
        if not finite:
            return ""
        ticks = nice_ticks(min(y for _, y in finite), max(y for _, y in finite))
        frame = _Frame(self.last_x, ticks[0], ticks[-1])
        lines = "".join(self._line(number, line, frame) for number, line in enumerate(self.series.values()))
        legend = "".join(
            f'<span><i class="s{number}"></i>{escape(name)}, last {escape(format_cell(float(line[-1][1])))}</span>'
            for number, (name, line) in enumerate(self.series.items())
            if line
        )
        name, height = escape(f"{self.title} by {self.x_name}"), CURVES_HEIGHT + 2 * TICK_HEIGHT
        return (
            f'<div class="chart"><h3>{escape(self.title)}</h3><div class="legend">{legend}</div>'
            f'<svg class="histogram" role="img" aria-label="{name}" viewBox="0 0 {PLOT_WIDTH} {height}">'
            f"{frame.grid(ticks)}{frame.foot(self.x_name)}{self._marks(frame)}{lines}</svg></div>"
        )

    @staticmethod
    def _line(number: int, line: Sequence[tuple[float, float]], frame: "_Frame") -> str:
        pieces: list[list[str]] = [[]]
        for x, y in thin_out(line, MAX_POINTS):
            if math.isfinite(y):
                pieces[-1].append(f"{frame.x(x):.1f},{frame.y(y):.1f}")
            else:
                pieces.append([])
        drawn = "".join(f'<polyline class="l{number}" points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1)
        alone = [piece[0].split(",") for piece in pieces if len(piece) == 1]
        return drawn + "".join(f'<circle class="s{number}" cx="{x}" cy="{y}" r="3"/>' for x, y in alone)

    def _marks(self, frame: "_Frame") -> str:
        drawn = ""
        for word, place in self.marks.items():
            x = frame.x(place)
            anchor = "end" if x > PLOT_WIDTH / 2 else "start"
            drawn += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{CURVES_HEIGHT}"/>'
            drawn += f'<text x="{x:.1f}" y="{TOP - 6}" text-anchor="{anchor}">{escape(word)}</text>'
        return drawn


@dataclass(frozen=True)
class _Frame:
    """Where a value lies in the picture of a CurveChart."""

    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return MARGIN + value / (self.last or 1) * (PLOT_WIDTH - MARGIN)

    def y(self, value: float) -> float:
        return CURVES_HEIGHT - (value - self.low) / (self.high - self.low) * (CURVES_HEIGHT - TOP)

    def grid(self, ticks: Sequence[float]) -> str:
        lines = ""
        for tick in ticks:
            y = self.y(tick)
            lines += f'<line x1="{MARGIN}" x2="{PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            lines += f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        return lines

    def foot(self, name: str) -> str:
        y = CURVES_HEIGHT + TICK_HEIGHT
        return (
            f'<text x="{MARGIN}" y="{y}">0</text>'
            f'<text x="{PLOT_WIDTH}" y="{y}" text-anchor="end">{escape(name)} {self.last:,.0f}</text>'
        )


def nice_ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers, equally far apart, from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def thin_out(line: Sequence[tuple[float, float]], most: int) -> Sequence[tuple[float, float]]:
    """At most about `most` points of a line; of each stretch the lowest and the highest, so that no peak is lost."""
    if len(line) <= most:
        return line
    stretch = math.ceil(2 * len(line) / most)
    kept = []
    for first in range(0, len(line), stretch):
        part = range(first, min(first + stretch, len(line)))
        broken = [place for place in part if not math.isfinite(line[place][1])][:1]
        whole = [place for place in part if math.isfinite(line[place][1])]
        ends = [min(whole, key=lambda place: line[place][1]), max(whole, key=lambda place: line[place][1])] if whole else []
        kept += [line[place] for place in sorted({*broken, *ends})]
    return kept
