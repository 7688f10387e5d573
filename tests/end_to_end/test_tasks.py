"""Several labels an image, and yes or no by a single output: from images to the answers of the exported model."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from tests.processes import LIMIT_SECONDS, shardline

NUM_IMAGES = 120
SIDE = 16
SHAPES = ("bar", "disc", "square")
CONFIG = """
name: tiny
dataset: {keep_format: true}
preprocess: {resize: [16, 16]}
data: {global_batch_size: 12}
model: {channels: [8, 16], norm: group, dropout: 0}
optimizer: {name: AdamW, lr: 0.02}
trainer: {max_epochs: 10}
export: {max_batch_size: 4}
"""


def draw(shapes: set[str], number: int) -> Image.Image:
    """A picture of some of a blue bar, a red disc and a green square."""
    noise: npt.NDArray[np.uint8] = np.random.default_rng(number).integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    pen = ImageDraw.Draw(image)
    if "bar" in shapes:
        pen.rectangle((0, 12, 15, 14), fill=(30, 40, 230))
    if "disc" in shapes:
        pen.ellipse((1, 1, 7, 7), fill=(230, 30, 40))
    if "square" in shapes:
        pen.rectangle((9, 2, 14, 7), fill=(30, 220, 50))
    return image


# Importing Lightning and MLflow anew for every verb would cost a minute: here one process is the only rank of them all.
VERBS = """
import sys
from pipeline.cli import main
for verb in ("train", "evaluate", "export"):
    if main([verb, *sys.argv[1:]]):
        break
    print("done:", verb)
"""


def chain(folder: Path, *settings: str) -> dict[str, Any]:
    """Everything from images to a model, in `folder`; the figures of the evaluation."""
    (folder / "tiny.yaml").write_text(CONFIG)
    arguments = ("--config=tiny.yaml", *settings)
    run("shard", *arguments, cwd=folder)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", VERBS, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert "done: export" in done.stdout, done.stderr + done.stdout
    return dict(json.loads((folder / "runs/tiny/evaluation/test.json").read_text()))


def run(verb: str, *arguments: str, cwd: Path) -> str:
    done = shardline(verb, *arguments, cwd=cwd)
    assert done.returncode == 0, f"{verb}: {done.stderr}{done.stdout}"
    return done.stdout


def predictions(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs/tiny/evaluation/predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def answers(folder: Path, *images: Path) -> list[dict[str, Any]]:
    return list(json.loads(run("predict", "runs/tiny/export/model.onnx", "--json", *map(str, images), cwd=folder)))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of any of three shapes and the table that says which."""
    folder = tmp_path_factory.mktemp("several")
    lines = []
    for number in range(NUM_IMAGES):
        shapes = [shape for place, shape in enumerate(SHAPES) if number % 8 >> place & 1]
        draw(set(shapes), number).save(folder / f"{number:03d}.png")
        lines.append(json.dumps({"path": f"{number:03d}.png", "label": shapes}))
    (folder / "table.jsonl").write_text("\n".join(lines))
    return folder


def test_images_of_several_labels_go_from_the_table_to_the_answers_of_the_model(several: Path) -> None:
    loss = ("--loss.pos_weight=balanced", "--loss.label_smoothing=0.02")
    result = chain(several, "--dataset.source=table.jsonl", "--trainer.monitor=val/macro_f1", *loss)
    rows = predictions(several)
    assert len(rows) == result["num_samples"] == 24
    assert result["accuracy"] == sum(row["label"] == row["predicted"] for row in rows) / 24
    assert result["label_accuracy"] > 0.9
    assert result["auroc"] > 0.95
    assert result["average_precision"] > 0.95
    assert set(result["recall"]) == set(SHAPES)
    record = json.loads((several / "runs/tiny/run.json").read_text())
    assert record["best"]["monitor"] == "val/macro_f1"
    for name in ("report.html", "model_card.md"):
        assert (
            f"{result['accuracy'] * 24:.0f} of 24 images of the test split with every label right"
            in (several / "runs/tiny" / name).read_text()
        )

    shown = {frozenset(): "none.png", frozenset({"bar", "square"}): "two.png"}
    for number, (shapes, name) in enumerate(shown.items()):
        draw(set(shapes), 1000 + number).save(several / name)
    found = answers(several, *(several / name for name in shown.values()))
    for answer in found:
        likely = {name for name, probability in answer["probabilities"].items() if probability >= 0.5}
        assert set(answer["labels"]) == likely
    assert set(found[1]["labels"]) == {"bar", "square"}
    table = run("predict", "runs/tiny/export/model.onnx", str(several / "two.png"), cwd=several)
    assert "bar" in table
    assert "square" in table
    assert "labels an image" in run("verify", "runs/tiny/export/model.onnx", cwd=several)


def test_yes_and_no_by_one_output_goes_from_the_folder_to_the_answers_of_the_model(tmp_path: Path) -> None:
    for name in ("round", "square"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for number in range(NUM_IMAGES):
        name, shape = ("square", "square") if number % 4 == 0 else ("round", "disc")  # 1 to 3
        draw({shape}, number).save(tmp_path / "images" / name / f"{number:03d}.png")
    settings = ("--dataset.source=images", "--loss.name=bce", "--data.balance_classes=true", "--trainer.monitor=val/auroc")
    result = chain(tmp_path, *settings)
    assert result["num_samples"] == 24
    assert result["accuracy"] > 0.9
    assert result["auroc"] > 0.95
    assert set(result["recall"]) == {"round", "square"}

    image = tmp_path / "images/square/000.png"
    (answer,) = answers(tmp_path, image)
    assert answer["label"] == "square"
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0, abs=1e-6)
    metadata = (tmp_path / "runs/tiny/export/model.onnx").read_bytes()
    assert b"binary" in metadata
    replayed = run("replay", "runs/tiny", "--step=2", cwd=tmp_path)
    labels = [line.split()[2] for line in replayed.splitlines() if line.split() and line.split()[0].isdigit()]
    assert sorted(labels) == ["round"] * 6 + ["square"] * 6, "balanced: of twelve in a batch, six of each"
