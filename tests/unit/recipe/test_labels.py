import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data.dataset import Batch, ShardDataset
from pipeline.data.order import SampleRef
from pipeline.recipe import labels as labels_module
from pipeline.recipe.features import Described
from pipeline.recipe.labels import check_labels, permutation_score
from pipeline.recipe.verdict import Subject


def described(labels: npt.NDArray[np.int64], digests: list[bytes] | None = None) -> Described:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(len(labels), 4)).astype(np.float32)
    return Described(features, features, labels, digests or [draw.bytes(32) for _ in labels])


def test_the_score_is_that_of_all_permutations() -> None:
    guessed, labels = np.array([0, 0, 1, 2, 2, 1]), np.array([0, 1, 1, 2, 0, 1])
    hits = np.array([(guessed == np.array(order)).sum() for order in itertools.permutations(labels)])
    permuted, score = permutation_score(guessed, labels)
    assert permuted == pytest.approx(hits.mean() / 6, rel=1e-12)  # the same sums in another order
    assert score == pytest.approx(((guessed == labels).sum() - hits.mean()) / hits.std(), rel=1e-12)


def test_guesses_that_are_all_one_class_prove_nothing() -> None:
    permuted, score = permutation_score(np.zeros(9, np.int64), np.arange(9) % 3)
    assert (permuted, score) == (1 / 3, 0.0)


def test_labels_that_belong_to_their_images_are_green(subject: Subject) -> None:
    verdict = check_labels(subject)
    assert verdict.verdict == "green", verdict.why
    assert isinstance(verdict.value, float)
    assert verdict.value > 4


def test_a_class_without_images_is_red(subject: Subject) -> None:
    splits = {
        name: dataclasses.replace(split, class_counts=[*split.class_counts, 0])
        for name, split in subject.manifest.splits.items()
    }
    manifest = dataclasses.replace(subject.manifest, class_names=[*subject.manifest.class_names, "violet"], splits=splits)
    verdict = check_labels(dataclasses.replace(subject, manifest=manifest))
    assert (verdict.verdict, verdict.why) == ("red", "no image to train on of violet")


def test_a_class_of_one_repeated_image_is_red(subject: Subject) -> None:
    constant = described(np.array([0, 0, 1, 1, 1, 2]), [b"a" * 32, b"b" * 32, *[b"c" * 32] * 3, b"d" * 32])
    assert list(labels_module._constant(constant, ["red", "green", "blue"])) == ["all images are the same one of green"]
    several = dataclasses.replace(constant, labels=np.array([[1, 0], [1, 0], [1, 1], [1, 1], [1, 1], [0, 0]]))
    assert list(labels_module._constant(several, ["red", "green"])) == ["all images are the same one of green"]


def test_labels_that_are_delivered_with_the_wrong_images_are_red(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index and shards agree here; the fault is in the code that makes a batch."""
    real: Callable[[ShardDataset, list[SampleRef]], Batch] = ShardDataset.__getitems__

    def rolled(dataset: ShardDataset, refs: list[SampleRef]) -> Batch:
        batch = real(dataset, refs)
        batch["label"] = batch["label"].roll(1)
        return batch

    monkeypatch.setattr(ShardDataset, "__getitems__", rolled)
    verdict = check_labels(subject)
    assert verdict.verdict == "red"
    assert "labels of train are not those stored beside the images" in verdict.why


def test_with_several_labels_an_image_the_most_even_one_is_guessed() -> None:
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 1]])
    chosen = labels_module._chosen_label(labels)
    assert chosen == 1
    assert labels_module._targets(labels, chosen).tolist() == [1, 0, 1, 0]


def test_too_few_images_are_not_judged() -> None:
    few = labels_module._scored("val", np.array([0, 1, 1]), np.array([1, 0, 0]))
    assert not few.says_something


def test_streamed_shards_have_no_labels_to_look_up(subject: Subject) -> None:
    streamed = dataclasses.replace(subject.manifest, streams={"train": ["train.tar"]})
    verdict = check_labels(dataclasses.replace(subject, manifest=streamed))
    assert verdict.verdict == "skipped"
    assert "without an index" in verdict.why
