"""Images as people have them: nested folders, every format, other files, tiny classes, broken images; no hand-work."""

import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.manifest import load_dataset
from tests.processes import shardline

NUMBER = {
    "animals/cat": 340,
    "animals/dog": 310,
    "things/old/radio set": 220,
    "Ömür/çiçek": 110,
    "animals/newt": 2,
    "things/one": 1,
}


def save(pixels: npt.NDArray[np.uint8], stem: Path, kind: int) -> None:
    """One image in the kind-th way of being stored."""
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 1 + kind % 8
    transparent = image.convert("RGBA")
    transparent.putalpha(100)
    ways = [
        lambda: image.save(f"{stem}.jpg"),
        lambda: image.save(f"{stem}.JPEG", exif=exif, progressive=True),
        lambda: image.convert("CMYK").save(f"{stem}.jpg"),
        lambda: image.convert("L").save(f"{stem}.jpeg"),
        lambda: image.convert("P").save(f"{stem}.png"),
        lambda: transparent.save(f"{stem}.PNG"),
        lambda: transparent.save(f"{stem}.webp"),
        lambda: Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(f"{stem}.png"),
        lambda: image.save(f"{stem}.gif"),
        lambda: image.save(f"{stem}.bmp"),
        lambda: image.save(f"{stem}.tiff"),
    ]
    ways[kind % len(ways)]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `images` with 983 images, files of other kinds, two broken images and a copy."""
    here = tmp_path_factory.mktemp("messy")
    kind = 0
    for number, (name, count) in enumerate(NUMBER.items()):
        (here / "images" / name).mkdir(parents=True)
        for place in range(count):
            draw = np.random.default_rng((number, place))
            height, width = draw.integers(30, 150, 2)
            colour = np.random.default_rng(number).integers(40, 216, 3)
            pixels = np.clip(colour + draw.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
            save(pixels, here / "images" / name / f"img {place}", kind)
            kind += 1
        (here / "images" / name / "Thumbs.db").write_bytes(b"x")
    (here / "images/animals/dog/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    (here / "images/animals/dog/empty.png").write_bytes(b"")
    original = here / "images/animals/cat/img 0.jpg"
    (here / "images/animals/cat/copy.jpg").write_bytes(original.read_bytes())
    return here


def test_messy_images_go_through_without_hand_work(folder: Path) -> None:
    settings = ["--config=folder", "--name=messy", "--dataset.source=images"]
    done = shardline("shard", *settings, "--max-rejected=0.05", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "6 files: no images of a known kind" in done.stdout
    assert re.search(r"2 classes have too few images for every split: (newt|one), (newt|one)", done.stdout)
    rejected = [json.loads(line)["path"] for line in (folder / "data/messy/rejected.jsonl").read_text().splitlines()]
    assert rejected == ["animals/dog/broken.jpg", "animals/dog/empty.png"]
    manifest = load_dataset(folder / "data/messy")
    assert manifest.class_names == ["cat", "dog", "newt", "one", "radio set", "çiçek"]
    assert sum(split.num_samples for split in manifest.splits.values()) == 984
    assert all(count >= 1 for count in manifest.split("train").class_counts)

    done = shardline("inspect", "data/messy", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "repeats others of" in done.stdout  # the copy lies in the split of its original
    assert (folder / "data/messy/inspect.html").stat().st_size < 10e6

    settings += ["--dataset.max_rejected=0.05", "--data.num_workers=0", "--trainer.max_epochs=1"]
    settings += ["--preprocess.resize=40", "--preprocess.crop=[32,32]", "--model.channels=[16,32]"]
    for verb in ("check", "train"):
        done = shardline(verb, *settings, cwd=folder)
        assert done.returncode == 0, f"{verb}: {done.stderr}"


def test_too_many_broken_images_are_refused_and_kept_apart(folder: Path) -> None:
    done = shardline("shard", "--name=strict", "--dataset.source=images", "--max-rejected=0.001", cwd=folder)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "2 of 986" in line
    assert not (folder / "data/strict/dataset.json").exists()
