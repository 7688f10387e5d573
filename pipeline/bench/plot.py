"""The loader benchmark as one picture."""

import io
from pathlib import Path

from pipeline.bench.measure import Figures
from pipeline.files import write_bytes

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
    buffer = io.BytesIO()
    chart.savefig(buffer, format="png", dpi=130)
    pyplot.close(chart)
    write_bytes(path, buffer.getvalue())
