"""The page of an inspection: findings first, then every figure, then the images themselves.

The number of pictures is bounded, so that the page opens at once whatever the size of the data set.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import pipeline
from pipeline.console import progress
from pipeline.data.duplicates import NEAR, CopyGroup
from pipeline.data.figures import BRIGHTNESS_EDGES, DESCRIPTIONS, QUANTILES, Bins, SplitFigures
from pipeline.data.findings import count_leaks, count_repeats, enumerate_names, imbalance
from pipeline.data.inspect import FIGURES, PAGE, Inspection, as_json, format_bytes
from pipeline.data.parallel import run_parallel
from pipeline.data.samples import Samples
from pipeline.errors import DataError
from pipeline.files import write_json
from pipeline.preprocess import open_image
from pipeline.report.charts import BarChart, Histogram
from pipeline.report.html import (
    Block,
    Cell,
    Findings,
    KeyFigures,
    Picture,
    PictureGroup,
    Pictures,
    Section,
    Table,
    Text,
    format_cell,
    write_page,
)

SIDE = 96
CLASSES_SHOWN = 40
SAMPLES_A_CLASS = 8
SUSPICIOUS_SHOWN = 16
GROUPS_SHOWN = 24
GROUPS_A_KIND = 6
PICTURES_A_JOB = 16
TIMES = "\N{MULTIPLICATION SIGN}"


def write_inspection(inspection: Inspection, folder: Path, seed: int = 0, workers: int | None = None) -> None:
    """Write inspect.html (its random samples drawn by `seed`) and inspect.json into `folder`, each whole or not at all."""
    manifest = inspection.samples.manifest
    sections = build_sections(inspection, seed, workers)
    subtitle = f"{manifest.url or manifest.folder} · digest {manifest.digest[:12]} · Shardline {pipeline.__version__}"
    name = (manifest.url or str(manifest.folder.resolve())).rstrip("/").rsplit("/", 1)[-1]
    write_page(folder / PAGE, f"Data set {name}", sections, subtitle)
    write_json(folder / FIGURES, as_json(inspection))


def build_sections(inspection: Inspection, seed: int, workers: int | None = None) -> list[Section]:
    """All sections; the pictures that they show are decoded in `workers` processes."""
    shown = classes_shown(inspection)
    drawn = {number: draw_samples(inspection, number, seed) for number in shown}
    groups = choose_groups(inspection.duplicates.groups)
    suspicious = {kind: places[:SUSPICIOUS_SHOWN].tolist() for kind, places in inspection.figures.suspicious.items()}
    wanted = [*drawn.values(), *suspicious.values(), *(list(group.pair) for group in groups)]
    gallery = Gallery(inspection, [place for places in wanted for place in places], workers)
    return [
        Section("Findings", [Findings(inspection.findings)]),
        Section("Overview", _overview(inspection)),
        Section("Classes", _classes(inspection, shown)),
        Section("Sizes and formats", _sizes(inspection)),
        Section("Pixels", _pixels(inspection)),
        Section("Copies", _copies(inspection, groups, gallery)),
        Section("Images that stand out", _suspicious(inspection, suspicious, gallery)),
        Section("Random samples of each class", _samples(inspection, drawn, gallery)),
    ]


class Gallery:
    """Small pictures of some samples, with what they are called."""

    def __init__(self, inspection: Inspection, wanted: Sequence[int], workers: int | None = None) -> None:
        places = sorted(set(wanted))
        self.samples, self.labels = inspection.samples, inspection.labels
        self.keys = self.samples.keys(places)
        self.reasons = dict(inspection.measured.failures)
        self.content = make_pictures(self.samples, places, workers)

    def picture(self, place: int) -> Picture:
        """A sample's picture with label, split and key below it."""
        return self._captioned(place, [self.labels.text(place), self.samples.split_of(place), self.keys[place]])

    def picture_in_class(self, place: int) -> Picture:
        """The same where its class stands above: without what a reader knows already."""
        split = self.samples.split_of(place)
        label = [self.labels.text(place)] if self.samples.manifest.task == "multi" else []
        return self._captioned(place, [*label, self.keys[place], *([split] if split != "train" else [])])

    def _captioned(self, place: int, caption: list[str]) -> Picture:
        return Picture(self.content[place], caption, missing=self.reasons.get(place, "cannot be decoded"))


def make_pictures(samples: Samples, places: Sequence[int], workers: int | None = None) -> dict[int, bytes]:
    """A small upright JPEG of each of the `places` (ascending); no bytes for an image that cannot be decoded."""
    if not places:
        return {}
    jobs = (places[first : first + PICTURES_A_JOB] for first in range(0, len(places), PICTURES_A_JOB))
    pictures: dict[int, bytes] = {}

    def draw(places: Sequence[int]) -> dict[int, bytes]:
        return {place: draw_small(encoded, samples.background) for place, encoded in samples.read(places)}

    with progress("pictures", len(places)) as show:
        for piece in run_parallel(draw, jobs, workers):
            pictures.update(piece)
            show(len(pictures))
    return pictures


def draw_small(encoded: bytes, background: tuple[int, int, int]) -> bytes:
    """The image as a JPEG of at most SIDE pixels a side; a tiny one is enlarged by a whole factor, pixels kept apart."""
    try:
        image = open_image(encoded, background)
    except DataError:
        return b""
    longest = max(image.size)
    if longest <= SIDE // 2:
        factor = SIDE // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif longest > SIDE:
        width, height = (max(1, round(side * SIDE / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


# ---- what is shown of much ----


def classes_shown(inspection: Inspection) -> list[int]:
    """Class numbers, the most frequent first; of many the most and the least frequent half each."""
    counts = np.sum([figures.class_counts for figures in inspection.figures.splits.values()], axis=0)
    order: list[int] = np.argsort(-counts, kind="stable").tolist()
    if len(order) <= CLASSES_SHOWN:
        return order
    return order[: CLASSES_SHOWN // 2] + order[-CLASSES_SHOWN // 2 :]


def draw_samples(inspection: Inspection, number: int, seed: int) -> list[int]:
    """Places of a few random samples of a class, from train or else from the first split that has any."""
    splits = sorted(inspection.samples.indexes, key=lambda split: split != "train")
    for split in splits:
        places = inspection.labels.with_class(number, split)
        if len(places):
            chances = np.random.default_rng([seed, number]).random(len(places))
            return [int(place) for place in np.sort(places[np.argsort(chances, kind="stable")[:SAMPLES_A_CLASS]])]
    return []


def choose_groups(groups: list[CopyGroup]) -> list[CopyGroup]:
    """The most serious groups, but of each kind only a few as long as there are others."""
    seen: dict[tuple[bool, bool, bool], int] = {}
    first: list[CopyGroup] = []
    later: list[CopyGroup] = []
    for group in groups:
        kind = (len(group.splits) > 1, group.labels_differ, group.exact)
        seen[kind] = seen.get(kind, 0) + 1
        (first if seen[kind] <= GROUPS_A_KIND else later).append(group)
    chosen = set(map(id, (first + later)[:GROUPS_SHOWN]))
    return [group for group in groups if id(group) in chosen]


# ---- sections ----


def _overview(inspection: Inspection) -> list[Block]:
    manifest, splits = inspection.samples.manifest, inspection.figures.splits
    figures: dict[str, Cell] = {
        "samples": len(inspection.samples),
        "classes": len(manifest.class_names),
        "labels an image": "several" if manifest.task == "multi" else "one",
        "of image files": format_bytes(sum(entry.num_bytes for entry in splits.values())),
        "groups of copies": len(inspection.duplicates.groups),
        "images that stand out": len(np.unique(np.concatenate(list(inspection.figures.suspicious.values())))),
    }
    columns = ["split", "samples", "share", "shards", "image files", "classes", "imbalance"]
    rows: list[list[Cell]] = [
        [
            split,
            entry.num_samples,
            f"{entry.num_samples / len(inspection.samples):.1%}",
            entry.num_shards,
            format_bytes(entry.num_bytes),
            sum(count > 0 for count in entry.class_counts),
            _three_digits(imbalance(entry.class_counts)),
        ]
        for split, entry in splits.items()
    ]
    explained = "Imbalance: samples of the most frequent class over those of the least frequent that has any."
    return [KeyFigures(figures), Table(columns, rows), Text([explained], faint=True)]


def _three_digits(value: float | None) -> Cell:
    return None if value is None else float(f"{value:.3g}")


def _classes(inspection: Inspection, shown: list[int]) -> list[Block]:
    names, splits = inspection.samples.manifest.class_names, inspection.figures.splits
    values = [[entry.class_counts[number] for entry in splits.values()] for number in shown]
    whole = len(inspection.samples)
    blocks: list[Block] = [BarChart([names[number] for number in shown], list(splits), values, whole=whole)]
    if inspection.samples.manifest.task == "multi":
        blocks.append(Text(["Shares are of all images; one may have several classes, so they need not add up."], faint=True))
    left_out = len(names) - len(shown)
    if left_out:
        half = CLASSES_SHOWN // 2
        text = f"Shown are the {half} most and the {half} least frequent classes; the other {left_out:,} are in inspect.json."
        blocks.append(Text([text], faint=True))
    absent = {split: [names[n] for n, count in enumerate(entry.class_counts) if not count] for split, entry in splits.items()}
    missing = [f"Not in {split}: {enumerate_names(classes, CLASSES_SHOWN)}." for split, classes in absent.items() if classes]
    return [*blocks, Text(missing)] if missing else blocks


def _sizes(inspection: Inspection) -> list[Block]:
    sizes = inspection.figures.sizes
    measures: dict[str, tuple[str, Callable[[float], Cell]]] = {
        "width": ("width (pixels)", int),
        "height": ("height (pixels)", int),
        "aspect": ("width / height", lambda value: f"{value:.2f}"),
        "megapixels": ("megapixels", lambda value: f"{value:.3g}"),
        "file_bytes": ("file size", format_bytes),
    }
    rows: list[list[Cell]] = [
        [title, *(show(sizes.quantiles[name][quantile]) for quantile in QUANTILES)]
        for name, (title, show) in measures.items()
        if sizes.quantiles[name]
    ]
    blocks: list[Block] = [Table(["upright images, all splits", *QUANTILES], rows)]
    blocks += _histogram(sizes.longest_side, "Longest side (pixels)", format_cell)
    blocks += _histogram(sizes.file_bytes, "File size", format_bytes)
    total = sum(sizes.longest_side.counts)
    common: list[list[Cell]] = [
        [f"{width:,} {TIMES} {height:,}", count, f"{count / total:.1%}"] for width, height, count in sizes.common
    ]
    kinds = "1 size" if sizes.num_sizes == 1 else f"{sizes.num_sizes:,} different sizes"
    blocks.append(Table([f"width {TIMES} height", "images", "share"], common, caption=f"Most common of {kinds}"))
    return [*blocks, _formats(inspection.figures.splits)]


def _histogram(bins: Bins, title: str, show_edge: Callable[[float], str]) -> list[Block]:
    if len(bins.counts) < 2:
        return []
    return [Histogram(bins.edges, [""], [bins.counts], title, show_edge)]


def _formats(splits: dict[str, SplitFigures]) -> Block:
    kinds = sorted({kind for entry in splits.values() for kind in entry.stored})
    rows: list[list[Cell]] = [[kind, *(entry.stored.get(kind, 0) for entry in splits.values())] for kind in kinds]
    return Table(["format and colour mode", *splits], rows, caption="As stored in the shards")


def _pixels(inspection: Inspection) -> list[Block]:
    splits = inspection.figures.splits
    columns = ["split", *(f"{figure} {channel}" for figure in ("mean", "std") for channel in ("red", "green", "blue"))]
    rows: list[list[Cell]] = [[split, *(f"{v:.4f}" for v in [*entry.mean, *entry.std])] for split, entry in splits.items()]
    stated = inspection.samples.manifest.image_stats
    rows.append([f"stated for {stated.split}", *(f"{value:.4f}" for value in [*stated.mean, *stated.std])])
    brightness = [entry.brightness for entry in splits.values()]
    return [
        Table(columns, rows),
        Text(
            ["Over all pixels of a split, scaled to 0..1. What dataset.json states normalises the network's input."], faint=True
        ),
        Histogram(BRIGHTNESS_EDGES.tolist(), list(splits), brightness, "Mean brightness of each image (of 255)"),
    ]


def _copies(inspection: Inspection, groups: list[CopyGroup], gallery: Gallery) -> list[Block]:
    duplicates = inspection.duplicates
    explained = Text([f"Same bytes: by sha256. Near copies: {NEAR}. Blank images are left out."], faint=True)
    if not duplicates.groups:
        return [Text(["No image occurs twice."]), explained]
    counts = {f"{one}, also in {other}": both for (one, other), both in count_leaks(inspection.samples, duplicates).items()}
    counts |= {f"{split}, again in {split}": both for split, both in count_repeats(inspection.samples, duplicates).items()}
    rows: list[list[Cell]] = [[name, *both] for name, both in counts.items()]
    number = len(duplicates.groups)
    found = "1 group of copies" if number == 1 else f"{number:,} groups of copies"
    more = f", the most serious {len(groups)} are shown; up to 1,000 are in inspect.json" if number > len(groups) else ""
    shown = [PictureGroup([gallery.picture(place) for place in group.pair], describe_group(group)) for group in groups]
    table = Table(["images of", "same bytes", "near copies only"], rows)
    return [table, explained, Text([f"{found}{more}."]), Pictures(shown, SIDE, beside=True)]


def describe_group(group: CopyGroup) -> str:
    """How the two shown members are alike, and what else is to be known of the group."""
    same = "same bytes" if group.pair_exact else f"near copy: {group.bits} bits, {group.levels:.1f} levels"
    where = " and ".join(group.splits) if len(group.splits) < 3 else "all splits"
    parts = [same, where] + ["labels differ"] * group.labels_differ
    more = len(group.members) - 2
    return " · ".join(parts + [f"{more:,} more"] * (more > 0))


def _suspicious(inspection: Inspection, shown: dict[str, list[int]], gallery: Gallery) -> list[Block]:
    groups = []
    for kind, places in inspection.figures.suspicious.items():
        if len(places):
            more = f", the most extreme {len(shown[kind])} shown" if len(places) > len(shown[kind]) else ""
            title = f"{kind}: {DESCRIPTIONS[kind]} ({len(places):,}{more})"
            groups.append(PictureGroup([gallery.picture(place) for place in shown[kind]], title))
    if groups:
        return [Pictures(groups, SIDE)]
    looked_for = "; ".join(f"{kind}: {description}" for kind, description in DESCRIPTIONS.items())
    return [Text(["None."]), Text([f"Looked for {looked_for}."], faint=True)]


def _samples(inspection: Inspection, drawn: dict[int, list[int]], gallery: Gallery) -> list[Block]:
    left_out = len(inspection.samples.manifest.class_names) - len(drawn)
    half = CLASSES_SHOWN // 2
    notes = [f"Up to {SAMPLES_A_CLASS} of each class, from train or else from the first split that has any."]
    if left_out:
        notes.append(
            f"Of {left_out + len(drawn):,} classes the {half} most and the {half} least frequent; {left_out:,} are left out."
        )
    note = Text([" ".join(notes)], faint=True)
    return [note, Pictures(list(_class_groups(inspection, drawn, gallery)), SIDE)]


def _class_groups(inspection: Inspection, drawn: dict[int, list[int]], gallery: Gallery) -> Iterator[PictureGroup]:
    for number, places in drawn.items():
        total = sum(entry.class_counts[number] for entry in inspection.figures.splits.values())
        title = f"{inspection.samples.manifest.class_names[number]} ({total:,})"
        yield PictureGroup([gallery.picture_in_class(place) for place in places], title)
