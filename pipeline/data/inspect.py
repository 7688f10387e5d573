"""Looking at a data set before anything is trained on it: figures, findings, a page to read and a file for machines.

It is a look, not a gate: whatever it finds, it succeeds. The same data set and seed give the same two files, byte for byte, on
any number of processes.
"""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pipeline
from pipeline.config import DataConfig
from pipeline.console import say, show_marked, show_table
from pipeline.data.duplicates import MAX_BITS, MAX_LEVELS, CopyGroup, Duplicates, find_duplicates
from pipeline.data.figures import BRIGHTNESS_EDGES, DESCRIPTIONS, Figures, compute_figures
from pipeline.data.findings import count_leaks, count_repeats, find_findings, imbalance
from pipeline.data.measure import Measurement, measure
from pipeline.data.samples import Labels, Samples
from pipeline.errors import DataError
from pipeline.manifest import DatasetManifest
from pipeline.report.html import Finding, Level

PAGE, FIGURES = "inspect.html", "inspect.json"
FORMAT_VERSION = 1
GROUPS_LISTED = 1000
MEMBERS_LISTED = 100
SUSPICIOUS_LISTED = 100
COLOURS: dict[Level, str] = {"good": "green", "note": "dim", "look": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Inspection:
    """All that was found out about a data set."""

    samples: Samples
    labels: Labels
    measured: Measurement
    figures: Figures
    duplicates: Duplicates
    findings: list[Finding]

    @property
    def num_findings(self) -> int:
        """Findings that ask for something; a good word is none."""
        return sum(finding.level != "good" for finding in self.findings)


def inspect_dataset(manifest: DatasetManifest, config: DataConfig, workers: int | None = None) -> Inspection:
    """Look at every image. Raises DataError for a data set that is damaged or has no index."""
    if manifest.streams and not manifest.splits:
        raise DataError(
            f"{manifest.folder}: its shards are streamed and have no index, so they cannot be looked at one by one."
        )
    samples = Samples.open(manifest, config)
    labels = Labels(samples)
    measured = measure(samples, workers)
    figures = compute_figures(samples, labels, measured)
    lively = measured.facts["decoded"].copy()
    lively[figures.suspicious["blank"]] = False
    duplicates = find_duplicates(samples, measured.facts, labels, np.flatnonzero(lively), workers)
    findings = find_findings(samples, measured.facts, figures, duplicates)
    return Inspection(samples, labels, measured, figures, duplicates, findings)


def require_writable(folder: Path) -> None:
    """Refuse a folder that will not take the two files, before the work is done. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder to write {PAGE} into. Make it, or choose another with --output.")
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder}: no permission to write {PAGE} there. Choose another folder with --output.")


# ---- for machines ----


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Every figure by name; lists of images are cut to a stated length."""
    manifest, duplicates = inspection.samples.manifest, inspection.duplicates
    return {
        "format_version": FORMAT_VERSION,
        "tool_version": pipeline.__version__,
        "data_digest": manifest.digest,
        "task": manifest.task,
        "findings": [dataclasses.asdict(finding) for finding in inspection.findings],
        "splits": {split: _split_as_json(inspection, split) for split in inspection.figures.splits},
        "sizes": dataclasses.asdict(inspection.figures.sizes),
        "duplicates": {
            "thresholds": {"hash_bits": MAX_BITS, "thumbnail_levels": MAX_LEVELS},
            "complete": duplicates.complete,
            "leaks": [
                {"split": one, "of": other, "same_bytes": exact, "near_copies": near}
                for (one, other), (exact, near) in count_leaks(inspection.samples, duplicates).items()
            ],
            "repeats": {
                split: {"same_bytes": exact, "near_copies": near}
                for split, (exact, near) in count_repeats(inspection.samples, duplicates).items()
            },
            "num_groups": len(duplicates.groups),
            "groups": _groups_as_json(inspection),
        },
        "suspicious": {
            kind: {
                "what": DESCRIPTIONS[kind],
                "number": len(places),
                "samples": describe_samples(inspection, places[:SUSPICIOUS_LISTED].tolist()),
            }
            for kind, places in inspection.figures.suspicious.items()
        },
    }


def _split_as_json(inspection: Inspection, split: str) -> dict[str, Any]:
    names, figures = inspection.samples.manifest.class_names, inspection.figures.splits[split]
    counts = dict(zip(names, figures.class_counts, strict=True))
    total = sum(figures.class_counts) or 1
    return dataclasses.asdict(figures) | {
        "class_counts": counts,
        "class_shares": {name: round(count / total, 6) for name, count in counts.items()},
        "imbalance": imbalance(figures.class_counts),
        "absent_classes": [name for name, count in counts.items() if not count],
        "brightness": {"edges": BRIGHTNESS_EDGES.tolist(), "counts": figures.brightness},
    }


def _groups_as_json(inspection: Inspection) -> list[dict[str, Any]]:
    return [
        {
            "same_bytes": group.exact,
            "labels_differ": group.labels_differ,
            "splits": group.splits,
            "hash_bits": group.bits,
            "thumbnail_levels": group.levels,
            "num_samples": len(group.members),
            "samples": described,
        }
        for group, described in _with_samples(inspection, inspection.duplicates.groups[:GROUPS_LISTED])
    ]


def _with_samples(inspection: Inspection, groups: list[CopyGroup]) -> Iterable[tuple[CopyGroup, list[dict[str, Any]]]]:
    described = describe_samples(inspection, [place for group in groups for place in group.members[:MEMBERS_LISTED]])
    remaining = iter(described)
    for group in groups:
        yield group, [next(remaining) for _ in group.members[:MEMBERS_LISTED]]


def describe_samples(inspection: Inspection, places: list[int]) -> list[dict[str, Any]]:
    """Split, key and class names of the samples at `places`; the reason where one cannot be decoded."""
    keys, reasons = inspection.samples.keys(places), dict(inspection.measured.failures)
    names = inspection.samples.manifest.class_names
    return [
        {
            "split": inspection.samples.split_of(place),
            "key": keys[place],
            "labels": [names[number] for number in inspection.labels.of(place)],
        }
        | ({"reason": reasons[place]} if place in reasons else {})
        for place in places
    ]


# ---- for the terminal ----


def say_summary(inspection: Inspection) -> None:
    """Print the findings and a table of the splits."""
    show_marked([(finding.level, COLOURS[finding.level], finding.text) for finding in inspection.findings])
    say("")
    rows = []
    for split, figures in inspection.figures.splits.items():
        present = sum(count > 0 for count in figures.class_counts)
        ratio, median = imbalance(figures.class_counts), figures.sizes
        rows.append(
            [
                split,
                f"{figures.num_samples:,}",
                f"{present:,} of {len(figures.class_counts):,}",
                "" if ratio is None else f"{ratio:.3g}",
                format_bytes(figures.num_bytes),
                f"{median['width'].get('median', 0):.0f} x {median['height'].get('median', 0):.0f}",
                " ".join(f"{value:.3f}" for value in figures.mean),
                " ".join(f"{value:.3f}" for value in figures.std),
            ]
        )
    show_table(["split", "samples", "classes", "imbalance", "images", "median size", "mean RGB", "std RGB"], rows)


def format_bytes(number: float) -> str:
    """A size with the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.0f} PB"
