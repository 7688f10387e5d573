import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.config import Config, LossConfig
from pipeline.errors import ConfigError
from pipeline.manifest import DatasetManifest, ShardEntry
from pipeline.manifest import Task as Kind
from pipeline.task import Task, label_text, task_of

UNIFORM = Task("single", (0.25,) * 4)


def assert_equal_in_float32(found: torch.Tensor, expected: Any) -> None:
    """Each float32 loss is right to a few parts in 2**23."""
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), rtol=1e-5, atol=1e-6)


def logits_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


# ---- losses ----


def test_cross_entropy_with_smoothing_and_weights_is_the_formula_and_what_torch_computes() -> None:
    task = Task("single", (0.25,) * 4, label_smoothing=0.1, class_weights=(0.5, 1.0, 2.0, 3.0))
    logits, labels = logits_of(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    weights = np.array(task.class_weights)
    log_p = logits.double().log_softmax(dim=1).numpy()  # (n, K)
    expected = 0.9 * weights[labels] * -log_p[range(6), labels] + 0.1 / 4 * (weights * -log_p).sum(axis=1)
    losses = task.sample_losses(logits, labels)
    assert_equal_in_float32(losses, expected)
    torchs = functional.cross_entropy(logits, labels, torch.tensor(task.class_weights), reduction="none", label_smoothing=0.1)
    assert_equal_in_float32(losses, torchs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bce_is_the_mean_over_labels_of_the_formula(smoothing: float) -> None:
    task = Task("multi", (0.5,) * 3, label_smoothing=smoothing, pos_weight=(1.0, 4.0, 0.5))
    logits, labels = logits_of(5, 3), torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.uint8)
    p = logits.double().sigmoid().numpy()
    t = labels.numpy() * (1 - smoothing) + smoothing / 2
    expected = (-np.array(task.pos_weight) * t * np.log(p) - (1 - t) * np.log(1 - p)).mean(axis=1)  # (n,)
    losses = task.sample_losses(logits, labels)
    assert_equal_in_float32(losses, expected)
    if not smoothing:
        criterion = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(task.pos_weight))
        assert_equal_in_float32(losses.mean(), criterion(logits, labels.float()))


def test_yes_and_no_by_one_output_is_cross_entropy_of_two_that_differ_by_it() -> None:
    task, labels = Task("binary", (0.5, 0.5)), torch.tensor([0, 1, 1, 0])
    logits = logits_of(4, 1)
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    expected = functional.cross_entropy(two, labels, reduction="none")
    assert_equal_in_float32(task.sample_losses(logits, labels), expected)
    assert_equal_in_float32(task.probabilities(logits), two.softmax(dim=1))
    assert torch.equal(task.predicted(logits), two.argmax(dim=1))


@pytest.mark.parametrize("kind", ["single", "binary", "multi"])
def test_the_loss_of_half_precision_logits_is_summed_in_float32(kind: Kind) -> None:
    task = Task(kind, (0.5, 0.5))
    logits, labels = torch.tensor([[8.0, 1.0][: task.num_outputs]], dtype=torch.bfloat16), torch.tensor([1])
    if kind == "multi":
        labels = torch.tensor([[1, 0]], dtype=torch.uint8)
    assert task.sample_losses(logits, labels).dtype == torch.float32
    assert torch.equal(task.sample_losses(logits, labels), task.sample_losses(logits.float(), labels))


@pytest.mark.parametrize(
    "task",
    [
        Task("single", (0.25,) * 4, label_smoothing=0.1, class_weights=(0.1, 1.0, 5.0, 9.0)),
        Task("multi", (0.25,) * 4, pos_weight=(0.1, 1.0, 5.0, 9.0)),
    ],
    ids=["cross-entropy", "bce"],
)
def test_the_mean_of_the_ranks_is_the_mean_of_the_global_batch_however_unlike_their_classes(task: Task) -> None:
    logits, labels = logits_of(8, 4), torch.tensor([0, 0, 0, 0, 3, 3, 3, 2])
    if task.kind == "multi":
        labels = functional.one_hot(labels, 4).to(torch.uint8)
    losses = task.sample_losses(logits, labels)
    whole = losses.sum() / 8
    parts = [task.sample_losses(logits[part], labels[part]).sum() / 4 for part in (slice(0, 4), slice(4, 8))]
    assert_equal_in_float32(torch.stack(parts).mean(), whole)
    assert float(whole) != pytest.approx(
        float(functional.cross_entropy(logits, labels.float() if task.kind == "multi" else labels))
    )


def test_weights_first_used_in_a_validation_can_be_used_in_training() -> None:
    task = Task("single", (0.5, 0.5), class_weights=(0.123, 4.567))
    logits, labels = logits_of(3, 2).requires_grad_(), torch.tensor([0, 1, 1])
    with torch.inference_mode():
        task.sample_losses(logits, labels)
    torch.autograd.backward(task.sample_losses(logits, labels).sum())
    assert logits.grad is not None


# ---- the loss of a network that knows nothing ----


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_the_loss_of_uniform_logits_is_ln_k_with_and_without_smoothing(num_classes: int) -> None:
    for smoothing in (0.0, 0.1):
        task = Task("single", (1 / num_classes,) * num_classes, smoothing)
        losses = task.sample_losses(torch.full((5, num_classes), 7.0), torch.arange(5) % num_classes)  # (5,)
        assert_equal_in_float32(losses, math.log(num_classes))
        assert task.loss_at_initialisation() == pytest.approx(math.log(num_classes), rel=1e-12)


def test_the_loss_of_two_classes_is_a_natural_logarithm_and_not_log10() -> None:
    assert Task("single", (0.5, 0.5)).loss_at_initialisation() == pytest.approx(0.693147, rel=1e-6)


def test_each_output_of_bce_starts_at_ln_2_however_many_there_are() -> None:
    for task in (Task("binary", (0.9, 0.1)), Task("multi", (0.1, 0.2, 0.9)), Task("multi", (0.1,) * 80, label_smoothing=0.1)):
        assert task.loss_at_initialisation() == pytest.approx(math.log(2), rel=1e-12)


def test_a_bias_from_the_shares_starts_at_their_entropy() -> None:
    shares = (0.7, 0.2, 0.1)
    entropy = -sum(share * math.log(share) for share in shares)
    assert Task("single", shares).loss_at_initialisation(from_prior=True) == pytest.approx(entropy, rel=1e-9)
    of_two = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert Task("binary", (0.9, 0.1)).loss_at_initialisation(from_prior=True) == pytest.approx(of_two, rel=1e-9)


COUNTS = {"single": (6, 3, 1), "binary": (7, 3), "multi": (9, 5, 1)}  # of 10 samples


def labels_with(kind: Kind, counts: Sequence[int]) -> torch.Tensor:
    """Labels of 10 samples in which class k comes counts[k] times."""
    if kind != "multi":
        return torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    return torch.tensor([[int(row < count) for count in counts] for row in range(10)], dtype=torch.uint8)


@pytest.mark.parametrize("from_prior", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["single", "binary", "multi"])
def test_the_theoretical_loss_is_that_of_the_data_under_an_ignorant_network(
    kind: Kind, weighted: bool, smoothing: float, from_prior: bool
) -> None:
    counts = COUNTS[kind]
    number = 1 if kind == "binary" else len(counts)
    weights = {"class_weights" if kind == "single" else "pos_weight": (0.5, 3.0, 7.0)[:number]} if weighted else {}
    task = Task(kind, tuple(count / 10 for count in counts), smoothing, **weights)
    shares = torch.tensor(task.prior[-number:])
    bias = (shares.log() if kind == "single" else shares.logit()) if from_prior else torch.zeros(number)
    loss = task.sample_losses(bias.expand(10, number), labels_with(kind, counts)).mean()
    assert task.loss_at_initialisation(from_prior=from_prior) == pytest.approx(float(loss), rel=1e-5)  # float32


def test_a_class_that_is_never_shown_leaves_a_finite_bias_and_loss() -> None:
    for task in (Task("single", (1.0, 0.0)), Task("multi", (1.0, 0.0))):
        assert all(0 < share < 1 for share in task.prior)
        assert math.isfinite(task.loss_at_initialisation(from_prior=True))


# ---- answers ----


def test_the_loss_contains_the_softmax_that_people_see() -> None:
    logits, labels = logits_of(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    shown = UNIFORM.probabilities(logits)
    assert_equal_in_float32(UNIFORM.sample_losses(logits, labels), -shown[range(6), labels].log())
    np.testing.assert_allclose(shown.sum(dim=1), 1.0, rtol=0, atol=1e-6)


def test_every_label_of_probability_one_half_or_more_is_predicted_and_all_must_be_right() -> None:
    task = Task("multi", (0.5,) * 3)
    logits = torch.tensor([[0.0, -0.01, 5.0], [-1.0, -2.0, -3.0]])
    assert task.predicted(logits).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert task.correct(logits, torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.uint8)).tolist() == [1.0, 0.0]


def test_an_answer_is_that_of_the_exported_probabilities_even_at_one_half() -> None:
    logits = torch.tensor([[0.0], [1e-9], [-1e-9], [1.0], [-1.0]])  # sigmoid is exactly 1/2 of the first three
    task = Task("binary", (0.5, 0.5))
    assert torch.equal(task.predicted(logits), task.probabilities(logits).argmax(dim=1))
    assert task.correct(logits, torch.tensor([0, 0, 0, 1, 1])).tolist() == [1, 1, 1, 1, 0]


def test_a_label_in_words_is_a_class_or_all_of_a_row() -> None:
    names = ["cat", "dog", "bird"]
    assert label_text(torch.tensor(2), names) == "bird"
    assert label_text(torch.tensor([1, 0, 1], dtype=torch.uint8), names) == "cat|bird"
    assert label_text(torch.tensor([0, 0, 0], dtype=torch.uint8), names) == ""


# ---- from a data set and a configuration ----


def manifest_of(manifest: DatasetManifest, kind: Kind = "single", counts: Sequence[int] = (18, 12, 6)) -> DatasetManifest:
    """The tiny data set as if it had another task and other counts of its 36 training samples."""
    train = dataclasses.replace(manifest.split("train"), class_counts=list(counts))
    names = ["blue", "green", "red"][: len(counts)]
    return dataclasses.replace(manifest, task=kind, class_names=names, splits={**manifest.splits, "train": train})


def config_of(balance: bool = False, **loss: Any) -> Config:
    config = Config()
    return dataclasses.replace(config, loss=LossConfig(**loss), data=dataclasses.replace(config.data, balance_classes=balance))


def test_the_task_follows_from_the_data_set_unless_the_loss_says_otherwise(tiny_dataset: DatasetManifest) -> None:
    two = manifest_of(tiny_dataset, counts=(24, 12))
    assert task_of(manifest_of(tiny_dataset), config_of()) == Task("single", (0.5, 12 / 36, 6 / 36))
    assert task_of(two, config_of()).kind == "single"
    assert (task_of(two, config_of(name="bce")).kind, task_of(two, config_of(name="bce")).num_outputs) == ("binary", 1)
    assert task_of(dataclasses.replace(two, task="binary"), config_of()).kind == "binary"
    assert task_of(manifest_of(tiny_dataset, "multi"), config_of(label_smoothing=0.1)).label_smoothing == 0.1


def test_balanced_class_weights_have_the_mean_1_over_an_epoch(tiny_dataset: DatasetManifest) -> None:
    task = task_of(manifest_of(tiny_dataset), config_of(class_weights="balanced"))
    assert task.class_weights is not None
    np.testing.assert_allclose(task.class_weights, [36 / 3 / 18, 36 / 3 / 12, 36 / 3 / 6])
    assert sum(w * share for w, share in zip(task.class_weights, task.shares, strict=True)) == pytest.approx(1.0)


def test_a_balanced_pos_weight_gives_positives_and_negatives_one_weight(tiny_dataset: DatasetManifest) -> None:
    multi = task_of(manifest_of(tiny_dataset, "multi", (30, 12, 6)), config_of(pos_weight="balanced"))
    assert multi.pos_weight == (6 / 30, 24 / 12, 30 / 6)
    binary = task_of(manifest_of(tiny_dataset, counts=(24, 12)), config_of(name="bce", pos_weight="balanced"))
    assert binary.pos_weight == (2.0,)


def test_balanced_sampling_shows_all_classes_alike(tiny_dataset: DatasetManifest) -> None:
    assert task_of(manifest_of(tiny_dataset), config_of(balance=True)).shares == (1 / 3,) * 3


def test_weights_of_shards_count_in_what_an_epoch_shows(tiny_dataset: DatasetManifest) -> None:
    entry = tiny_dataset.split("train")
    index = np.load(tiny_dataset.folder / entry.index.name)
    shards: list[ShardEntry] = [
        dataclasses.replace(shard, weight=2.0 if n == 0 else 1.0) for n, shard in enumerate(entry.shards)
    ]
    manifest = dataclasses.replace(tiny_dataset, splits={"train": dataclasses.replace(entry, shards=shards)})
    counts = np.bincount(index["label"], minlength=3) + np.bincount(index["label"][index["shard"] == 0], minlength=3)
    np.testing.assert_allclose(task_of(manifest, config_of()).shares, counts / counts.sum())


@pytest.mark.parametrize(
    ("kind", "counts", "settings", "message"),
    [
        ("multi", (9, 9, 9), {"name": "cross_entropy"}, "the images have several labels each. Use `bce`"),
        ("single", (12, 12, 12), {"name": "bce"}, "one label of 3 classes. Use `cross_entropy`"),
        ("single", (12, 12, 12), {"pos_weight": "balanced"}, "`loss.pos_weight` belongs to bce"),
        ("multi", (9, 9, 9), {"class_weights": [1.0, 1.0, 1.0]}, "`loss.class_weights` belongs to cross_entropy"),
        ("single", (12, 12, 12), {"class_weights": [1.0, 2.0]}, "has 2 numbers for 3 (blue, green, red)"),
        ("single", (12, 12, 12), {"class_weights": [1.0, 2.0, 0.0]}, "each must be greater than 0"),
        ("single", (24, 12, 0), {"class_weights": "balanced"}, "no training sample has 'red'"),
        ("multi", (36, 9, 9), {"pos_weight": "balanced"}, "every training sample has 'blue'"),
        ("multi", (9, 9, 9), {"balance": True}, "these images have several each. Use `loss.pos_weight`"),
        ("single", (36, 0), {"balance": True}, "cannot draw 'green', of which there is no training sample"),
        ("single", (24, 12), {"balance": True, "class_weights": "balanced"}, "already balances"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tiny_dataset: DatasetManifest, kind: Kind, counts: tuple[int, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        task_of(manifest_of(tiny_dataset, kind, counts), config_of(**settings))
    assert message in str(refusal.value)


@pytest.mark.parametrize("settings", [{"balance": True}, {"class_weights": "balanced"}])
def test_streamed_shards_cannot_be_balanced_since_nobody_counted_them(
    tiny_dataset: DatasetManifest, settings: dict[str, Any]
) -> None:
    stream = dataclasses.replace(tiny_dataset, streams={"train": ["a.tar"]})
    assert task_of(stream, config_of()).shares == (1 / 3,) * 3
    with pytest.raises(ConfigError, match="streamed"):
        task_of(stream, config_of(**settings))


def test_balanced_sampling_and_weights_of_shards_exclude_each_other(tiny_dataset: DatasetManifest) -> None:
    entry = tiny_dataset.split("train")
    shards = [dataclasses.replace(shard, weight=0.5) for shard in entry.shards]
    manifest = dataclasses.replace(tiny_dataset, splits={"train": dataclasses.replace(entry, shards=shards)})
    with pytest.raises(ConfigError, match="both say what is drawn"):
        task_of(manifest, config_of(balance=True))
