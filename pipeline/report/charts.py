"""Bar charts, histograms and curves as inline SVG: blocks of a report's page.

Only bars and lines are drawn; names and numbers are text of the page, so that they wrap, are read aloud and can be searched.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.html import escape, format_cell

MAX_SERIES = 4  # as many colours as STYLE has
PLOT_WIDTH, PLOT_HEIGHT = 720, 96
TICK_HEIGHT = 18
LINES_HEIGHT, HEADROOM = 160, 20
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
