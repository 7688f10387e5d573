import math

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, RunError
from pipeline.task import EvaluationSums, loss_at_initialisation, probabilities, require_supported, sample_losses

CPU = torch.device("cpu")


def count(sums: EvaluationSums, logits: torch.Tensor, labels: torch.Tensor, rows: list[int]) -> None:
    """Add the samples `rows` as one batch without padding."""
    indices = torch.tensor(rows)
    sums.add(logits[indices], labels[indices], torch.ones(len(rows)), indices)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_the_loss_of_uniform_logits_is_ln_k(num_classes: int) -> None:
    losses = sample_losses(torch.full((5, num_classes), 7.0), torch.arange(5) % num_classes)  # (5,)
    # A float32 logarithm is right to about one part in 2**23.
    np.testing.assert_allclose(losses.numpy(), math.log(num_classes), rtol=1e-6, atol=0)
    assert loss_at_initialisation(num_classes) == math.log(num_classes)


def test_the_loss_of_two_classes_is_a_natural_logarithm_and_not_log10() -> None:
    assert loss_at_initialisation(2) == pytest.approx(0.693147, rel=1e-6)


def test_the_loss_contains_the_softmax_that_people_see() -> None:
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 5, torch.tensor([0, 1, 2, 3, 0, 1])
    shown = probabilities(logits)
    # Two float32 softmaxes by different routes: a few units in the last place of numbers up to 10.
    np.testing.assert_allclose(sample_losses(logits, labels), -shown[range(6), labels].log(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shown.sum(dim=1), 1.0, rtol=0, atol=1e-6)


def test_the_loss_of_half_precision_logits_is_summed_in_float32() -> None:
    logits = torch.tensor([[8.0, 1.0, 0.5]], dtype=torch.bfloat16)
    expected = sample_losses(logits.float(), torch.tensor([1]))
    assert sample_losses(logits, torch.tensor([1])).dtype == torch.float32
    assert torch.equal(sample_losses(logits, torch.tensor([1])), expected)


def test_an_evaluation_counts_accuracy_loss_and_recall_as_plain_numpy_does() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, 4, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    sums = EvaluationSums(4, 50, CPU)
    for first in range(0, 50, 7):
        count(sums, logits, labels, list(range(first, min(first + 7, 50))))
    metrics = sums.reduce()

    predicted, true = logits.numpy().argmax(axis=1), labels.numpy()
    exact = logits.double().numpy()
    losses = np.log(np.exp(exact).sum(axis=1)) - exact[range(50), true]  # (N,)
    assert metrics.num_samples == 50
    assert metrics.accuracy == (predicted == true).mean()
    assert metrics.recall[:3] == [(predicted[true == label] == label).mean() for label in range(3)]
    assert math.isnan(metrics.recall[3]), "no sample is of class 3"
    # Each loss is computed in float32 and summed in float64.
    assert metrics.loss == pytest.approx(losses.mean(), rel=1e-6)


def test_an_evaluation_does_not_depend_on_how_samples_were_batched() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(40, 3, generator=generator) * 30, torch.randint(0, 3, (40,), generator=generator)
    one, many = EvaluationSums(3, 40, CPU), EvaluationSums(3, 40, CPU)
    count(one, logits, labels, list(range(40)))
    for row in torch.randperm(40, generator=generator).tolist():
        count(many, logits, labels, [row])
    # The order of a float64 sum of 40 terms moves its last bits only.
    assert one.reduce().loss == pytest.approx(many.reduce().loss, rel=1e-14)
    assert torch.equal(one.confusion, many.confusion)


def test_padding_rows_are_not_counted() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0], [9.0, -9.0], [9.0, -9.0]])
    sums, plain = EvaluationSums(2, 2, CPU), EvaluationSums(2, 2, CPU)
    # The padding repeats samples that have been seen, with labels that would be wrong.
    sums.add(logits, torch.tensor([0, 1, 1, 1]), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 1, 0, 1]))
    count(plain, logits, torch.tensor([0, 1]), [0, 1])
    assert sums.reduce() == plain.reduce()
    assert sums.reduce().accuracy == 1.0


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [([0, 1], 1), ([0, 1, 2, 2], 1), ([0, 1, 1], 2)],
    ids=["one is missing", "one comes twice", "one is missing and another comes twice"],
)
def test_an_evaluation_that_did_not_see_each_sample_once_is_no_result(seen: list[int], wrong: int) -> None:
    sums = EvaluationSums(2, 3, CPU)
    count(sums, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), seen)
    with pytest.raises(RunError, match=f"{wrong} of 3 samples were not evaluated exactly once"):
        sums.reduce()


def test_only_one_label_an_image_can_be_trained() -> None:
    require_supported("single")
    with pytest.raises(DataError, match="task is `multi`; only `single`"):
        require_supported("multi")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_counts_as_the_cpu_does_where_only_deterministic_operations_are_allowed() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(64, 5, generator=generator), torch.randint(0, 5, (64,), generator=generator)
    indices, weights = torch.randperm(64, generator=generator), torch.ones(64)
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for device in (CPU, torch.device("cuda")):
            sums = EvaluationSums(5, 64, device)
            sums.add(logits.to(device), labels.to(device), weights.to(device), indices.to(device))
            found.append(sums.reduce())
    finally:
        torch.use_deterministic_algorithms(False)
    assert (found[0].accuracy, found[0].recall) == (found[1].accuracy, found[1].recall)
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-6)  # float32 logarithms of two libraries
