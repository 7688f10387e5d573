"""RUN/report.html: a run for whoever judges it. The result comes first, then what it rests on, then where it comes from.

It is made of the run's folder alone, so it can be made again at any time, and says nothing of what has not happened yet.
"""

import math
import operator
import re
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config import Config, settings_of
from pipeline.manifest import DatasetManifest
from pipeline.report.against import SIGNIFICANT
from pipeline.report.charts import BarChart, CurveChart
from pipeline.report.html import (
    Block,
    Cell,
    Finding,
    Findings,
    KeyFigures,
    LargePicture,
    Level,
    Picture,
    PictureGroup,
    Pictures,
    Section,
    Table,
    Text,
    write_page,
)
from pipeline.report.model_card import CARD, write_card
from pipeline.report.precisions import PRECISION_CAPTION, precision_table
from pipeline.report.run_files import (
    EVALUATION,
    MISTAKES,
    WATCHED,
    RunFiles,
    accuracy_sentence,
    baseline_accuracies,
    baseline_sentence,
    parity_sentence,
)
from pipeline.run import RunRecord
from pipeline.tracking.run import RunTracker
from pipeline.tracking.server import without_credentials

PAGE = Path("report.html")
OTHER_FIGURES = {
    "loss": "loss",
    "top5": "top-5 accuracy",
    "label_accuracy": "accuracy of single labels",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "ece": "calibration error",
}
CURVES = {
    "Loss": ("train/loss", "val/loss"),
    "Accuracy": ("train/accuracy", "val/accuracy"),
    "Learning rate": ("train/learning_rate",),
}
MAX_CLASSES, MAX_BARS, MAX_THUMBNAILS = 50, 30, 48
VERDICT_LEVELS: dict[str, Level] = {"green": "good", "red": "problem", "skipped": "look"}


def write_report(config: Config, manifest: DatasetManifest, record: RunRecord, tracker: RunTracker) -> None:
    """Write RUN/report.html and RUN/model_card.md of what the run's folder holds now, and keep both as artifacts."""
    files = RunFiles.read(config, manifest, record)
    what = f"{len(manifest.class_names)} classes, {files.location}, data {manifest.digest[:12]}, job {record.job_id[:12]}"
    write_page(config.run_dir / PAGE, f"Run {config.name}", build_sections(files), f"{what}, Shardline {pipeline.__version__}")
    write_card(config.run_dir / CARD, files)
    for path in (PAGE, CARD):
        tracker.log_file(config.run_dir / path)


def build_sections(files: RunFiles) -> list[Section]:
    """All sections that have something to show."""
    sections = [
        Section("Result", _result(files)),
        Section("Training", _training(files)),
        Section("Classes", _classes(files)),
        Section("Confusion", _large(files, EVALUATION / "confusion_matrix.png", "What was taken for what")),
        Section("Reliability", _reliability(files)),
        Section("Mistakes", _mistakes(files)),
        Section("Smaller and faster", _precisions(files)),
        Section("Checks before training", _checks(files)),
        Section("Data set", _data(files)),
        Section("Settings", _settings(files.config)),
        Section("Where it comes from", _provenance(files)),
        Section("Beside other runs", _comparisons(files)),
    ]
    return [section for section in sections if section.blocks]


# ---- the result ----


def _result(files: RunFiles) -> list[Block]:
    blocks: list[Block] = []
    if files.test:
        low, high = files.interval
        figures: dict[str, Cell] = {"accuracy": f"{files.test['accuracy']:.4f}", "95 % interval": f"{low:.3f} to {high:.3f}"}
        others = {words: f"{files.test[name]:.4f}" for name, words in OTHER_FIGURES.items() if name in files.test}
        blocks.append(KeyFigures({**figures, "images": files.test["num_samples"], **others}))
    findings = _findings(files)
    blocks += [Findings(findings)] if findings else []
    accuracies = baseline_accuracies(files.test)
    if accuracies:
        rows: list[list[Cell]] = [[f"this network ({files.config.model.name})", f"{files.test['accuracy']:.4f}"]]
        rows += [[name, f"{accuracy:.4f}"] for name, accuracy in accuracies.items()]
        blocks.append(Table(["accuracy of", files.test["split"]], rows))
    return blocks


def _findings(files: RunFiles) -> list[Finding]:
    """What a reviewer should know, the most important first."""
    findings = []
    if files.test:
        findings.append(Finding("note", accuracy_sentence(files)))
    if baseline_accuracies(files.test):
        findings.append(Finding("good" if files.test["baselines"]["beaten"] else "problem", baseline_sentence(files.test)))
    findings += [Finding(_level_of(comparison), comparison["sentence"]) for comparison in files.against]
    if files.parity:
        findings.append(Finding("good", parity_sentence(files)))
    if files.refused:
        reason = files.refused.get("reason", "its answers were not those of the network")
        findings.append(Finding("problem", f"The last export was refused: {str(reason).rstrip('.')}."))
    if files.gap:
        findings.append(Finding("good" if files.gap["verdict"] == "fine" else "look", f"Train/val {files.gap['summary']}."))
    if files.verdicts:
        findings.append(_verdict_of_checks(files))
    if files.bad_samples:
        findings.append(Finding("look", f"{files.bad_samples.total():,} samples could not be decoded in training."))
    return findings


def _level_of(comparison: dict[str, Any]) -> Level:
    if comparison["p_value"] >= SIGNIFICANT:
        return "note"
    return "good" if comparison["difference"] > 0 else "problem"


def _verdict_of_checks(files: RunFiles) -> Finding:
    red = [verdict["check"] for verdict in files.verdicts if verdict["verdict"] == "red"]
    green = sum(verdict["verdict"] == "green" for verdict in files.verdicts)
    text = f"Checks before training: {green} green"
    text += f", red: {', '.join(red)}" if red else ", none red"
    text += f", skipped: {', '.join(files.skipped_checks)}." if files.skipped_checks else "."
    return Finding("problem" if red else "look" if files.skipped_checks else "good", text)


# ---- what it rests on ----


def _training(files: RunFiles) -> list[Block]:
    marks = {}
    step = re.search(r"step-(\d+)", str((files.record.best or {}).get("path")))
    if step:
        marks["best checkpoint"] = float(step[1])
    last = max((step for curve in files.curves.values() for step, _ in curve), default=0.0)
    blocks: list[Block] = []
    for title, keys in CURVES.items():
        series = {key: files.curves[key] for key in keys if _is_drawable(files, key)}
        if series:
            blocks.append(CurveChart(title, "step", last, series, marks))
    if blocks:
        explained = "train/ is one step's batch, augmented, in training mode; val/ the whole validation split."
        blocks.insert(0, Text([explained], faint=True))
    caption = "Probability of the right answer for the same validation images (rows) at each validation (columns, by epoch)."
    return [*blocks, *_large(files, WATCHED, caption)]


def _is_drawable(files: RunFiles, key: str) -> bool:
    return any(math.isfinite(value) for _, value in files.curves.get(key, []))


def _classes(files: RunFiles) -> list[Block]:
    if not files.test.get("recall"):
        return []
    shown = files.classes[:MAX_CLASSES]
    columns = ["class", "recall", "precision", "F1", f"{files.test['split']} images", "train images"]
    rows: list[list[Cell]] = [
        [row.name, _rounded(row.recall), _rounded(row.precision), _rounded(row.f1), row.num_samples, row.num_train]
        for row in shown
    ]
    kept = [place for place in range(len(columns)) if any(row[place] is not None for row in rows)]
    number = len(files.manifest.class_names)
    caption = f"The {MAX_CLASSES} classes of lowest recall, of {number:,}" if number > MAX_CLASSES else "Lowest recall first"
    return [Table([columns[place] for place in kept], [[row[place] for place in kept] for row in rows], caption)]


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _reliability(files: RunFiles) -> list[Block]:
    caption = "Where bars meet the diagonal, answers of that confidence are right that often"
    bins = [entry for entry in files.test.get("reliability") or [] if entry["count"]]
    rows = [[f"{e['confidence']:.3f}", f"{e['accuracy']:.3f}", e["count"]] for e in bins]
    table = [Table(["mean confidence", "right", "answers"], rows, "Each bin of confidence that is not empty")] if rows else []
    return _large(files, EVALUATION / "reliability.png", caption) or [*table]


def _mistakes(files: RunFiles) -> list[Block]:
    paths = {int(path.stem): path for path in (files.config.run_dir / MISTAKES).glob("*.png")}
    answers = files.answers(paths.keys()) if files.test and paths else []
    if not answers:
        return []
    pictures = [
        Picture(
            paths[answer.index].read_bytes(),
            [
                # Between names of a script from right to left the arrow would else point from the answer to the label.
                f"{answer.label or 'none'} \N{LEFT-TO-RIGHT MARK}\N{RIGHTWARDS ARROW} {answer.predicted or 'none'}",
                ", ".join(f"{value:.3f}" for value in answer.confidences),
                answer.key,
            ],
        )
        for answer in answers[:MAX_THUMBNAILS]
    ]
    which = "with the most wrong labels" if files.manifest.task == "multi" else "of which the network was surest"
    text = f"The {len(pictures)} wrong answers {which}: label and answer, the answer's probability, the sample's key."
    return [Text([text], faint=True), Pictures([PictureGroup(pictures)])]


def _large(files: RunFiles, path: Path, caption: str) -> list[Block]:
    content = files.picture(path)
    return [LargePicture(Picture(content, [caption]))] if content else []


def _checks(files: RunFiles) -> list[Block]:
    findings = []
    for verdict in files.verdicts:
        level = VERDICT_LEVELS[verdict["verdict"]] if files.applies(verdict) else "note"
        findings.append(Finding(level, f"{verdict['check']}: {verdict['why']}"))
    return [Findings(findings)] if findings else []


def _precisions(files: RunFiles) -> list[Block]:
    if not files.precisions:
        return []
    heads, rows = precision_table(files.precisions)
    findings = [
        Finding("good" if result["published"] else "look", f"{result['precision']}: {result['why']}")
        for result in files.precisions
        if result["precision"] != "fp32"
    ]
    cells: list[list[Cell]] = [[*row] for row in rows]
    return [Findings(findings), Table(heads, cells, PRECISION_CAPTION)]


# ---- where it comes from ----


def _data(files: RunFiles) -> list[Block]:
    manifest = files.manifest
    splits = {name: split.num_samples for name, split in manifest.splits.items() if name not in manifest.streams}
    kind = {"single": "one label an image", "binary": "one of two labels an image", "multi": "any number of labels an image"}
    text = f"{files.location}: {len(manifest.class_names):,} classes, {kind[manifest.task]}. Digest {manifest.digest}."
    blocks: list[Block] = [KeyFigures(dict(splits)), Text([text])]
    for name, shards in manifest.streams.items():
        blocks.append(Text([f"{name} is streamed from {len(shards):,} shards, which are not counted."]))
    counted = [name for name in splits if files.counts_of(name)]
    if counted and len(manifest.class_names) <= MAX_BARS:
        values = [*zip(*(files.counts_of(name) for name in counted), strict=True)]
        blocks.append(BarChart(manifest.class_names, counted, values))
    if files.bad_samples:
        rows: list[list[Cell]] = [[split, why, number] for (split, why), number in files.bad_samples.most_common(20)]
        blocks.append(Table(["split", "why", "samples"], rows, "Samples that training could not decode"))
    return blocks


def _settings(config: Config) -> list[Block]:
    rows = [[key, _shown(value), _shown(default)] for key, value, default in changed_from_default(config)]
    text = f"The other {sum(1 for _ in settings_of(Config)) - len(rows)} settings have their default; config.yaml has all."
    return [Table(["setting", "value", "default"], rows), Text([text], faint=True)] if rows else [Text([text])]


def changed_from_default(config: Config) -> list[tuple[str, Any, Any]]:
    """Every setting that is not its default: key, value, default."""
    plain = Config()
    found = ((key, operator.attrgetter(key)(config), operator.attrgetter(key)(plain)) for key, _, _ in settings_of(Config))
    return [(key, value, default) for key, value, default in found if value != default]


def _shown(value: Any) -> str:
    return "\N{EN DASH}" if value in (None, "", [], {}) else without_credentials(str(value))


def _provenance(files: RunFiles) -> list[Block]:
    record, best, mlflow = files.record, files.record.best or {}, files.mlflow
    git = record.git.get("commit") or "not from a checkout"
    value = f" ({best['monitor']} {best['value']:.4f})" if best else ""
    facts = {
        "job": record.job_id,
        "outcome": f"{record.outcome} after {record.steps:,} steps" if record.steps else record.outcome,
        "processes": record.world_size,
        "machine": files.origin.get("hardware"),
        "git commit": git + (", with changes that are not committed" if record.git.get("dirty") else ""),
        "versions": files.origin.get("versions"),
        "packages (sha256)": files.origin.get("packages.sha256"),
        "MLflow run": mlflow["run_id"],
        "MLflow": f"experiment {mlflow['experiment']} in {mlflow['uri']}" if mlflow["run_id"] else None,
        "data set (digest)": record.data_digest,
        "pretrained weights (sha256)": record.weights_sha256,
        "preprocessing (hash)": record.preprocess_hash,
        "configuration (digest)": record.config_digest,
        "checkpoint": f"{best['path']}{value}" if best else None,
        "checkpoint (sha256)": best.get("sha256"),
        "ONNX file (sha256)": files.parity.get("sha256"),
        **{f"{stage} finished": entry["finished"] for stage, entry in record.stages.items()},
    }
    return [Table(["", ""], [[name, str(fact)] for name, fact in facts.items() if fact])]


def _comparisons(files: RunFiles) -> list[Block]:
    if not files.against:
        return []
    columns = ["other run", "its accuracy", "difference", "95 % interval", "p", "right here alone", "right there alone"]
    rows = [
        [
            other["run"],
            f"{other['theirs']:.4f}",
            f"{other['difference']:+.4f}",
            f"{other['low']:+.4f} to {other['high']:+.4f}",
            f"{other['p_value']:.2g}",
            other["only_ours"],
            other["only_theirs"],
        ]
        for other in files.against
    ]
    text = "On the very same images, paired: Newcombe's interval of the difference, McNemar's exact test."
    return [Text([text], faint=True), Table(columns, rows)]
