"""What a benchmark leaves: figures, targets met or missed, what was left out, and the machine they hold for."""

import dataclasses
import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.bench.measure import Figures
from pipeline.errors import ConfigError, nearest
from pipeline.files import write_json


@dataclass(frozen=True)
class Target:
    """What a figure should be, and is."""

    what: str
    value: float
    goal: str
    met: bool
    spread: tuple[float, float] | None = None  # least and most over the rounds


@dataclass(frozen=True)
class Benchmark:
    """All figures of a run: medians over the rounds, by part and contender; what was left out, and why."""

    figures: dict[str, dict[str, Figures]]
    targets: list[Target]
    left_out: dict[str, str]
    rounds: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def judge(
        self, part: str, what: str, figure: str, one: str, other: str, *, least: float = 0.0, most: float = math.inf
    ) -> None:
        """Hold the ratio of two contenders' figures, taken round by round, against a goal, where both are there."""
        found = self.rounds[part]
        if not {one, other} <= found.keys():
            return
        ratios = [us[figure] / them[figure] for us, them in zip(found[one], found[other], strict=True)]
        middle = statistics.median(ratios)
        goal = f">= {least:g} x" if least else f"<= {most:g} x"
        self.targets.append(Target(what, middle, goal, least <= middle <= most, (min(ratios), max(ratios))))

    def write(self, path: Path, packages: Iterable[str]) -> None:
        """Write it as JSON, with hardware and versions for whoever reads the figures later."""
        write_json(path, {**dataclasses.asdict(self), "machine": describe_machine(packages)})


def require_parts(parts: str, known: Sequence[str]) -> list[str]:
    """The parts named in a comma list, all of them if it is empty. Raises ConfigError for one that there is not."""
    names = [name.strip() for name in parts.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"`--parts` names '{name}'.{nearest(name, known) or ' Known: ' + ', '.join(known) + '.'}")
    return names or list(known)


def median(rounds: Iterable[Figures]) -> Figures:
    """Of each figure the median over the rounds."""
    found = list(rounds)
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """Hardware and versions, for whoever reads the figures later."""
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
