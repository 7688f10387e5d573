"""What is asked of the network: one label of several, one of two by a single output, or any number of labels an image.

Losses are of logits: softmax and sigmoid are already inside, and probabilities are only for people and exports.

How losses are weighted and averaged, in this one place. A sample's loss is multiplied by the weight of its class (or of its
positive outputs) and by its weight in the batch; the loss of a step is the sum over the global batch divided by the *number* of
samples G, never by the sum of their class weights, which is another number on each rank. So each rank divides by its own n, DDP
takes the mean over ranks, and the step is the same on any number of them. `balanced` class weights have the mean 1 over an
epoch, so that a learning rate means the same with and without them. The loss of an evaluation is this same loss.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from pipeline.config import Config, LossConfig
from pipeline.errors import ConfigError
from pipeline.manifest import DatasetManifest, counts_per_epoch
from pipeline.manifest import Task as Kind

# A class that an epoch never shows still gets a finite bias and loss.
LEAST_SHARE = 1e-6
LABEL_SEPARATOR = "|"


@dataclass(frozen=True)
class Task:
    """The task of a run, with its loss. `shares` says how often an epoch shows each class, by the number of samples."""

    kind: Kind
    shares: tuple[float, ...]  # (K,)
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None  # (K,), of cross-entropy
    pos_weight: tuple[float, ...] | None = None  # (num_outputs,), of binary cross-entropy

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.shares)

    @property
    def num_outputs(self) -> int:
        """Logits of an image: 1 for yes and no, else K."""
        return 1 if self.kind == "binary" else self.num_classes

    # ---- the loss ----

    def sample_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each sample in nats, (n,), of logits (n, num_outputs) and labels int64 (n,), or uint8 (n, K) for several.

        One label: (1 - s) c_y (-ln p_y) + s/K sum_k c_k (-ln p_k), with smoothing s and class weights c (Szegedy et al., 2016,
        arXiv 1512.00567, weighted as torch does). Else the mean over outputs of -w t ln p - (1 - t) ln(1 - p), where a target t
        is moved from 0 or 1 to s/2 or 1 - s/2 and w weighs positives.
        """
        logits = logits.float()
        if self.kind == "single":
            weight = _on_device(self.class_weights, logits.device)
            return functional.cross_entropy(
                logits, labels, weight=weight, reduction="none", label_smoothing=self.label_smoothing
            )
        hot = (labels[:, None] if self.kind == "binary" else labels).float()  # (n, num_outputs)
        targets = hot * (1 - self.label_smoothing) + self.label_smoothing / 2
        weight = _on_device(self.pos_weight, logits.device)
        losses = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
        return losses.mean(dim=1)

    def loss_at_initialisation(self, *, from_prior: bool = False) -> float:
        """Expected loss over an epoch, in nats, of a network that knows nothing of the image.

        It answers q: 1/K for each of K classes and 1/2 for each output, or, `from_prior`, the shares r of the classes, where
        the last bias was set from them. One label: sum_k [(1 - s) r_k + s/K] c_k (-ln q_k), which is ln K without weights (with
        s or without), and the entropy of r from the prior. Else the mean over outputs k of
        -w_k t_k ln q_k - (1 - t_k) ln(1 - q_k) with t_k = (1 - s) r_k + s/2, which is ln 2 without weights.
        (Karpathy, "A Recipe for Training Neural Networks".)
        """
        smoothing = self.label_smoothing
        if self.kind == "single":
            shares = np.asarray(self.shares)
            guess = np.asarray(self.prior) if from_prior else np.full(self.num_classes, 1 / self.num_classes)
            weights = np.ones(self.num_classes) if self.class_weights is None else np.asarray(self.class_weights)
            targets = (1 - smoothing) * shares + smoothing / self.num_classes  # (K,)
            return float((targets * weights * -np.log(guess)).sum())
        shares = np.asarray(self.shares[-self.num_outputs :])
        guess = np.asarray(self.prior[-self.num_outputs :]) if from_prior else np.full(self.num_outputs, 0.5)
        weights = np.ones(self.num_outputs) if self.pos_weight is None else np.asarray(self.pos_weight)
        targets = (1 - smoothing) * shares + smoothing / 2  # (num_outputs,)
        return float((-weights * targets * np.log(guess) - (1 - targets) * np.log1p(-guess)).mean())

    @property
    def prior(self) -> tuple[float, ...]:
        """What a last bias may be set from: the share of each class, (K,), kept off 0 and 1; of one label they sum to 1.

        The bias is ln r before a softmax, and ln r/(1 - r) before a sigmoid, for yes and no that of yes.
        """
        kept = np.clip(self.shares, LEAST_SHARE, 1 - LEAST_SHARE)
        return tuple((kept / kept.sum() if self.kind != "multi" else kept).tolist())

    # ---- the answers ----

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probability of each class, (n, K): by softmax, or of each label for itself by sigmoid (yes and no sum to 1)."""
        if self.kind == "single":
            return logits.softmax(dim=1)
        positive = logits.sigmoid()
        return torch.cat([1 - positive, positive], dim=1) if self.kind == "binary" else positive

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """The answer: the most probable class int64 (n,), or uint8 (n, K), 1 for every label of probability 0.5 or more.

        It is read off the probabilities, as whoever has only the exported model does.
        """
        if self.kind == "single":
            return logits.argmax(dim=1)
        shown = self.probabilities(logits.float())
        return shown.argmax(dim=1) if self.kind == "binary" else (shown >= 0.5).to(torch.uint8)

    def correct(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """1.0 where the answer is right, of several labels in every one of them; float32 (n,)."""
        same = self.predicted(logits) == labels
        return (same.all(dim=1) if self.kind == "multi" else same).float()


@functools.lru_cache(maxsize=16)
def _on_device(values: tuple[float, ...] | None, device: torch.device) -> torch.Tensor | None:
    # Made during a validation it would be an inference tensor, which a later training step cannot use.
    with torch.inference_mode(False):
        return None if values is None else torch.tensor(values, device=device)


def label_text(label: torch.Tensor, class_names: Sequence[str]) -> str:
    """A label, or answer, in words: a class number (), or the `a|b` of a row of labels (K,), which may be none."""
    if label.ndim == 0:
        return class_names[int(label)]
    return LABEL_SEPARATOR.join(class_names[number] for number in label.nonzero().flatten().tolist())


# ---- from a data set and a configuration ----


def task_of(manifest: DatasetManifest, config: Config) -> Task:
    """The task of training on this data set with this configuration. Raises ConfigError where the two do not fit."""
    kind = _kind_of(manifest, config.loss.name)
    _require_belonging(kind, config.loss)
    if config.data.balance_classes:
        _require_balanceable(manifest, config.loss)
    names = manifest.class_names
    outputs = names[1:] if kind == "binary" else names
    class_weights, pos_weight = config.loss.class_weights, config.loss.pos_weight
    if class_weights == "balanced":
        counts, total = _require_counts(manifest, "class_weights")
        class_weights = [total / (len(names) * count) for count in counts]
    if pos_weight == "balanced":
        counts, total = _require_counts(manifest, "pos_weight")
        pos_weight = [(total - count) / count for count in counts[-len(outputs) :]]
    return Task(
        kind,
        _shares(manifest, kind, is_balanced=config.data.balance_classes),
        config.loss.label_smoothing,
        _weights(class_weights, names, "class_weights"),
        _weights(pos_weight, outputs, "pos_weight"),
    )


def _shares(manifest: DatasetManifest, kind: Kind, *, is_balanced: bool) -> tuple[float, ...]:
    number = len(manifest.class_names)
    if is_balanced or not _is_counted(manifest):  # a stream says nothing of its classes
        return (0.5 if kind == "multi" else 1 / number,) * number
    counts, total = counts_per_epoch(manifest)
    return tuple(count / max(1.0, total) for count in counts)


def _is_counted(manifest: DatasetManifest) -> bool:
    return "train" in manifest.splits and "train" not in manifest.streams


def _require_belonging(kind: Kind, config: LossConfig) -> None:
    if kind == "single" and config.pos_weight is not None:
        raise ConfigError("`loss.pos_weight` belongs to bce, but the loss here is cross_entropy. Use `loss.class_weights`.")
    if kind != "single" and config.class_weights is not None:
        raise ConfigError("`loss.class_weights` belongs to cross_entropy, but the loss here is bce. Use `loss.pos_weight`.")


def _kind_of(manifest: DatasetManifest, loss: str) -> Kind:
    num_classes = len(manifest.class_names)
    if manifest.task == "multi":
        if loss == "cross_entropy":
            raise ConfigError("`loss.name` is cross_entropy, but the images have several labels each. Use `bce`.")
        return "multi"
    if loss == "bce" or (loss == "auto" and manifest.task == "binary"):
        if num_classes != 2:
            raise ConfigError(
                f"`loss.name` is bce, but each image has one label of {num_classes} classes. Use `cross_entropy`, or a table "
                "that gives images several labels."
            )
        return "binary"
    return "single"


def _require_balanceable(manifest: DatasetManifest, config: LossConfig) -> None:
    if manifest.task == "multi":
        raise ConfigError("`data.balance_classes` draws classes, but these images have several each. Use `loss.pos_weight`.")
    if not _is_counted(manifest):
        raise ConfigError("`data.balance_classes` needs an index, but the training shards are streamed. Leave it out.")
    train = manifest.split("train")
    if any(shard.weight != 1.0 for shard in train.shards):
        raise ConfigError("`data.balance_classes` and the weights of `dataset.merge` both say what is drawn. Leave one out.")
    if "balanced" in (config.class_weights, config.pos_weight):
        raise ConfigError("`data.balance_classes` already balances the classes. Leave out the balanced weights of `loss`.")
    for name, count in zip(manifest.class_names, train.class_counts, strict=True):
        if not count:
            raise ConfigError(f"`data.balance_classes` cannot draw '{name}', of which there is no training sample.")


def _require_counts(manifest: DatasetManifest, setting: str) -> tuple[list[float], float]:
    """Counts that balanced weights can be made of, and the number of samples. Raises ConfigError."""
    if not _is_counted(manifest):
        raise ConfigError(f"`loss.{setting}` is balanced, but streamed shards are not counted. Give a list of numbers.")
    counts, total = counts_per_epoch(manifest)
    for name, count in zip(manifest.class_names, counts, strict=True):
        if count <= 0:
            raise ConfigError(f"`loss.{setting}` is balanced, but no training sample has '{name}'. Give a list of numbers.")
        if setting == "pos_weight" and count >= total:
            raise ConfigError(f"`loss.{setting}` is balanced, but every training sample has '{name}'. Give a list of numbers.")
    return counts, total


def _weights(values: list[float] | str | None, names: Sequence[str], setting: str) -> tuple[float, ...] | None:
    if values is None:
        return None
    assert not isinstance(values, str)
    if len(values) != len(names):
        raise ConfigError(f"`loss.{setting}` has {len(values)} numbers for {len(names)} ({', '.join(names[:10])}).")
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ConfigError(f"`loss.{setting}` is {values}; each must be greater than 0.")
    return tuple(float(value) for value in values)
