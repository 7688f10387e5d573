"""The last word of a training: whether the network does on new images what it does on those that it learned from."""

import math
from dataclasses import dataclass
from typing import Literal

Fit = Literal["fine", "overfits", "underfits"]
LARGEST_GAP = 0.05
STANDARD_ERRORS = 2.0
RULE = (
    f"overfits: the gap is above {LARGEST_GAP} and above {STANDARD_ERRORS:g} of its standard errors; underfits: not even on "
    "training images is the accuracy nearer to 1 than to that of always giving the commonest answer; fine: neither"
)


@dataclass(frozen=True)
class Gap:
    """Accuracy on training images as validation sees them (no augmentation, no dropout), and on validation images."""

    verdict: Fit
    gap: float
    train_accuracy: float
    val_accuracy: float
    commonest: float  # accuracy of always giving the commonest answer
    num_samples: tuple[int, int]

    def __str__(self) -> str:
        accuracies = f"{self.train_accuracy:.3f} on training images, {self.val_accuracy:.3f} on validation images"
        return f"gap {self.gap:.3f}: {self.verdict} (accuracy {accuracies})"


def judge_gap(train_accuracy: float, val_accuracy: float, commonest: float, num_samples: tuple[int, int]) -> Gap:
    """Apply RULE to two accuracies, measured on so many samples of train and val."""
    gap = train_accuracy - val_accuracy
    errors = [p * (1 - p) / n for p, n in zip((train_accuracy, val_accuracy), num_samples, strict=True)]
    if gap > LARGEST_GAP and gap > STANDARD_ERRORS * math.sqrt(sum(errors)):
        verdict: Fit = "overfits"
    else:
        verdict = "underfits" if train_accuracy < (1 + commonest) / 2 else "fine"
    return Gap(verdict, gap, train_accuracy, val_accuracy, commonest, num_samples)
