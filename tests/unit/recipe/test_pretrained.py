import dataclasses

import numpy as np
import torch
from torch import nn

from pipeline.recipe import pretrained
from pipeline.recipe.pretrained import check_pretrained
from pipeline.recipe.verdict import Subject


class Noise(nn.Module):
    """Features that have nothing to do with the image."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.rand(features.shape, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Pretrained(Subject):
    """A run whose weights are said to be pretrained; either kind of features can be made worthless."""

    worthless: str = ""

    @property
    def weights(self) -> str:
        return "weights.pth"

    def build_network(self, seed: int) -> nn.Sequential:
        return self._spoilt(super().build_network(seed), "pretrained")

    def build_random_network(self, seed: int) -> nn.Sequential:
        return self._spoilt(super().build_network(seed), "random")

    def _spoilt(self, network: nn.Sequential, kind: str) -> nn.Sequential:
        features = network.get_submodule("features")
        assert isinstance(features, nn.Sequential)
        if kind == self.worthless:
            features.append(Noise())
        return network


def run(subject: Subject, worthless: str) -> Pretrained:
    return Pretrained(subject.config, subject.manifest, subject.spec, subject.device, worthless=worthless)


def test_better_features_than_random_ones_are_green(subject: Subject) -> None:
    verdict = check_pretrained(run(subject, "random"))
    assert verdict.verdict == "green", verdict.why
    assert isinstance(verdict.value, float)
    assert verdict.value >= 2


def test_worse_features_than_random_ones_are_red(subject: Subject) -> None:
    verdict = check_pretrained(run(subject, "pretrained"))
    assert verdict.verdict == "red"
    assert "the weights do not help here" in verdict.why


def test_what_random_features_can_do_as_well_is_not_judged(subject: Subject) -> None:
    verdict = check_pretrained(run(subject, ""))
    assert verdict.verdict == "skipped"
    assert "too easy to tell" in verdict.why


def test_without_weights_nothing_is_claimed(subject: Subject) -> None:
    verdict = check_pretrained(subject)
    assert (verdict.verdict, verdict.why) == ("skipped", "`model.weights` is not set: nothing is claimed to be pretrained")


def test_maps_are_averaged_over_the_image(subject: Subject) -> None:
    network, batch = subject.build_network(0).eval(), subject.first_batch(augmented=False)
    ((features, labels),) = pretrained._features(network, [batch])
    assert features.shape == (8, 16)
    assert np.array_equal(labels, batch["label"].numpy())
