import pytest
import torch

from pipeline.answers import BITS, Answers, confusion_of, num_words, pack, unpack


def answers(label: list[int], predicted: list[int], confidence: list[float]) -> Answers:
    index = torch.arange(len(label)) * 10
    return Answers(index, torch.tensor(label), torch.tensor(predicted), torch.tensor(confidence, dtype=torch.float64))


@pytest.mark.parametrize("num_labels", [1, 3, BITS, BITS + 1, 100])
def test_labels_come_out_of_the_bits_that_they_were_packed_into(num_labels: int) -> None:
    generator = torch.Generator().manual_seed(num_labels)
    labels = (torch.rand(17, num_labels, generator=generator) < 0.5).to(torch.uint8)
    labels[0] = 1  # the highest bit of every word, too
    packed = pack(labels)
    assert packed.shape == (num_words(num_labels), 17) and packed.dtype == torch.int32
    assert torch.equal(unpack(packed, num_labels), labels)
    classes = torch.arange(num_labels)
    assert torch.equal(unpack(pack(classes), None), classes)


def test_the_surest_mistakes_come_first_and_of_equally_sure_ones_the_first_sample() -> None:
    found = answers([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 1, 0], [0.99, 0.6, 0.7, 0.9, 0.7, 0.5])
    assert found.most_wrong(3).index.tolist() == [20, 40, 10]
    assert found.most_wrong(9).index.tolist() == [20, 40, 10, 50], "right answers are no mistakes"
    assert found.accuracy == pytest.approx(2 / 6)
    assert found.at(torch.tensor([50, 0, 7])).index.tolist() == [0, 50]


def test_of_several_labels_the_image_with_the_most_wrong_ones_comes_first() -> None:
    label = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.uint8)
    found = Answers(torch.arange(4), label, predicted, torch.tensor([0.9, 0.6, 0.0, 0.8], dtype=torch.float64))
    assert found.num_wrong.tolist() == [1, 2, 0, 2]
    assert found.most_wrong(9).index.tolist() == [3, 1, 0]
    assert found.accuracy == 0.25


def test_what_was_taken_for_what_is_counted_by_true_class_and_answer() -> None:
    found = confusion_of(answers([0, 0, 0, 2, 2], [0, 1, 1, 2, 0], [0.5] * 5), 3)
    assert found.classes == [0, 1, 2]
    assert found.counts.tolist() == [[1, 2, 0], [0, 0, 0], [1, 0, 1]]


def test_of_many_classes_those_of_the_commonest_mistakes_are_shown() -> None:
    label = [700, 700, 700, 3, 3, 500, *range(1000)]
    predicted = [41, 41, 41, 900, 900, 12, *range(1000)]
    found = confusion_of(answers(label, predicted, [0.5] * len(label)), 1000, most=4)
    assert found.classes == [3, 41, 700, 900]
    assert found.counts.tolist() == [[1, 0, 0, 2], [0, 1, 0, 0], [0, 3, 1, 0], [0, 0, 0, 1]]
    assert confusion_of(answers([5], [5], [0.5]), 1000, most=4).classes == [0, 1, 2, 3], "no mistake at all"
