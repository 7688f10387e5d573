"""A benchmark as Markdown: verdicts, figures with their spread, the machine and the versions."""

import datetime
from collections.abc import Iterable

from pipeline.bench.measure import Figures
from pipeline.bench.results import Benchmark, describe_machine

UNITS = {
    "images_a_second": "images/s",
    "cpu_ms": "CPU ms an image",
    "startup_seconds": "s to the first batch",
    "cpu_us": "CPU us a step",
    "samples_a_second": "samples/s",
}


def as_markdown(benchmark: Benchmark, packages: Iterable[str]) -> str:
    """Tables of the verdicts and of every part's figures: medians, and in brackets the least and the most of the rounds."""
    machine = describe_machine(packages)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    lines = [f"{today}, {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}.", *benchmark.notes, ""]
    if benchmark.targets:
        rows = [
            [target.what, _with_spread(target.value, target.spread), target.goal, "met" if target.met else "missed"]
            for target in benchmark.targets
        ]
        lines += _table(["figure", "value", "goal", "verdict"], rows)
    for part, contenders in benchmark.figures.items():
        lines += [f"## {part}", "", *_part(contenders, benchmark.rounds.get(part, {}))]
    lines += [f"Versions: {versions}.", ""]
    lines += [f"Without {name}: {why}.  " for name, why in benchmark.left_out.items()]
    return "\n".join(lines).strip() + "\n"


def _part(contenders: dict[str, Figures], rounds: dict[str, list[Figures]]) -> list[str]:
    names = list(dict.fromkeys(name for figures in contenders.values() for name in figures))
    rows = []
    for contender, figures in contenders.items():
        row = [contender]
        for name in names:
            values = [one[name] for one in rounds.get(contender, []) if name in one]
            row.append(_with_spread(figures[name], (min(values), max(values)) if values else None) if name in figures else "")
        rows.append(row)
    return _table(["", *(UNITS.get(name, name.replace("_", " ")) for name in names)], rows)


def _with_spread(value: float, spread: tuple[float, float] | None) -> str:
    if spread is None or spread[0] == spread[1]:
        return _number(value)
    return f"{_number(value)} ({_number(spread[0])}-{_number(spread[1])})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]
