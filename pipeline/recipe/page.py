"""RUN/check/check.html: every verdict at a glance, then what each check saw, then what needs no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config import Config
from pipeline.manifest import DatasetManifest
from pipeline.recipe.baselines import baselines_table
from pipeline.recipe.verdict import Verdict
from pipeline.report.html import Block, Finding, Findings, KeyFigures, Level, Section, Table, Text, format_cell, write_page

PAGE = Path("check/check.html")
LEVELS: dict[str, Level] = {"green": "good", "red": "problem", "skipped": "note"}
TITLES = {
    "seed": "One seed, one training",
    "pixels": "What enters the network",
    "labels": "Do labels belong to images?",
    "leakage": "Are the splits apart?",
    "gradients": "Where gradients go",
    "init_loss": "The first loss",
    "zero_input": "Images against zeros",
    "overfit": "One batch by heart",
    "pretrained": "Pretrained against random features",
}

TimedVerdict = tuple[Verdict, float]


def write_check_page(
    config: Config, manifest: DatasetManifest, timed: Sequence[TimedVerdict], baselines: dict[str, Any]
) -> None:
    """Write the page, whole or not at all."""
    location = manifest.url or str(manifest.folder)
    subtitle = f"{location} · digest {manifest.digest[:12]} · seed {config.seed} · Shardline {pipeline.__version__}"
    write_page(config.run_dir / PAGE, f"Checks of {config.name}", build_sections(timed, baselines), subtitle)


def build_sections(timed: Sequence[TimedVerdict], baselines: dict[str, Any]) -> list[Section]:
    """All sections: a check that showed nothing has none of its own."""
    return [
        Section("Verdicts", _overview(timed)),
        *(
            Section(
                TITLES[verdict.check],
                [_finding(verdict), Text([f"Expected: {verdict.expected}."], faint=True), *verdict.blocks],
            )
            for verdict, _ in timed
            if verdict.blocks
        ),
        Section("Baselines", _baselines(baselines)),
    ]


def _overview(timed: Sequence[TimedVerdict]) -> list[Block]:
    number = {name: sum(verdict.verdict == name for verdict, _ in timed) for name in LEVELS}
    rows = [[v.check, v.verdict, _value(v), v.expected or None, f"{seconds:.1f} s"] for v, seconds in timed]
    return [
        KeyFigures({**number, "seconds": round(sum(seconds for _, seconds in timed), 1)}),
        Findings([Finding(LEVELS[verdict.verdict], f"{verdict.check}: {verdict.why}") for verdict, _ in timed]),
        Table(["check", "verdict", "value", "expected", "took"], rows),
    ]


def _value(verdict: Verdict) -> str | None:
    if verdict.value is None or isinstance(verdict.value, str):
        return verdict.value
    return format_cell(verdict.value)


def _finding(verdict: Verdict) -> Findings:
    return Findings([Finding(LEVELS[verdict.verdict], verdict.why)])


def _baselines(baselines: dict[str, Any]) -> list[Block]:
    if not baselines["accuracy"]:
        return [Text([f"None: {baselines['why_none']}."])]
    return [
        Text(
            ["What needs no network. One that does no better has learned nothing worth its cost; `evaluate` says so."],
            faint=True,
        ),
        baselines_table(baselines),
    ]
