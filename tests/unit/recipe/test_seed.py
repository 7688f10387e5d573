import dataclasses
import os

import pytest
import torch
from torch import nn

from pipeline.config import AugmentConfig
from pipeline.recipe import verdict as verdict_module
from pipeline.recipe.seed import check_seed
from pipeline.recipe.verdict import Subject
from tests.unit.recipe.conftest import ChangeNetwork


def test_a_seeded_training_is_green_with_dropout_and_augmentation(subject: Subject) -> None:
    data = dataclasses.replace(subject.config.data, augment=AugmentConfig(rotate_degrees=10, horizontal_flip=0.5))
    model = dataclasses.replace(subject.config.model, dropout=0.5)
    config = dataclasses.replace(subject.config, data=data, model=model)
    verdict = check_seed(dataclasses.replace(subject, config=config))
    assert (verdict.check, verdict.verdict) == ("seed", "green"), verdict.why
    assert verdict.expected == "equal weights for equal seeds, others for another seed"


def test_unseeded_weights_are_red(subject: Subject, change_network: ChangeNetwork) -> None:
    def disturb(network: nn.Sequential) -> None:
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
        with torch.no_grad():
            bias = network.get_parameter("classifier.2.bias")
            bias.add_(torch.randn(bias.shape, generator=generator))

    change_network(disturb)
    verdict = check_seed(subject)
    assert verdict.verdict == "red"
    assert "two trainings of 3 steps with seed 1999 ended with different weights; something is not seeded" in verdict.why


def test_unseeded_augmentation_is_red(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(images: torch.Tensor, seeds: object) -> torch.Tensor:
        return images ^ int.from_bytes(os.urandom(1), "little")

    monkeypatch.setattr(verdict_module, "build_pixel_changes", lambda *_: noisy)
    assert check_seed(subject).verdict == "red"


def test_a_seed_that_changes_nothing_is_red(subject: Subject, change_network: ChangeNetwork) -> None:
    def forget(network: nn.Sequential) -> None:
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)

    change_network(forget)
    verdict = check_seed(subject)
    assert verdict.verdict == "red"
    assert "seeds 1999 and 2000 ended with the same weights; the seed is not used" in verdict.why
