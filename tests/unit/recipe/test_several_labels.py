"""The checks that ask for losses alone hold for several labels an image, too."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from pipeline.data.dataset import Batch
from pipeline.recipe.gradients import check_gradients
from pipeline.recipe.init_loss import check_init_loss
from pipeline.recipe.overfit import check_overfit
from pipeline.recipe.verdict import Subject
from pipeline.recipe.zero_input import check_zero_input


@dataclasses.dataclass(frozen=True)
class SeveralLabels(Subject):
    """The tiny run with its class, and whether the image is bright, as three outputs with a sigmoid each."""

    smoothing: float = 0.0

    def first_batch(self, *, augmented: bool, size: int | None = None) -> Batch:
        batch = super().first_batch(augmented=augmented, size=size)
        labels = functional.one_hot(batch["label"], 3)
        labels[:, 0] |= batch["image"].float().mean(dim=(1, 2, 3)) > 95
        return Batch({**batch, "label": labels.to(torch.uint8)})

    def sample_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = labels.float() * (1 - self.smoothing) + self.smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(dim=1)

    def loss_at_initialisation(self) -> float:
        return math.log(2)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("check", [check_init_loss, check_gradients, check_zero_input, check_overfit])
def test_a_sound_run_is_green_also_with_smoothed_labels(
    subject: Subject,
    check: object,
    smoothing: float,
) -> None:
    several = SeveralLabels(subject.config, subject.manifest, subject.spec, subject.device, smoothing=smoothing)
    verdict = check(several)  # type: ignore[operator]
    assert verdict.verdict == "green", verdict.why


def test_labels_are_named_one_or_several(subject: Subject) -> None:
    assert subject.label_names(torch.tensor(2)) == "red"
    assert subject.label_names(torch.tensor([1, 0, 1], dtype=torch.uint8)) == "blue, red"
    assert subject.label_names(torch.zeros(3, dtype=torch.uint8)) == "none"
