"""Each benchmark as one picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench.measure import Figures
from pipeline.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.bench.model import ModelFigures

OURS = "shardline"


def draw(figures: dict[str, Figures], path: Path) -> None:
    """Write a bar chart of images a CPU-second, fastest on top, each with how many times faster ours is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = sorted(figures, key=lambda name: figures[name]["images_a_cpu_second"])
    values = [figures[name]["images_a_cpu_second"] for name in names]
    ours = figures[OURS]["images_a_cpu_second"] if OURS in figures else None
    chart, axes = pyplot.subplots(figsize=(8, 0.6 * len(names) + 1.4), layout="constrained")
    bars = axes.barh(names, values, color=["#2563eb" if name == OURS else "#9ca3af" for name in names])
    labels = [
        f"{value:,.0f}" + (f"  (x {ours / value:.2f})" if ours and name != OURS else "")
        for name, value in zip(names, values, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4)
    axes.set_xlabel("images a CPU-second: random 224 px crops of 500 x 375 JPEGs, mirrored by half")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.22)
    _save(chart, path)


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
