import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.data.sources import open_source
from pipeline.data.writer import write_dataset
from pipeline.recipe.overfit import check_overfit
from pipeline.recipe.verdict import Subject
from tests.unit.recipe.conftest import ChangeNetwork


@pytest.fixture
def contradictory(subject: Subject, tiny_source: Path, tmp_path: Path) -> Subject:
    """The tiny run on images of which each lies in two classes."""
    source = tmp_path / "contradictory"
    for class_name in ("left", "right"):
        shutil.copytree(tiny_source / "red", source / class_name)
    config = dataclasses.replace(subject.config.dataset, source=str(source))
    return dataclasses.replace(subject, manifest=write_dataset(open_source(config), config, tmp_path / "twice"))


def test_one_batch_is_learned_by_heart_even_where_dropout_would_forbid_it(subject: Subject) -> None:
    model = dataclasses.replace(subject.config.model, dropout=0.95)
    verdict = check_overfit(dataclasses.replace(subject, config=dataclasses.replace(subject.config, model=model)))
    assert (verdict.check, verdict.verdict) == ("overfit", "green"), verdict.why
    assert isinstance(verdict.value, float)
    assert verdict.value < 0.05
    assert verdict.expected == "loss < 0.05 and all of 8 images learned within 300 steps; with dropout on, loss < 0.549"


def test_equal_images_with_different_labels_are_red(contradictory: Subject) -> None:
    data = dataclasses.replace(contradictory.config.data, global_batch_size=24)  # the whole split: both copies are in it
    config = dataclasses.replace(contradictory.config, data=data)
    verdict = check_overfit(dataclasses.replace(contradictory, config=config))
    assert verdict.verdict == "red"
    assert isinstance(verdict.value, float)
    assert verdict.value > 0.05
    assert "equal images with different labels" in verdict.why


def test_a_network_that_cannot_see_the_image_is_red(subject: Subject, change_network: ChangeNetwork) -> None:
    class Blind(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.zeros(image.shape)

    def blind(network: nn.Sequential) -> None:
        network[0] = Blind()

    change_network(blind)
    verdict = check_overfit(subject)
    assert verdict.verdict == "red"
    assert "after 300 steps on the same 8 images the loss is" in verdict.why
