"""What is asked of the network: loss, probabilities and exact metrics for one label an image.

The loss is a cross-entropy over logits, which already contains the softmax; probabilities are only for people and exports.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional

from pipeline.errors import DataError, RunError


def require_supported(task: str) -> None:
    """Refuse a data set whose task cannot be trained. Raises DataError."""
    if task != "single":
        raise DataError(f"the data set's task is `{task}`; only `single` (one label an image) can be trained.")


def sample_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each sample in nats, (N,), of logits (N, K) and labels (N,)."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over classes, (N, K)."""
    return logits.softmax(dim=1)


def loss_at_initialisation(num_classes: int) -> float:
    """Cross-entropy of a network that knows nothing: ln K nats (Karpathy, "A Recipe for Training Neural Networks")."""
    return math.log(num_classes)


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found."""

    num_samples: int  # that were counted: all but the bad ones
    accuracy: float
    loss: float
    recall: list[float]  # of each class; nan where the split has no sample of it
    num_bad: int = 0  # samples that no longer decode


class EvaluationSums:
    """Integer counts and sums over a split, kept on the device and reduced once: the same on any number of ranks."""

    def __init__(self, num_classes: int, num_samples: int, device: torch.device) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # (true, predicted)
        self.seen = torch.zeros(num_samples, dtype=torch.int32, device=device)  # (N,)
        self.num_bad = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> None:
        """Count a batch: logits (n, K), labels, weights and indices (n,); rows of weight 0 are left out."""
        real = weights > 0
        logits, labels, indices = logits[real], labels[real], indices[real]
        self.loss += sample_losses(logits, labels).double().sum()
        cells = labels * len(self.confusion) + logits.argmax(dim=1)
        self.confusion += torch.bincount(cells, minlength=self.confusion.numel()).view_as(self.confusion)
        self.seen += torch.bincount(indices, minlength=len(self.seen)).to(torch.int32)

    def add_bad(self, indices: torch.Tensor) -> None:
        """Note samples, (n,), that were seen but cannot be decoded."""
        self.seen += torch.bincount(indices, minlength=len(self.seen)).to(torch.int32)
        self.num_bad += len(indices)

    def reduce(self) -> Metrics:
        """Add up all ranks. Raises RunError unless each sample of the split was seen exactly once, DataError if all are bad."""
        if dist.is_available() and dist.is_initialized():
            for total in (self.confusion, self.seen, self.loss, self.num_bad):
                dist.all_reduce(total)
        wrong = int((self.seen != 1).sum())
        if wrong:
            raise RunError(f"{wrong} of {len(self.seen)} samples were not evaluated exactly once; report this as a bug.")
        num_samples = len(self.seen) - int(self.num_bad)
        if num_samples == 0:
            raise DataError("no sample of the split can be decoded. Look at the shards with `shardline verify`.")
        correct = self.confusion.diagonal()
        recall = correct.double() / self.confusion.sum(dim=1).double()
        return Metrics(
            num_samples=num_samples,
            accuracy=int(correct.sum()) / num_samples,
            loss=float(self.loss) / num_samples,
            recall=[float(value) for value in recall],
            num_bad=int(self.num_bad),
        )
