"""Three data sets on which every sabotage is tried, small enough for seconds."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.config import AugmentConfig, Config, DataConfig, DatasetConfig, ModelConfig, PreprocessConfig
from pipeline.data.sources import open_source
from pipeline.data.writer import write_dataset
from pipeline.manifest import DatasetManifest

SIDE = 32
SHAPES = ("circle", "square", "triangle")
SHAPES_A_CLASS = 120
TILE_SIDE = 40


def draw_shapes(folder: Path) -> str:
    """Circles, squares and triangles: colours, place and size are drawn from a seed, only the shape is the label."""
    draw = np.random.default_rng(5)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for number in range(SHAPES_A_CLASS):
            background, colour = (tuple(draw.integers(0, 256, 3).tolist()) for _ in range(2))
            radius = draw.uniform(7, 11)
            x, y = draw.uniform(radius, SIDE - radius, 2)
            picture = Image.new("RGB", (SIDE, SIDE), background)
            _draw(ImageDraw.Draw(picture), shape, (x, y, radius), colour)
            picture.save(folder / shape / f"{number:03d}.png")
    return str(folder)


def _draw(canvas: ImageDraw.ImageDraw, shape: str, place: tuple[float, float, float], colour: tuple[int, ...]) -> None:
    x, y, radius = place
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        side = 0.85 * radius
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    else:
        corners = [(x + radius * math.sin(turn), y - radius * math.cos(turn)) for turn in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        canvas.polygon(corners, fill=colour)


def cut_tiles(folder: Path) -> str:
    """Tiles of scikit-learn's two photographs, the label is the photograph and which half of it."""
    from sklearn.datasets import load_sample_images

    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        pixels: npt.NDArray[np.uint8] = photo
        height, width = pixels.shape[:2]
        for half in ("left", "right"):
            (folder / f"{name}-{half}").mkdir(parents=True)
        for top in range(0, height - TILE_SIDE + 1, TILE_SIDE):
            for left in range(0, width - TILE_SIDE + 1, TILE_SIDE):
                half = "left" if left + TILE_SIDE / 2 < width / 2 else "right"
                tile = Image.fromarray(pixels[top : top + TILE_SIDE, left : left + TILE_SIDE])
                tile.save(folder / f"{name}-{half}" / f"{top:03d}-{left:03d}.png")
    return str(folder)


SOURCES: dict[str, Callable[[Path], str]] = {"digits": lambda _: "digits", "shapes": draw_shapes, "tiles": cut_tiles}


def make_run(name: str, folder: Path) -> tuple[Config, DatasetManifest]:
    """Shards of a data set in `folder`, and a run on them with a small network and cheap settings."""
    dataset = DatasetConfig(source=SOURCES[name](folder / "source"), samples_per_shard=200)
    config = Config(
        name=name,
        runs_dir=str(folder / "runs"),
        dataset=dataclasses.replace(dataset, path=str(folder / "shards")),
        preprocess=PreprocessConfig(resize=[16, 16] if name == "digits" else [SIDE, SIDE]),
        data=DataConfig(global_batch_size=32, augment=AugmentConfig(rotate_degrees=10, translate=0.05)),
        model=ModelConfig(channels=[16, 32, 32], dropout=0.1),
    )
    return config, write_dataset(open_source(dataset), dataset, config.dataset_dir)
