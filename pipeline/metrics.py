"""Exact figures of an evaluation: integer counts, added up over all ranks once, and so the same on any number of ranks.

Nothing is averaged over batches or ranks. Ranking figures (AUROC, average precision) come from histograms of each class's
logit, which is what makes them countable: two samples in one bin count as a tie.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipeline.answers import Answers, num_words, pack, unpack
from pipeline.config import Monitor
from pipeline.errors import DataError, RunError
from pipeline.task import Task

TOP = 5
# Bins of a class's histogram; fewer where thousands of classes would need gigabytes.
MARGIN_BINS = 4096
MARGIN_CELLS = 1 << 23
# Logits within +- this many units share half of the bins.
MARGIN_SCALE = 8.0
CONFIDENCE_BINS = 15
# Confidences are added up as whole parts of this, since the sum of floats depends on their order.
CONFIDENCE_UNITS = 1 << 30


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found; nan is what has no value, such as the recall of a class that the split lacks.

    `accuracy` of several labels an image counts images with all of them right; `label_accuracy` single answers. `macro_f1`,
    `auroc` and `average_precision` are plain means over classes (of yes and no, the last two are those of yes). `ece` is the
    expected calibration error over 15 equal bins of confidence (Guo et al., 2017, arXiv 1706.04599): of the most probable
    class, or, with several labels, of each label's probability.
    """

    num_samples: int  # that were counted: all but the bad ones
    accuracy: float
    loss: float
    recall: list[float]  # of each class
    num_bad: int = 0  # samples that no longer decode
    top5: float = math.nan  # of more than 5 classes
    label_accuracy: float = math.nan  # of several labels an image
    macro_f1: float = math.nan
    auroc: float = math.nan
    average_precision: float = math.nan
    ece: float = math.nan
    classes: tuple[tuple[int, ...], ...] = ()  # of each class: right positives, predicted and true samples, (3, K)
    confidences: tuple[tuple[int, ...], ...] = ()  # of each bin: answers, right ones, units of confidence, (3, bins)

    def per_class(self, class_names: list[str]) -> list[dict[str, Any]]:
        """Support, precision, recall and F1 of each class; nan where there is nothing to divide by."""
        rows = []
        for name, hits, predicted, true in zip(class_names, *self.classes, strict=True):
            precision, recall, f1 = _ratio(hits, predicted), _ratio(hits, true), _ratio(2 * hits, predicted + true)
            rows.append({"class": name, "support": true, "precision": precision, "recall": recall, "f1": f1})
        return rows

    def reliability(self) -> list[dict[str, Any]]:
        """Of each bin of confidence, how many answers it holds, and their mean confidence and accuracy (nan of none)."""
        return [
            {
                "low": number / CONFIDENCE_BINS,
                "high": (number + 1) / CONFIDENCE_BINS,
                "count": count,
                "confidence": _ratio(units / CONFIDENCE_UNITS, count),
                "accuracy": _ratio(right, count),
            }
            for number, (count, right, units) in enumerate(zip(*self.confidences, strict=True))
        ]

    def figures(self) -> dict[str, float]:
        """Every figure of the whole split that has a value, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, float) and not math.isnan(value)}


def direction(monitor: Monitor | str) -> Literal["min", "max"]:
    """Whether less or more of a figure is better."""
    return "min" if monitor in ("val/loss", "val/ece") else "max"


class EvaluationSums:
    """Counts over a split, kept on the device and reduced once."""

    def __init__(self, task: Task, num_samples: int, device: torch.device) -> None:
        self.task = task
        self.num_bins = min(MARGIN_BINS, max(64, MARGIN_CELLS // task.num_classes))
        self.num_curves = 1 if task.kind == "binary" else task.num_classes
        shapes = {
            "classes": (3, task.num_classes),  # right positives, predicted and true samples of each class
            "margins": (2, self.num_curves * self.num_bins),  # histograms of negatives and positives
            "confidences": (3, CONFIDENCE_BINS),  # answers, right ones, sum of confidences
            "scalars": (4,),  # right samples, right in the top 5, bad ones, right labels
        }
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.counts = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        parts = torch.split(self.counts, sizes)
        views = (part.view(shape) for part, shape in zip(parts, shapes.values(), strict=True))
        self.classes, self.margins, self.confidences, self.scalars = views
        self.num_labels = task.num_classes if task.kind == "multi" else None
        # Of each sample: how often it was seen, 1 + its confidence in units (0: no answer), its label, the answer; (rows, N).
        words = num_words(self.num_labels)
        self.samples = torch.zeros(2 + 2 * words, num_samples, dtype=torch.int32, device=device)
        self.seen, self.answered = self.samples[0], self.samples[1]
        self.label_words, self.answer_words = self.samples[2:].chunk(2)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> None:
        """Count a batch: logits (n, num_outputs), labels (n,) or (n, K), weights and indices (n,); weight 0 is left out."""
        real = weights > 0
        logits, labels, indices = logits[real].float(), labels[real], indices[real]
        self.loss += self.task.sample_losses(logits, labels).double().sum()
        self.seen += torch.bincount(indices, minlength=len(self.seen)).to(torch.int32)
        predicted = self.task.predicted(logits)
        self.scalars[0] += self.task.correct(logits, labels).sum().long()
        if self.task.kind == "multi":
            self._add_labels(predicted > 0, labels > 0)
        else:
            self._add_classes(logits, predicted, labels)
        self._add_margins(logits, labels)
        confidence = self._add_confidences(logits, predicted, labels)
        self.answered[indices] = 1 + units_of(confidence).int()
        self.label_words[:, indices], self.answer_words[:, indices] = pack(labels), pack(predicted)

    def _add_classes(self, logits: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor) -> None:
        number = self.task.num_classes
        for row, members in enumerate((labels[predicted == labels], predicted, labels)):
            self.classes[row] += torch.bincount(members, minlength=number)
        if number > TOP:
            top = logits.topk(TOP, dim=1).indices  # (n, 5)
            self.scalars[1] += (top == labels[:, None]).sum()

    def _add_labels(self, predicted: torch.Tensor, labels: torch.Tensor) -> None:
        self.classes += torch.stack([(predicted & labels).sum(dim=0), predicted.sum(dim=0), labels.sum(dim=0)])
        self.scalars[3] += (predicted == labels).sum()

    def _add_margins(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        margins = logits.double()  # (n, curves)
        if self.task.kind == "single":
            # ln p/(1 - p) of each class against the rest; in float32, 1 - p is 0 for a sure network.
            log_p = margins.log_softmax(dim=1)
            margins = log_p - torch.log(-torch.expm1(log_p))
            positive = torch.nn.functional.one_hot(labels, self.num_curves)  # (n, K)
        else:
            positive = labels.view(margins.shape).long()
        margins = margins.nan_to_num(nan=0.0, posinf=1e12, neginf=-1e12)
        # Ranks do not change by a map that only rises, and this one has a bin for a logit of any size.
        place = 0.5 + 0.5 * margins / (margins.abs() + MARGIN_SCALE)  # 0..1
        bins = (place * self.num_bins).long().clamp(0, self.num_bins - 1)
        bins += torch.arange(self.num_curves, device=bins.device) * self.num_bins + positive * self.margins.shape[1]
        self.margins.view(-1).index_add_(0, bins.flatten(), torch.ones_like(bins).flatten())

    def _add_confidences(self, logits: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Fill the bins; return how sure each answer is, (n,)."""
        # In float32 a sigmoid's last bit depends on its place in the batch.
        shown = self.task.probabilities(logits.double())  # (n, K)
        if self.task.kind == "multi":
            confidence, right = shown.flatten(), labels.flatten() > 0
        else:
            confidence, right = shown.amax(dim=1), predicted == labels
        confidence = confidence.nan_to_num(nan=0.0)
        units = units_of(confidence)
        bins = (confidence * CONFIDENCE_BINS).ceil().long().sub(1).clamp(0, CONFIDENCE_BINS - 1)  # (0, 1/15], ...
        for row, amounts in enumerate((torch.ones_like(units), right.long(), units)):
            self.confidences[row].index_add_(0, bins, amounts)
        if self.task.kind != "multi":
            return confidence
        wrong, sure = predicted != labels, torch.maximum(shown, 1 - shown).nan_to_num(nan=0.0)
        return (sure * wrong).sum(dim=1) / wrong.sum(dim=1).clamp(min=1)

    def add_bad(self, indices: torch.Tensor) -> None:
        """Note samples, (n,), that were seen but cannot be decoded."""
        self.seen += torch.bincount(indices, minlength=len(self.seen)).to(torch.int32)
        self.scalars[2] += len(indices)

    def reduce(self) -> Metrics:
        """Add up all ranks. Raises RunError unless each sample of the split was seen exactly once, DataError if all are bad."""
        if dist.is_available() and dist.is_initialized():
            for total in (self.counts, self.samples, self.loss):
                dist.all_reduce(total)
        wrong = int((self.seen != 1).sum())
        if wrong:
            raise RunError(f"{wrong} of {len(self.seen)} samples were not evaluated exactly once; report this as a bug.")
        right, in_top, num_bad, right_labels = self.scalars.tolist()
        num_samples = len(self.seen) - num_bad
        if num_samples == 0:
            raise DataError("no sample of the split can be decoded. Look at the shards with `shardline verify`.")
        hits, predicted, true = self.classes.double().cpu()  # (K,) each
        negatives, positives = self.margins.double().cpu().view(2, self.num_curves, self.num_bins)
        number = self.task.num_classes
        return Metrics(
            num_samples=num_samples,
            accuracy=right / num_samples,
            loss=float(self.loss) / num_samples,
            recall=(hits / true).tolist(),
            num_bad=num_bad,
            top5=in_top / num_samples if self.task.kind == "single" and number > TOP else math.nan,
            label_accuracy=right_labels / (num_samples * number) if self.task.kind == "multi" else math.nan,
            macro_f1=_mean(2 * hits / (predicted + true)),
            auroc=_mean(areas_under_roc(negatives, positives)),
            average_precision=_mean(average_precisions(negatives, positives)),
            ece=calibration_error(self.confidences.double().cpu()),
            classes=tuple(map(tuple, self.classes.tolist())),
            confidences=tuple(map(tuple, self.confidences.tolist())),
        )

    def answers(self) -> Answers:
        """What was answered to each sample: after `reduce` on any rank those of all."""
        samples = self.samples.cpu()
        index = samples[1].nonzero().flatten()  # (n,)
        labels, predicted = (unpack(words, self.num_labels) for words in samples[2:, index].chunk(2))
        return Answers(index, labels, predicted, (samples[1, index] - 1).double() / CONFIDENCE_UNITS)


def units_of(confidence: torch.Tensor) -> torch.Tensor:
    """Confidences as whole numbers."""
    return (confidence * CONFIDENCE_UNITS).round().long()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _mean(values: torch.Tensor) -> float:
    """Mean over the classes that have a value."""
    return float(values[~values.isnan()].mean())


def areas_under_roc(negatives: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Probability that a positive ranks above a negative, ties counting half, (curves,), of histograms (curves, bins).

    nan where there are only positives or only negatives. (Hanley and McNeil, 1982.)
    """
    below = negatives.cumsum(dim=1) - negatives / 2
    return (positives * below).sum(dim=1) / (positives.sum(dim=1) * negatives.sum(dim=1))


def average_precisions(negatives: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Sum over falling thresholds of the gain in recall times the precision, (curves,), of histograms (curves, bins).

    nan where there is no positive. This is scikit-learn's definition, without interpolation.
    """
    hits = positives.flip(1).cumsum(dim=1)
    taken = hits + negatives.flip(1).cumsum(dim=1)
    return (positives.flip(1) * hits / taken.clamp(min=1)).sum(dim=1) / positives.sum(dim=1)


def calibration_error(confidences: torch.Tensor) -> float:
    """Distance of mean confidence and frequency, averaged over answers; of (answers, right ones, units), (3, bins)."""
    answers, right, units = confidences
    return float((right - units / CONFIDENCE_UNITS).abs().sum() / answers.sum())
