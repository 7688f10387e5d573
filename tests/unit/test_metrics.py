import math
from typing import Any, get_args
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn import metrics as sklearn
from torch.nn import functional

from pipeline.config import Monitor
from pipeline.errors import DataError, RunError
from pipeline.manifest import Task as Kind
from pipeline.metrics import MARGIN_BINS, EvaluationSums, Metrics, areas_under_roc, average_precisions, direction
from pipeline.task import Task

CPU = torch.device("cpu")
# A curve over 4096 bins instead of over the samples: two of them rank as a tie where a bin holds both.
BINNED = 2e-3


def task_with(kind: Kind, num_classes: int) -> Task:
    return Task(kind, (1 / num_classes,) * num_classes)


def count(sums: EvaluationSums, logits: torch.Tensor, labels: torch.Tensor, rows: list[int]) -> None:
    """Add the samples `rows` as one batch without padding."""
    indices = torch.tensor(rows)
    sums.add(logits[indices], labels[indices], torch.ones(len(rows)), indices)


def evaluated(task: Task, logits: torch.Tensor, labels: torch.Tensor, batch: int = 7) -> Metrics:
    sums = EvaluationSums(task, len(labels), CPU)
    for first in range(0, len(labels), batch):
        count(sums, logits, labels, list(range(first, min(first + batch, len(labels)))))
    return sums.reduce()


def sample(kind: Kind, number: int, num_classes: int, seed: int = 1) -> tuple[Task, torch.Tensor, torch.Tensor]:
    """A task with logits that know something of the labels."""
    generator = torch.Generator().manual_seed(seed)
    task = task_with(kind, num_classes)
    if kind == "multi":
        labels = (torch.rand(number, num_classes, generator=generator) < 0.3).to(torch.uint8)
        signal = labels * 2.0 - 1.0
    else:
        labels = torch.randint(0, num_classes, (number,), generator=generator)
        signal = labels[:, None] * 2.0 - 1.0 if kind == "binary" else functional.one_hot(labels, num_classes).float()
    return task, signal + 1.5 * torch.randn(signal.shape, generator=generator), labels


# ---- against plain numpy and scikit-learn ----


def test_an_evaluation_counts_accuracy_loss_and_recall_as_plain_numpy_does() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, 4, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    metrics = evaluated(task_with("single", 4), logits, labels)
    predicted, true = logits.numpy().argmax(axis=1), labels.numpy()
    exact = logits.double().numpy()
    losses = np.log(np.exp(exact).sum(axis=1)) - exact[range(50), true]  # (N,)
    assert metrics.num_samples == 50
    assert metrics.accuracy == (predicted == true).mean()
    assert metrics.recall[:3] == [(predicted[true == label] == label).mean() for label in range(3)]
    assert math.isnan(metrics.recall[3]), "no sample is of class 3"
    # Each loss is computed in float32 and summed in float64.
    assert metrics.loss == pytest.approx(losses.mean(), rel=1e-6)


def calibration(confidence: npt.NDArray[Any], right: npt.NDArray[Any]) -> float:
    """The expected calibration error over 15 bins, sample by sample."""
    total = 0.0
    for number in range(15):
        members = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if members.any():
            total += members.mean() * abs(right[members].mean() - confidence[members].mean())
    return float(total)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_the_figures_of_one_label_are_those_of_scikit_learn(num_classes: int) -> None:
    task, logits, labels = sample("single", 600, num_classes)
    metrics, true = evaluated(task, logits, labels, 64), labels.numpy()
    shown = logits.double().softmax(dim=1).numpy()
    hot = np.eye(num_classes)[true]
    assert metrics.macro_f1 == pytest.approx(sklearn.f1_score(true, shown.argmax(axis=1), average="macro"), rel=1e-12)
    assert metrics.auroc == pytest.approx(sklearn.roc_auc_score(hot, shown, average="macro"), abs=BINNED)
    assert metrics.average_precision == pytest.approx(sklearn.average_precision_score(hot, shown), abs=BINNED)
    right = shown.argmax(axis=1) == true
    assert metrics.ece == pytest.approx(calibration(shown.max(axis=1), right), abs=1e-6)  # float32 confidences
    if num_classes > 5:
        assert metrics.top5 == sklearn.top_k_accuracy_score(true, shown, k=5, labels=range(num_classes))
    else:
        assert math.isnan(metrics.top5)
    assert math.isnan(metrics.label_accuracy)


def test_the_figures_of_yes_and_no_are_those_of_scikit_learn() -> None:
    task, logits, labels = sample("binary", 600, 2)
    metrics, true = evaluated(task, logits, labels, 64), labels.numpy()
    yes = logits[:, 0].double().sigmoid().numpy()
    assert metrics.accuracy == ((yes > 0.5) == true).mean()
    assert metrics.recall == [sklearn.recall_score(true, yes > 0.5, pos_label=label) for label in (0, 1)]
    assert metrics.macro_f1 == pytest.approx(sklearn.f1_score(true, yes > 0.5, average="macro"), rel=1e-12)
    assert metrics.auroc == pytest.approx(sklearn.roc_auc_score(true, yes), abs=BINNED)
    assert metrics.average_precision == pytest.approx(sklearn.average_precision_score(true, yes), abs=BINNED)
    sure = np.maximum(yes, 1 - yes)
    assert metrics.ece == pytest.approx(calibration(sure, (yes > 0.5) == true), abs=1e-6)


def test_the_figures_of_several_labels_are_those_of_scikit_learn() -> None:
    task, logits, labels = sample("multi", 600, 4)
    metrics, true = evaluated(task, logits, labels, 64), labels.numpy()
    shown = logits.double().sigmoid().numpy()
    predicted = (shown >= 0.5).astype(np.uint8)
    assert metrics.accuracy == sklearn.accuracy_score(true, predicted), "the share of images with every label right"
    assert metrics.label_accuracy == pytest.approx((true == predicted).mean(), rel=1e-12)
    np.testing.assert_allclose(metrics.recall, sklearn.recall_score(true, predicted, average=None), rtol=1e-12)
    assert metrics.macro_f1 == pytest.approx(sklearn.f1_score(true, predicted, average="macro"), rel=1e-12)
    assert metrics.auroc == pytest.approx(sklearn.roc_auc_score(true, shown), abs=BINNED)
    assert metrics.average_precision == pytest.approx(sklearn.average_precision_score(true, shown), abs=BINNED)
    assert metrics.ece == pytest.approx(calibration(shown.ravel(), true.ravel()), abs=1e-6)
    assert metrics.loss == pytest.approx(float(task.sample_losses(logits, labels).double().mean()), rel=1e-6)


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0, 300.0])
def test_logits_of_any_size_keep_their_ranks(scale: float) -> None:
    task, logits, labels = sample("binary", 400, 2)
    metrics = evaluated(task, logits * scale, labels)
    # At the ends of this range some 80 bins hold all samples: near 0, or far from it, where bins are wide.
    assert metrics.auroc == pytest.approx(sklearn.roc_auc_score(labels, logits), abs=0.01)


def test_scores_that_are_whole_bins_give_scikit_learns_figure_to_the_last_digit() -> None:
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 20, 300), generator.integers(0, 2, 300)
    histograms = [torch.tensor(np.bincount(scores[labels == label], minlength=20))[None].double() for label in (0, 1)]
    precision, area = average_precisions(*histograms), areas_under_roc(*histograms)
    assert float(precision) == pytest.approx(sklearn.average_precision_score(labels, scores), rel=1e-12)
    assert float(area) == pytest.approx(sklearn.roc_auc_score(labels, scores), rel=1e-12)


def test_a_network_that_is_sure_is_ranked_by_how_sure_it_is() -> None:
    task, logits, labels = sample("single", 400, 3)
    logits = logits.double() * 15  # softmax is 1 in float32 for most of them
    margins = torch.stack([logits[:, k] - logits[:, [j for j in range(3) if j != k]].logsumexp(dim=1) for k in range(3)], dim=1)
    expected = sklearn.roc_auc_score(np.eye(3)[labels], margins, average="macro")
    assert evaluated(task, logits, labels).auroc == pytest.approx(expected, abs=BINNED)


def test_a_ranking_of_classes_that_the_split_lacks_has_no_value_and_is_left_out() -> None:
    labels = torch.tensor([0, 0, 1])
    metrics = evaluated(task_with("single", 3), torch.eye(3)[labels] * 4, labels)
    assert (metrics.auroc, metrics.average_precision, metrics.macro_f1) == (1.0, 1.0, 1.0)
    same = evaluated(task_with("binary", 2), torch.ones(3, 1), torch.ones(3, dtype=torch.int64))
    assert math.isnan(same.auroc)
    assert "auroc" not in same.figures()
    assert {"accuracy", "loss", "macro_f1", "average_precision", "ece"} <= set(same.figures())


def test_logits_that_are_no_numbers_give_a_loss_that_is_none_and_no_crash() -> None:
    logits = torch.full((4, 3), math.nan)
    metrics = evaluated(task_with("single", 3), logits, torch.tensor([0, 1, 2, 0]))
    assert math.isnan(metrics.loss)


# ---- exactness ----


@pytest.mark.parametrize("kind", ["single", "binary", "multi"])
def test_two_ranks_find_exactly_what_one_does(kind: Kind) -> None:
    task, logits, labels = sample(kind, 40, 2 if kind == "binary" else 7)
    one, first, second = (EvaluationSums(task, 40, CPU) for _ in range(3))
    count(one, logits, labels, list(range(40)))
    for rank, sums in ((0, first), (1, second)):  # each with a padded last batch
        for start in range(0, 40, 12):
            rows = [row % 40 for row in range(start + 6 * rank, start + 6 * rank + 6)]
            weights = torch.tensor([1.0 if start + 6 * rank + n < 40 else 0.0 for n in range(6)])
            indices = torch.tensor(rows)
            sums.add(logits[indices], labels[indices], weights, indices)

    def add_other(total: torch.Tensor) -> None:
        for name in ("counts", "samples", "loss"):
            if total is getattr(first, name):
                total += getattr(second, name)

    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.all_reduce", side_effect=add_other) as reductions,
    ):
        found = first.reduce()
    assert reductions.call_count == 3
    expected = one.reduce()
    # The order of a float64 sum moves its last bits only; everything else is counted.
    assert found.loss == pytest.approx(expected.loss, rel=1e-14)
    without = {name: value for name, value in found.figures().items() if name != "loss"}
    assert without == {name: value for name, value in expected.figures().items() if name != "loss"}
    assert found.recall == expected.recall
    assert (found.classes, found.confidences) == (expected.classes, expected.confidences)
    for name in ("index", "label", "predicted", "confidence"):
        assert torch.equal(getattr(first.answers(), name), getattr(one.answers(), name)), name


@pytest.mark.parametrize("kind", ["single", "binary", "multi"])
def test_the_answer_to_each_sample_is_kept(kind: Kind) -> None:
    task, logits, labels = sample(kind, 30, 2 if kind == "binary" else 37)
    sums = EvaluationSums(task, 33, CPU)
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    for part in torch.split(rows, 7):
        count(sums, logits, labels, part.tolist())
    sums.add_bad(torch.tensor([30, 31, 32]))
    sums.reduce()
    found = sums.answers()
    assert found.index.tolist() == list(range(30)), "bad samples have no answer"
    predicted, shown = task.predicted(logits), task.probabilities(logits.double())
    assert torch.equal(found.label, labels) and torch.equal(found.predicted, predicted)
    expected = shown.amax(dim=1)
    if kind == "multi":
        sure, wrong = torch.maximum(shown, 1 - shown), predicted != labels
        expected = torch.stack(
            [row[mask].mean() if mask.any() else row.sum() * 0 for row, mask in zip(sure, wrong, strict=True)]
        )
    torch.testing.assert_close(found.confidence, expected, rtol=0, atol=2**-30)  # the unit in which it is kept


@pytest.mark.parametrize("kind", ["single", "binary", "multi"])
def test_the_figures_of_each_class_are_those_of_scikit_learn(kind: Kind) -> None:
    task, logits, labels = sample(kind, 300, 2 if kind == "binary" else 4)
    names = [f"class {number}" for number in range(task.num_classes)]
    rows = evaluated(task, logits, labels).per_class(names)
    figures = sklearn.precision_recall_fscore_support(labels, task.predicted(logits))
    assert [row["class"] for row in rows] == names
    for name, expected in zip(("precision", "recall", "f1", "support"), figures, strict=True):
        np.testing.assert_allclose([row[name] for row in rows], expected, rtol=1e-12, err_msg=name)


def test_the_bins_of_confidence_hold_every_answer_and_their_error_is_the_ece() -> None:
    task, logits, labels = sample("single", 300, 3)
    metrics = evaluated(task, logits, labels)
    bins = [each for each in metrics.reliability() if each["count"]]
    assert sum(each["count"] for each in bins) == 300
    assert all(each["low"] < each["confidence"] <= each["high"] for each in bins)
    assert sum(each["count"] * each["accuracy"] for each in bins) == pytest.approx(300 * metrics.accuracy)
    error = sum(each["count"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / 300
    assert error == pytest.approx(metrics.ece, rel=1e-9)
    assert math.isnan(metrics.reliability()[0]["accuracy"]), "three classes are never less sure than 1/3"


def test_an_evaluation_does_not_depend_on_how_samples_were_batched() -> None:
    generator = torch.Generator().manual_seed(2)
    task = task_with("single", 3)
    logits, labels = torch.randn(40, 3, generator=generator) * 30, torch.randint(0, 3, (40,), generator=generator)
    one, many = EvaluationSums(task, 40, CPU), EvaluationSums(task, 40, CPU)
    count(one, logits, labels, list(range(40)))
    for row in torch.randperm(40, generator=generator).tolist():
        count(many, logits, labels, [row])
    assert one.reduce().loss == pytest.approx(many.reduce().loss, rel=1e-14)  # as above
    assert torch.equal(one.counts, many.counts)


def test_padding_rows_are_not_counted() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0], [9.0, -9.0], [9.0, -9.0]])
    task = task_with("single", 2)
    sums, plain = EvaluationSums(task, 2, CPU), EvaluationSums(task, 2, CPU)
    # The padding repeats samples that have been seen, with labels that would be wrong.
    sums.add(logits, torch.tensor([0, 1, 1, 1]), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 1, 0, 1]))
    count(plain, logits, torch.tensor([0, 1]), [0, 1])
    assert sums.reduce().figures() == plain.reduce().figures()
    assert sums.reduce().accuracy == 1.0


def test_a_batch_of_nothing_but_padding_counts_nothing() -> None:
    for kind in ("single", "multi"):
        task, logits, labels = sample(kind, 4, 8)
        sums = EvaluationSums(task, 4, CPU)
        sums.add(logits, labels, torch.zeros(4), torch.arange(4))
        assert not sums.counts.any()
        assert float(sums.loss) == 0.0


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [([0, 1], 1), ([0, 1, 2, 2], 1), ([0, 1, 1], 2)],
    ids=["one is missing", "one comes twice", "one is missing and another comes twice"],
)
def test_an_evaluation_that_did_not_see_each_sample_once_is_no_result(seen: list[int], wrong: int) -> None:
    sums = EvaluationSums(task_with("single", 2), 3, CPU)
    count(sums, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), seen)
    with pytest.raises(RunError, match=f"{wrong} of 3 samples were not evaluated exactly once"):
        sums.reduce()


def test_a_split_of_bad_samples_only_is_no_result() -> None:
    sums = EvaluationSums(task_with("multi", 2), 2, CPU)
    sums.add_bad(torch.tensor([0, 1]))
    with pytest.raises(DataError, match="no sample of the split can be decoded"):
        sums.reduce()


def test_thousands_of_classes_do_not_need_gigabytes() -> None:
    sums = EvaluationSums(task_with("single", 20_000), 1, CPU)
    assert sums.counts.nbytes < 200e6
    assert EvaluationSums(task_with("single", 1000), 1, CPU).num_bins == MARGIN_BINS


def test_less_is_better_for_loss_and_calibration_error_only() -> None:
    assert [name for name in get_args(Monitor) if direction(name) == "min"] == ["val/loss", "val/ece"]
    metrics = Metrics(1, accuracy=0.0, loss=0.0, recall=[])
    assert all(hasattr(metrics, name.removeprefix("val/")) for name in get_args(Monitor))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["single", "binary", "multi"])
def test_a_gpu_counts_as_the_cpu_does_where_only_deterministic_operations_are_allowed(kind: Kind) -> None:
    task, logits, labels = sample(kind, 64, 2 if kind == "binary" else 7)
    indices, weights = torch.randperm(64), torch.ones(64)
    torch.use_deterministic_algorithms(True)
    try:
        found, answers = [], []
        for device in (CPU, torch.device("cuda")):
            sums = EvaluationSums(task, 64, device)
            sums.add(logits.to(device), labels.to(device), weights.to(device), indices.to(device))
            found.append(sums.reduce())
            answers.append(sums.answers())
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("index", "label", "predicted"):
        assert torch.equal(getattr(answers[0], name), getattr(answers[1], name)), name
    assert (found[0].accuracy, found[0].recall, found[0].macro_f1) == (found[1].accuracy, found[1].recall, found[1].macro_f1)
    for name in ("loss", "auroc", "average_precision", "ece"):  # float32 logarithms of two libraries
        assert getattr(found[0], name) == pytest.approx(getattr(found[1], name), rel=1e-4)
