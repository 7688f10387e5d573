"""Each benchmark as one picture."""

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench.measure import Figures
from pipeline.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.bench.model import ModelFigures

OURS = "shardline"


def draw(rounds: dict[str, list[Figures]], path: Path) -> None:
    """Write bar charts of images a second and CPU time an image: medians, with a line from least to most."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    chart, (speed, cost) = pyplot.subplots(1, 2, figsize=(13, 0.5 * len(rounds) + 1.4), layout="constrained")
    loaders = {name: figures for name, figures in rounds.items() if "startup_seconds" in figures[0]}
    _draw_bars(speed, loaders, "images_a_second", "images a second (longer is better)", "{:,.0f}")
    _draw_bars(cost, rounds, "cpu_ms", "CPU milliseconds an image (shorter is better)", "{:.2f}")
    chart.suptitle(
        "random 224 px crops of 500 x 375 JPEGs, mirrored by half, uint8 batches of 64; x: shardline beside it",
        fontsize="medium",
    )
    _save(chart, path)


def _draw_bars(axes: "Axes", rounds: dict[str, list[Figures]], figure: str, label: str, shown: str) -> None:
    values = {name: sorted(figures[figure] for figures in found) for name, found in rounds.items()}
    middles = {name: statistics.median(found) for name, found in values.items()}
    # Best on top, which is last: most images, or least time.
    names = sorted(middles, key=lambda name: middles[name] if figure == "images_a_second" else -middles[name])
    colors = ["#2563eb" if name.startswith(OURS) else "#d97706" if name.startswith("bare") else "#9ca3af" for name in names]
    below, above = ([abs(values[name][end] - middles[name]) for name in names] for end in (0, -1))
    bars = axes.barh(names, [middles[name] for name in names], color=colors, xerr=(below, above), ecolor="#374151")
    ours = middles.get(OURS)
    labels = [
        shown.format(middles[name]) + (f"  (x {ours / middles[name]:.2f})" if ours and name != OURS else "") for name in names
    ]
    axes.bar_label(bars, labels, padding=6)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.3)


def draw_models(figures: Sequence["ModelFigures"], path: Path) -> None:
    """Write bar charts of every batch size, fastest on top: milliseconds of a call, each beside onnxruntime with fp32."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cases = sorted({(row.threads, row.batch) for row in figures})
    num_contenders = len({row.contender for row in figures})
    threads, batches = ({case[place] for case in cases} for place in (0, 1))
    size = (5 * len(batches), (0.4 * num_contenders + 1) * len(threads))
    chart, grid = pyplot.subplots(len(threads), len(batches), figsize=size, layout="constrained", squeeze=False)
    for axes, case in zip(grid.flat, cases, strict=True):
        rows = sorted((row for row in figures if (row.threads, row.batch) == case), key=lambda row: -row.p50_ms)
        colors = ["#2563eb" if row.contender.startswith("onnxruntime") else "#9ca3af" for row in rows]
        bars = axes.barh([row.contender for row in rows], [row.p50_ms for row in rows], color=colors)
        axes.bar_label(bars, [f"{row.p50_ms:.3g}  (x {row.times:.2f})" for row in rows], padding=4)
        axes.set_title(f"batch {case[1]}, {case[0]} thread{'s' if case[0] > 1 else ''}", fontsize="medium")
        axes.set_xlabel("median milliseconds of a call")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.45)
    _save(chart, path)


def _save(chart: "Figure", path: Path) -> None:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    chart.savefig(buffer, format="png", dpi=130)
    pyplot.close(chart)
    write_bytes(path, buffer.getvalue())
