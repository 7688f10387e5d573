"""What a network answered to each sample of a split: which answers are wrong, how surely, and what is taken for what.

During an evaluation each answer lies in whole numbers at its sample's place (see `pack`), so that ranks are added up exactly
and pictures of any kind can be made afterwards, without a second look at the images.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

BITS = 30  # labels in one int32
MOST_CLASSES = 20  # in a picture


@dataclass(frozen=True)
class Answers:
    """The answers to n samples, on the CPU, in the order of the split; those that no longer decode are left out."""

    index: torch.Tensor  # int64 (n,)
    label: torch.Tensor  # int64 (n,), or uint8 (n, K) of several labels an image
    predicted: torch.Tensor  # the same
    confidence: torch.Tensor  # float64 (n,): probability of the answer; of several labels the mean over those that are wrong

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: torch.Tensor) -> "Answers":
        """Some of them: a mask (n,), or places in the order wanted."""
        return Answers(self.index[rows], self.label[rows], self.predicted[rows], self.confidence[rows])

    @property
    def num_wrong(self) -> torch.Tensor:
        """Wrong labels of each sample, int64 (n,)."""
        wrong = self.label != self.predicted
        return wrong.long() if wrong.ndim == 1 else wrong.sum(dim=1)

    @property
    def accuracy(self) -> float:
        """The share of samples with nothing wrong."""
        return float((self.num_wrong == 0).double().mean()) if len(self) else math.nan

    def most_wrong(self, number: int) -> "Answers":
        """The samples with the most wrong labels, of equally many the surest, then the first; at most `number` of them."""
        wrong = self[self.num_wrong > 0]
        by_confidence = wrong.confidence.argsort(descending=True, stable=True)
        by_number = wrong.num_wrong[by_confidence].argsort(descending=True, stable=True)
        return wrong[by_confidence[by_number][:number]]

    def at(self, index: torch.Tensor) -> "Answers":
        """Those to the samples `index`, (m,), as far as there are any."""
        return self[torch.isin(self.index, index)]


@dataclass(frozen=True)
class Confusion:
    """How often samples of one class (row) were taken for another (column): of all classes, or of those most confused."""

    classes: list[int]
    counts: torch.Tensor  # int64 (k, k)


def confusion_of(answers: Answers, num_classes: int, most: int = MOST_CLASSES) -> Confusion:
    """Count what was taken for what, of one label an image. Of more classes than `most`, those of the commonest mistakes."""
    classes = list(range(num_classes)) if num_classes <= most else _most_confused(answers, num_classes, most)
    places = torch.full((num_classes,), -1)
    places[classes] = torch.arange(len(classes))
    rows, columns = places[answers.label], places[answers.predicted]
    is_shown = (rows >= 0) & (columns >= 0)
    cells = rows[is_shown] * len(classes) + columns[is_shown]
    return Confusion(classes, cells.bincount(minlength=len(classes) ** 2).view(len(classes), len(classes)))


def _most_confused(answers: Answers, num_classes: int, most: int) -> list[int]:
    wrong = answers[answers.num_wrong > 0]
    pairs, counts = torch.unique(wrong.label * num_classes + wrong.predicted, return_counts=True)
    chosen: dict[int, None] = {}
    for pair in pairs[counts.argsort(descending=True, stable=True)].tolist():
        chosen |= dict.fromkeys(divmod(pair, num_classes))
        if len(chosen) >= most:
            break
    chosen |= dict.fromkeys(range(most))  # where there are hardly any mistakes
    return sorted(list(chosen)[:most])


# ---- while they are counted ----


def num_words(num_labels: int | None) -> int:
    """Whole numbers that an answer takes: 1 for a class, and for several labels as many as their bits need."""
    return 1 if num_labels is None else -(-num_labels // BITS)


def pack(answers: torch.Tensor) -> torch.Tensor:
    """Answers, int64 (n,) or uint8 (n, K), as int32 (words, n): a class number, or one bit a label."""
    if answers.ndim == 1:
        return answers[None].int()
    number, num_labels = answers.shape
    words = num_words(num_labels)
    bits = functional.pad(answers.int(), (0, words * BITS - num_labels)).view(number, words, BITS)
    return (bits << torch.arange(BITS, device=answers.device)).sum(dim=2).int().T


def unpack(words: torch.Tensor, num_labels: int | None) -> torch.Tensor:
    """What `pack` was given."""
    if num_labels is None:
        return words[0].long()
    bits = words.T[:, :, None] >> torch.arange(BITS, device=words.device) & 1  # (n, words, BITS)
    return bits.flatten(1)[:, :num_labels].to(torch.uint8)
