import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig, DatasetConfig
from pipeline.data.samples import Samples
from pipeline.data.writer import write_dataset
from pipeline.manifest import DatasetManifest
from pipeline.recipe import leakage
from pipeline.recipe.leakage import check_leakage, choose
from pipeline.recipe.verdict import Subject
from tests.unit.data.given import Given, GivenImages, picture


def photo(seed: int) -> Image.Image:
    """A smooth random picture, as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """SOURCE/SPLIT/CLASS/NN.jpg: 40 photographs to train on and 10 to validate on."""
    for split, first, number in (("train", 0, 40), ("val", 100, 10)):
        for place in range(number):
            path = tmp_path / "photos" / split / "ab"[place % 2] / f"{place:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(first + place).save(path, quality=90)
    return tmp_path / "photos"


def with_data(subject: Subject, source: Path, folder: Path) -> Subject:
    from pipeline.data.sources import open_source

    config = DatasetConfig(source=str(source))
    return dataclasses.replace(subject, manifest=write_dataset(open_source(config), config, folder))


def test_splits_that_share_nothing_are_green(subject: Subject, photos: Path, tmp_path: Path) -> None:
    verdict = check_leakage(with_data(subject, photos, tmp_path / "shards"))
    assert verdict.verdict == "green", verdict.why
    assert verdict.why == "all 50 images compared: 0 copies across splits, 0 near copies"


def test_a_few_near_copies_are_counted_and_many_are_red(subject: Subject, photos: Path, tmp_path: Path) -> None:
    for number in range(2):
        photo(number).resize((60, 60)).save(photos / "val" / "ab"[number % 2] / f"again-{number}.jpg", quality=60)
    verdict = check_leakage(with_data(subject, photos, tmp_path / "few"))
    assert (verdict.verdict, verdict.value) == ("green", 2.0), verdict.why
    for number in range(2, 4):
        photo(number).resize((60, 60)).save(photos / "val" / "ab"[number % 2] / f"again-{number}.jpg", quality=60)
    verdict = check_leakage(with_data(subject, photos, tmp_path / "many"))
    assert (verdict.verdict, verdict.value) == ("red", 4.0)
    assert "4 of 14 images of val are near copies of images of train" in verdict.why


def many(folder: Path) -> DatasetManifest:
    """300 pictures to train on, 60 to validate on."""
    train = [Given(f"train/{n:03d}.jpg", (n % 2,), "train", picture(f"train {n}" + "-" * (n % 13))) for n in range(300)]
    val = [Given(f"val/{n:03d}.jpg", (n % 2,), "val", picture(f"val {n}" + "-" * (n % 13))) for n in range(60)]
    return write_dataset(GivenImages([*train, *val]), DatasetConfig(source="given"), folder)


def test_of_a_large_data_set_every_file_of_the_same_size_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples.open(many(tmp_path / "shards"), DataConfig())
    everything = choose(samples, seed=0)
    assert everything.hashed.tolist() == list(range(360))
    monkeypatch.setattr(leakage, "MAX_HASHED", 200)
    monkeypatch.setattr(leakage, "MAX_DECODED", 40)
    monkeypatch.setattr(leakage, "HELD_OUT_COMPARED", 5)
    some = choose(samples, seed=0)
    sizes, held_out = samples.sizes(), [place for place in some.hashed.tolist() if samples.split_of(place) == "val"]
    assert 5 <= len(held_out) < 60
    assert len(some.hashed) <= 205
    assert set(some.decoded.tolist()) <= set(some.hashed.tolist())
    assert len(some.decoded) <= 40
    assert set(sizes[some.hashed].tolist()) <= set(sizes[held_out].tolist()), "no file is read that cannot be a copy"


def test_streamed_shards_and_a_single_split_are_not_compared(subject: Subject) -> None:
    streamed = dataclasses.replace(subject.manifest, streams={"train": ["train.tar"]})
    assert "cannot be compared" in check_leakage(dataclasses.replace(subject, manifest=streamed)).why
    alone = dataclasses.replace(subject.manifest, splits={"train": subject.manifest.split("train")})
    verdict = check_leakage(dataclasses.replace(subject, manifest=alone))
    assert (verdict.verdict, verdict.why) == ("skipped", "there is only one split")


def test_a_copy_of_which_the_label_differs_is_shown_in_a_pair(subject: Subject, photos: Path, tmp_path: Path) -> None:
    for number in range(4):
        target = photos / "val" / "ba"[number % 2] / f"again-{number}.jpg"
        shutil.copy(photos / "train" / "ab"[number % 2] / f"{number:02d}.jpg", target)
        with Image.open(target) as image:
            image.save(target, quality=80)
    verdict = check_leakage(with_data(subject, photos, tmp_path / "shards"))
    assert verdict.verdict == "red"
    assert sum(block.to_html().count("<figure>") for block in verdict.blocks) == 8
