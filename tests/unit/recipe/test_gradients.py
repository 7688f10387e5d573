import math

import pytest
import torch
from torch import nn

from pipeline.recipe.gradients import check_gradients
from pipeline.recipe.verdict import Subject
from tests.unit.recipe.conftest import ChangeNetwork


def put_first(network: nn.Sequential, module: nn.Module) -> None:
    features = network.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    features.insert(0, module)


def set_head(network: nn.Sequential, value: float) -> None:
    nn.init.constant_(network.get_parameter("classifier.2.weight"), value)


def freeze_head(network: nn.Sequential) -> None:
    network.get_submodule("classifier").requires_grad_(False)


def test_a_sound_network_is_green(subject: Subject) -> None:
    verdict = check_gradients(subject)
    assert (verdict.verdict, verdict.value) == ("green", "8 of 8 parameters"), verdict.why


class Neighbour(nn.Module):
    """Adds a little of the image before it in the batch."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + 1e-4 * features.roll(1, dims=0)


def test_the_least_mixing_of_samples_is_red(subject: Subject, change_network: ChangeNetwork) -> None:
    change_network(lambda network: put_first(network, Neighbour()))
    verdict = check_gradients(subject)
    assert (verdict.verdict, verdict.why) == ("red", "in evaluation, the loss of an image depends on others in its batch")


def test_a_frozen_parameter_is_red_unless_the_configuration_freezes_it(
    subject: Subject, change_network: ChangeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_network(freeze_head)
    verdict = check_gradients(subject)
    assert verdict.why == "classifier.2.weight, classifier.2.bias frozen, which `model.freeze` does not ask for"
    assert (verdict.verdict, verdict.value) == ("red", "6 of 8 parameters")
    monkeypatch.setattr(Subject, "is_frozen", lambda _, name: name.startswith("classifier."))
    verdict = check_gradients(subject)
    assert (verdict.verdict, verdict.value) == ("green", "6 of 6 parameters")


def test_a_parameter_that_is_not_used_is_red(subject: Subject, change_network: ChangeNetwork) -> None:
    class Spare(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(1))

    change_network(lambda network: put_first(network, Spare()))
    assert check_gradients(subject).why == "no gradient reaches features.0.unused"


def test_a_last_layer_of_zeros_is_no_fault(subject: Subject, change_network: ChangeNetwork) -> None:
    """At the first step nothing before it gets a gradient; at the second everything does."""
    change_network(lambda network: set_head(network, 0.0))
    assert check_gradients(subject).verdict == "green"


def test_gradients_that_are_no_numbers_are_red(subject: Subject, change_network: ChangeNetwork) -> None:
    change_network(lambda network: set_head(network, math.nan))
    verdict = check_gradients(subject)
    assert verdict.verdict == "red"
    assert "gradients are no finite numbers" in verdict.why
