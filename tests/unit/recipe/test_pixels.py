import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.config import DatasetConfig, PreprocessConfig
from pipeline.data.sources import open_source
from pipeline.data.writer import write_dataset
from pipeline.manifest import ImageStats
from pipeline.preprocess import build_spec
from pipeline.recipe.pixels import check_pixels, undo_normalisation
from pipeline.recipe.verdict import Subject
from tests.unit.conftest import SIDE
from tests.unit.recipe.conftest import ChangeNetwork


def normalised(subject: Subject, config: PreprocessConfig, stats: ImageStats | None = None) -> Subject:
    spec = build_spec(config, stats or subject.manifest.image_stats)
    return dataclasses.replace(subject, spec=spec, config=dataclasses.replace(subject.config, preprocess=config))


def test_what_is_normalised_as_declared_is_green(subject: Subject) -> None:
    verdict = check_pixels(subject)
    assert verdict.verdict == "green", verdict.why
    assert isinstance(verdict.value, float)
    assert verdict.value < 1e-3, "float32 against float64"


@pytest.mark.parametrize("preset", ["imagenet", "none"])
def test_a_declared_preset_need_not_fit_the_data(subject: Subject, preset: str) -> None:
    config = PreprocessConfig(resize=[SIDE, SIDE], normalization=preset)  # type: ignore[arg-type]
    verdict = check_pixels(normalised(subject, config))
    assert verdict.verdict == "green", verdict.why


def test_statistics_of_other_data_are_red(subject: Subject) -> None:
    stats = ImageStats("train", [0.1307] * 3, [0.3081] * 3)
    verdict = check_pixels(normalised(subject, PreprocessConfig(resize=[SIDE, SIDE]), stats))
    assert verdict.verdict == "red"
    assert "the declared numbers are not those of these images: red has mean 0.366, not 0.131" in verdict.why


def test_a_deviation_that_is_twice_too_large_is_red(subject: Subject) -> None:
    stats = subject.manifest.image_stats
    wide = dataclasses.replace(stats, std=[2 * std for std in stats.std])
    verdict = check_pixels(normalised(subject, PreprocessConfig(resize=[SIDE, SIDE]), wide))
    assert verdict.verdict == "red"
    assert "red has deviation 0.3" in verdict.why


def test_a_resize_that_smooths_all_contrast_away_is_no_fault(subject: Subject, tmp_path: Path) -> None:
    """The statistics are those of the images as they are stored."""
    draw = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "noise" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(path)
    config = DatasetConfig(source=str(tmp_path / "noise"))
    subject = dataclasses.replace(subject, manifest=write_dataset(open_source(config), config, tmp_path / "shards"))
    verdict = check_pixels(normalised(subject, PreprocessConfig(resize=[4, 4])))
    assert verdict.verdict == "green", verdict.why
    assert "deviation 0." in verdict.why


def test_pixels_that_are_no_numbers_are_red(subject: Subject, change_network: ChangeNetwork) -> None:
    class Nothing(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.float() * float("nan")

    def spoil(network: nn.Sequential) -> None:
        network[0] = Nothing()

    change_network(spoil)
    assert check_pixels(subject).verdict == "red"


def test_the_picture_shows_the_pixels_that_the_network_sees(subject: Subject) -> None:
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)  # (N, 3, H, W)
    normalize = subject.build_network(0)[0]
    shown = undo_normalisation(subject.spec, normalize(images))
    assert np.array_equal(shown, images.permute(0, 2, 3, 1).numpy())
