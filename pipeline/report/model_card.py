"""RUN/model_card.md: what the model is, how good, what it was not measured on, and how to use it, as Markdown.

Limits are stated from this run's own figures: a class with a dozen test images, a check that was skipped, a baseline that was
not beaten. Names of classes come from anywhere, so they are escaped.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pipeline
from pipeline.comparison import wilson_interval
from pipeline.files import write_bytes
from pipeline.preprocess import PreprocessSpec
from pipeline.pretraining import spec_for
from pipeline.report.precisions import PRECISION_CAPTION, precision_sentences, precision_table
from pipeline.report.run_files import (
    MODEL,
    ClassResult,
    RunFiles,
    accuracy_sentence,
    baseline_accuracies,
    baseline_sentence,
    parity_sentence,
)

CARD = Path("model_card.md")
NUM_WORST = 5
FEW_SAMPLES = 30  # at a recall of 0.9 the interval is 0.2 wide
# A class this far below the mean recall is named among the limits.
RECALL_BELOW = 0.1
MAX_NAMED = 10
LARGE_ECE = 0.05
NONE = "\N{EN DASH}"
KINDS = {
    "single": "names the one class of {number} that an image belongs to",
    "binary": "says which of two classes an image belongs to",
    "multi": "says of each of {number} labels whether an image has it",
}


def write_card(path: Path, files: RunFiles) -> None:
    """Write the card, whole or not at all."""
    write_bytes(path, render_card(files).encode())


def render_card(files: RunFiles) -> str:
    """The whole card."""
    parts = [f"# {_plain(files.config.name)}", _summary(files), _results(files), _precisions(files), _limits(files)]
    parts += [_data(files), _training(files), _use(files), _lineage(files)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(files: RunFiles) -> str:
    number = len(files.manifest.class_names)
    what = KINDS[files.manifest.task].format(number=f"{number:,}")
    start = " It started from pretrained weights." if files.config.model.weights else ""
    result = f"**{accuracy_sentence(files)}**" if files.test else "It has not been evaluated yet."
    licence = files.config.export.license if files.parity else ""
    stated = f" Its licence is {licence}." if licence else ""
    return f"A convolutional network ({_network(files)}) that {what}.{start} {result}{stated}"


def _network(files: RunFiles) -> str:
    model = files.config.model
    return f"{len(model.blocks)} blocks of its own" if model.blocks else f"`{model.name}`"


# ---- how good ----


def _results(files: RunFiles) -> str:
    if not files.test:
        return ""
    test, (low, high) = files.test, files.interval
    rows = [["accuracy", f"{test['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, Wilson)"]]
    words = {"label_accuracy": "accuracy of single labels", "top5": "top-5 accuracy", "macro_f1": "macro F1", "auroc": "AUROC"}
    words |= {"average_precision": "average precision", "loss": "loss", "ece": "expected calibration error (15 bins)"}
    rows += [[word, f"{test[name]:.4f}"] for name, word in words.items() if name in test]
    rows += [[f"baseline: {name}", f"{accuracy:.4f}"] for name, accuracy in baseline_accuracies(test).items()]
    lines = ["## Results", "", _table([f"{test['split']} split", f"{test['num_samples']:,} images"], rows)]
    if baseline_accuracies(test):
        lines += ["", baseline_sentence(test)]
    lines += [f"\n{_plain(comparison['sentence'])}" for comparison in files.against]
    lines += [f"\n{parity_sentence(files)}"] if files.parity else []
    worst = [row for row in files.classes if row.recall is not None][:NUM_WORST]
    if worst:
        heads = ["class", "recall", "95 % interval", f"{test['split']} images", "training images"]
        lines += ["", f"The {len(worst)} classes of lowest recall:", "", _table(heads, [_class_row(row) for row in worst])]
    return "\n".join(lines)


def _class_row(row: ClassResult) -> list[str]:
    assert row.recall is not None
    interval = NONE
    if row.num_samples:
        low, high = wilson_interval(round(row.recall * row.num_samples), row.num_samples)
        interval = f"{low:.3f} to {high:.3f}"
    return [row.name, f"{row.recall:.4f}", interval, _count(row.num_samples), _count(row.num_train)]


def _count(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def _precisions(files: RunFiles) -> str:
    if not files.precisions:
        return ""
    heads, rows = precision_table(files.precisions)
    sentences = [f"- {precision}: {_plain(why)}." for precision, why in precision_sentences(files.precisions).items()]
    where = "A published form lies in `export/PRECISION/`, with its own proof."
    return "\n".join(["## Smaller and faster", "", _table(heads, rows), "", f"{PRECISION_CAPTION}. {where}", "", *sentences])


# ---- what it was not measured on ----


def _limits(files: RunFiles) -> str:
    limits = [*_limits_of_result(files), *_limits_of_classes(files), *_limits_of_checks(files), *_limits_of_run(files)]
    return "\n".join(["## Limits", "", *(f"- {limit}" for limit in limits)])


def _limits_of_result(files: RunFiles) -> list[str]:
    held_out = "It was measured on held-out images of the same data set. Other cameras, places or times may lower its accuracy."
    found = [held_out] if files.test else ["How good it is was not measured: run `shardline evaluate`."]
    if files.manifest.task == "multi":
        found.append("It knows only these labels; each answer is a threshold of 0.5 on that label's probability.")
    else:
        found.append("It always answers with one of its classes, also for an image of none of them.")
    if not files.test:
        return found
    if files.test["split"] == "val":
        found.append("There is no test split: it was measured on the images that chose its best checkpoint, which flatters it.")
    if baseline_accuracies(files.test) and not files.test["baselines"]["beaten"]:
        found.append(f"It is no better than what needs no network. {baseline_sentence(files.test)}")
    ece = files.test.get("ece", 0.0)
    if ece > LARGE_ECE:
        found.append(f"Its probabilities are not frequencies: the calibration error is {ece:.3f}.")
    return found


def _limits_of_classes(files: RunFiles) -> list[str]:
    rows = [row for row in files.classes if row.recall is not None]
    few = [row.name for row in rows if row.num_samples is not None and row.num_samples < FEW_SAMPLES]
    found = []
    if few:
        found.append(
            f"Fewer than {FEW_SAMPLES} {files.test['split']} images, so that their recall is only roughly known: {_names(few)}."
        )
    if rows:
        mean = sum(row.recall or 0.0 for row in rows) / len(rows)
        low = [f"{row.name} ({row.recall:.2f})" for row in rows if (row.recall or 0.0) < mean - RECALL_BELOW]
        if low:
            found.append(f"Recall more than {RECALL_BELOW} below the mean of {mean:.3f}: {_names(low)}.")
    missing = [row.name for row in files.classes if row.recall is None] if files.test else []
    if missing:
        found.append(f"No image of the {files.test['split']} split shows: {_names(missing)}.")
    return found


def _limits_of_checks(files: RunFiles) -> list[str]:
    if not files.verdicts:
        return ["No checks ran before training."]
    return [
        f"The check `{verdict['check']}` was {verdict['verdict']}: {_plain(verdict['why'])}."
        for verdict in files.verdicts
        if verdict["verdict"] != "green" and files.applies(verdict)
    ]


def _limits_of_run(files: RunFiles) -> list[str]:
    found = []
    if files.gap and files.gap["verdict"] != "fine":
        found.append(f"It {files.gap['verdict']}: {_plain(files.gap['summary'])}.")
    if files.bad_samples:
        reasons = "; ".join(
            f"{number:,} of {split}: {_plain(why)}" for (split, why), number in files.bad_samples.most_common(5)
        )
        found.append(f"{files.bad_samples.total():,} images could not be decoded and were left out ({reasons}).")
    if files.test.get("num_bad_samples"):
        found.append(f"{files.test['num_bad_samples']:,} images of the {files.test['split']} split could not be decoded.")
    if files.record.git.get("dirty"):
        found.append("The code had changes that are in no commit, so this commit alone does not make the model again.")
    if files.record.earlier:
        found.append("Its training went on after settings or data had changed; the first part was made with others.")
    return found


# ---- what it is made of ----


def _data(files: RunFiles) -> str:
    manifest = files.manifest
    splits = [[name, f"{split.num_samples:,}"] for name, split in manifest.splits.items() if name not in manifest.streams]
    splits += [[name, f"streamed from {len(shards):,} shards"] for name, shards in manifest.streams.items()]
    number = len(manifest.class_names)
    shown = ", ".join(_plain(name) for name in manifest.class_names[:100])
    more = f" and {number - 100:,} more" if number > 100 else ""
    text = f"`{files.location}`, digest `{manifest.digest}`."
    return "\n".join(["## Data", "", text, "", _table(["split", "images"], splits), "", f"{number:,} classes: {shown}{more}."])


def _training(files: RunFiles) -> str:
    config, record = files.config, files.record
    epochs = f"{config.trainer.max_epochs:,} epoch{'s' if config.trainer.max_epochs > 1 else ''}"
    epochs = f"at most {epochs}" if config.trainer.early_stopping else epochs
    best = record.best
    facts = {
        "network": _network(files).strip("`"),
        "pretrained weights": config.model.weights,
        "steps": f"{record.steps:,} ({epochs}) of {config.data.global_batch_size:,} images" if record.steps else None,
        "processes": str(record.world_size) if record.world_size else None,
        "machine": files.origin.get("hardware"),
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.lr:g}",
        "scheduler": config.scheduler.name,
        "precision": config.trainer.precision,
        "seed": str(config.seed),
        "best checkpoint": f"{best['monitor']} {best['value']:.4f}, the best of all validations" if best else None,
    }
    rows = [[name, value] for name, value in facts.items() if value]
    return "\n".join(["## Training", "", _table(["", ""], rows), "", "Every setting is in `config.yaml` beside this card."])


def _lineage(files: RunFiles) -> str:
    record = files.record
    dirty = " and uncommitted changes" if record.git.get("dirty") else ""
    digests = {
        "data set": record.data_digest,
        "pretrained weights": record.weights_sha256,
        "preprocessing": record.preprocess_hash,
        f"git commit{dirty}": record.git.get("commit"),
        "job": record.job_id,
        "MLflow run": files.mlflow["run_id"],
        "checkpoint": (record.best or {}).get("sha256"),
        "ONNX file": files.parity.get("sha256"),
    }
    kept = [[name, f"`{digest}`"] for name, digest in digests.items() if digest]
    made = f"Made by Shardline {pipeline.__version__}. The ONNX file carries these in its metadata."
    return "\n".join(["## Lineage", "", _table(["", "sha256 or name"], kept, escaped=False), "", made])


# ---- how to use it ----


def _use(files: RunFiles) -> str:
    if not files.parity:
        return ""
    spec = spec_for(files.config, files.manifest)
    command = f"shardline predict {files.config.run_dir / MODEL} IMAGE..."
    return "\n".join(
        [
            "## How to use it",
            "",
            "With Shardline (its base installation has no torch):",
            "",
            f"```sh\n{command}\n```",
            "",
            "With onnxruntime, numpy and Pillow alone, in the folder of this card:",
            "",
            f"```python\n{snippet(spec, is_multi=files.manifest.task == 'multi')}\n```",
            "",
            "(`shardline predict` also lays transparent images on a background, scales 16-bit grey ones and pads small ones.)",
            "",
            f'From MLflow{_server(files)}: `mlflow.onnx.load_model("models:/{files.config.registered_model}@champion")`.',
        ]
    )


def _server(files: RunFiles) -> str:
    """Where the model is registered; MLflow would look for it elsewhere."""
    uri = files.mlflow["uri"]
    return f", with `MLFLOW_TRACKING_URI={uri}` and once it is promoted" if uri else ", once it is promoted"


def snippet(spec: PreprocessSpec, *, is_multi: bool) -> str:
    """A Python script that classifies `image.jpg` with `export/model.onnx`, knowing nothing of Shardline."""
    assert spec.fixed_size is not None
    height, width = spec.fixed_size
    answer = 'print(class_names[probabilities[0].argmax()], f"{probabilities[0].max():.4f}")'
    if is_multi:
        answer = "print([name for name, probability in zip(class_names, probabilities[0]) if probability >= 0.5])"
    lines = [
        "import json",
        "",
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image, ImageOps",
        "",
        f'session = onnxruntime.InferenceSession("{MODEL}")',
        'class_names = json.loads(session.get_modelmeta().custom_metadata_map["shardline.class_names"])',
        'image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")',
        *_resize_lines(spec),
        *_crop_lines(spec),
        f"batch = np.asarray(image).transpose(2, 0, 1)[None]  # uint8 (1, 3, {height}, {width}); the model normalises",
        '(probabilities,) = session.run(["probabilities"], {"image": np.ascontiguousarray(batch)})',
        answer,
    ]
    return "\n".join(lines)


def _resize_lines(spec: PreprocessSpec) -> list[str]:
    if spec.resize is None:
        return []
    kind = f"Image.Resampling.{spec.interpolation.upper()}"
    if isinstance(spec.resize, list):
        lines, size = [], f"({spec.resize[1]}, {spec.resize[0]})"
    else:
        whole = "int" if spec.resize_mode == "torchvision" else "round"
        lines = [f"width, height = ({whole}(side * {spec.resize} / min(image.size)) for side in image.size)"]
        size = "(width, height)"
    if spec.antialias or spec.interpolation == "nearest":
        return [*lines, f"image = image.resize({size}, {kind})"]
    return [*lines, f"image = image.transform({size}, Image.Transform.EXTENT, (0, 0, *image.size), {kind})"]


def _crop_lines(spec: PreprocessSpec) -> list[str]:
    if spec.crop is None:
        return []
    height, width = spec.crop
    half = "round(({}) / 2)" if spec.resize_mode == "torchvision" else "({}) // 2"
    left, top = half.format(f"image.width - {width}"), half.format(f"image.height - {height}")
    return [f"left, top = {left}, {top}", f"image = image.crop((left, top, left + {width}, top + {height}))"]


# ---- Markdown ----


def _plain(text: str) -> str:
    """Any string as text of Markdown: nothing in it is markup or an entity, and it stays on its line."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(text.split())).encode(errors="backslashreplace").decode()


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(_plain(name) for name in names[:MAX_NAMED])
    return f"{shown} and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else shown


def _table(heads: Sequence[str], rows: Sequence[Sequence[str | None]], *, escaped: bool = True) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    cells = (["" if cell is None else _plain(cell) if escaped and cell != "---" else cell for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
