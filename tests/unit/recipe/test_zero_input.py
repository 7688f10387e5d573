import dataclasses

import torch
from torch import nn

from pipeline.data.dataset import Batch
from pipeline.recipe.verdict import Subject
from pipeline.recipe.zero_input import check_zero_input
from tests.unit.recipe.conftest import ChangeNetwork


class Blind(nn.Module):
    """Whatever the image, the network is given the same."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.ones(image.shape)


def test_a_network_that_sees_is_green(subject: Subject) -> None:
    verdict = check_zero_input(subject)
    assert verdict.verdict == "green", verdict.why
    assert isinstance(verdict.value, float)
    assert verdict.value > 4


def test_a_blind_network_is_red(subject: Subject, change_network: ChangeNetwork) -> None:
    def blind(network: nn.Sequential) -> None:
        network[0] = Blind()

    change_network(blind)
    verdict = check_zero_input(subject)
    assert verdict.verdict == "red"
    assert "learns nothing from what it sees" in verdict.why
    assert verdict.value == 0


def test_equal_labels_say_nothing(subject: Subject) -> None:
    @dataclasses.dataclass(frozen=True)
    class OneClass(Subject):
        def first_batch(self, *, augmented: bool, size: int | None = None) -> Batch:
            batch = super().first_batch(augmented=augmented, size=size)
            batch["label"] = batch["label"] * 0
            return batch

    verdict = check_zero_input(OneClass(subject.config, subject.manifest, subject.spec, subject.device))
    assert (verdict.verdict, verdict.why) == ("skipped", "all labels of the first batch are the same")
