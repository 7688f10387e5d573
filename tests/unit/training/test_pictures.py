from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from pipeline.answers import Answers
from pipeline.config import Config
from pipeline.data.dataset import ShardDataset
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.recipe.dynamics import Dynamics
from pipeline.report.answers import AnsweredImage, draw_answers
from pipeline.task import task_of
from pipeline.training import pictures as pictures_module
from pipeline.training.pictures import Pictures, count_labels, draw_mistakes_by_class, show_answers
from tests.unit.training.conftest import Fit, Listener, change, weights_of

KEYS = ("val/dynamics", "val/samples", "val/misclassified", "val/confusion_matrix")


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Two epochs of four steps, after which some answers are still wrong."""
    return change(change(tiny_config, "trainer", max_epochs=2), "optimizer", lr=1e-4)


def callbacks_for(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, tracker: Listener) -> list[L.Callback]:
    dynamics = Dynamics(config, manifest, spec, task_of(manifest, config), tracker)
    return [dynamics, Pictures(dynamics, tracker)]


Drawn = list[tuple[list[AnsweredImage], str]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What was drawn of images with answers, in order."""
    calls: Drawn = []

    def note(images: list[AnsweredImage], title: str) -> bytes:
        calls.append((images, title))
        return draw_answers(images, title)

    monkeypatch.setattr(pictures_module, "draw_answers", note)
    return calls


def test_pictures_come_before_the_first_step_and_at_each_validation(
    config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, fit: Fit, drawn: Drawn
) -> None:
    tracker = Listener()
    module = fit(config, *callbacks_for(config, tiny_dataset, spec, tracker))
    assert set(tracker.images) == {(key, step) for key in KEYS for step in (0, 4, 8)}
    val = ShardDataset(tiny_dataset, "val", spec)
    images = torch.stack([val[index][0] for index in range(12)])  # (N, 3, H, W)
    labels = [val[index][1] for index in range(12)]
    shown = module.network.eval()(images).softmax(dim=1).detach()
    predicted = shown.argmax(dim=1).tolist()
    wrong = sorted((index for index in range(12) if predicted[index] != labels[index]), key=lambda index: -shown[index].max())
    assert wrong, "the test needs mistakes"
    names = tiny_dataset.class_names
    (first, first_title), (samples, samples_title), (mistakes, title) = drawn[1], drawn[-2], drawn[-1]
    assert first_title == f"{len(first)} wrong of 12 watched validation images before the first step"
    assert samples_title == f"12 watched images: {12 - len(wrong)} right after step 8"
    assert [each.label for each in samples] == [names[label] for label in labels]
    assert [bool(each.answer) for each in samples] == [index in wrong for index in range(12)]
    assert title == f"{len(wrong)} wrong of 12 validation images after step 8"
    assert [(each.label, each.answer) for each in mistakes] == [(names[labels[n]], names[predicted[n]]) for n in wrong]
    for index, each in zip(wrong, mistakes, strict=True):
        assert np.array_equal(each.pixels, images[index].permute(1, 2, 0).numpy())
        assert each.confidence == pytest.approx(float(shown[index].max()), abs=1e-5)


def test_drawing_does_not_change_what_is_trained(
    config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, fit: Fit
) -> None:
    config = change(config, "model", dropout=0.5)
    assert torch.equal(weights_of(fit(config, *callbacks_for(config, tiny_dataset, spec, Listener()))), weights_of(fit(config)))


def test_drawing_draws_no_random_number(config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, fit: Fit) -> None:
    class Compare(L.Callback):
        def __init__(self, pictures: Pictures) -> None:
            self.pictures = pictures

        def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
            modes = [each.training for each in module.modules()]
            self.pictures.on_validation_end(trainer, module)
            assert torch.equal(before[0], torch.get_rng_state()) and before[1] == str(np.random.get_state())  # noqa: NPY002
            assert modes == [each.training for each in module.modules()]

    dynamics, pictures = callbacks_for(config, tiny_dataset, spec, Listener())
    assert isinstance(pictures, Pictures)
    fit(config, dynamics, Compare(pictures))


def test_of_shards_that_must_be_fetched_only_the_first_is_looked_into(
    config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, fit: Fit, drawn: Drawn
) -> None:
    dynamics, pictures = callbacks_for(change(config, "trainer", max_epochs=1), tiny_dataset, spec, Listener())
    assert isinstance(pictures, Pictures)
    pictures.dataset.fetcher = lambda number: pytest.fail("nothing is to be fetched")  # type: ignore[assignment]
    fit(change(config, "trainer", max_epochs=1), dynamics, pictures)
    assert drawn[-1][1].endswith(" wrong of the first 5 of 12 validation images after step 4")


# ---- several labels ----


def test_several_labels_are_counted_and_named(
    tiny_config: Config, multi_dataset: DatasetManifest, spec: PreprocessSpec, fit: Fit, drawn: Drawn
) -> None:
    config, tracker = change(tiny_config, "trainer", max_epochs=1), Listener()
    module = fit(config, *callbacks_for(config, multi_dataset, spec, tracker), manifest=multi_dataset)
    assert {key for key, _ in tracker.images} == set(KEYS)
    val = ShardDataset(multi_dataset, "val", spec)
    labels = val.labels(np.arange(len(val)))
    predicted = module.task.predicted(module.network.eval()(torch.stack([val[n][0] for n in range(len(val))])))
    answers = module.sums.answers()
    assert torch.equal(answers.label, labels) and torch.equal(answers.predicted, predicted)
    mistakes = drawn[-1][0]
    num_wrong = sorted(((labels != predicted).sum(dim=1)).tolist(), reverse=True)
    words = [(set(each.label.split("|")) - {"(none)"}, set(each.answer.split("|")) - {"(none)"}) for each in mistakes]
    assert [len(label ^ answer) for label, answer in words] == [number for number in num_wrong if number][:24]
    for row, number in zip(count_labels(answers, multi_dataset.class_names), range(3), strict=True):
        true, given = labels[:, number] > 0, predicted[:, number] > 0
        assert row.counts == (int((true & given).sum()), int((true & ~given).sum()), int((~true & given).sum()))


def test_a_set_of_no_label_has_a_name(multi_dataset: DatasetManifest, spec: PreprocessSpec) -> None:
    label, predicted = torch.tensor([[0, 0, 0], [1, 0, 1]], dtype=torch.uint8), torch.tensor([[1, 0, 0], [1, 0, 1]])
    answers = Answers(torch.tensor([0, 1]), label, predicted.to(torch.uint8), torch.tensor([0.75, 0.0], dtype=torch.float64))
    first, second = show_answers(ShardDataset(multi_dataset, "val", spec), answers)
    assert (first.label, first.answer, first.confidence) == ("(none)", "blue", 0.75)
    assert (second.label, second.answer, second.confidence) == ("blue|red", "", None)


# ---- many classes ----


def test_of_many_classes_the_picture_says_which_it_shows(
    tiny_dataset: DatasetManifest, spec: PreprocessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"class {number}" for number in range(1000)]
    dataset = ShardDataset(tiny_dataset, "val", spec)
    monkeypatch.setattr(dataset, "manifest", type("Named", (), {"class_names": names})())
    found: dict[str, Any] = {}
    parts = ("names", "counts", "title", "note")
    monkeypatch.setattr(pictures_module, "draw_confusion", lambda *given: found.update(zip(parts, given, strict=True)) or b"")
    classes = torch.arange(1000)
    predicted = classes.clone()
    predicted[[7, 8]] = torch.tensor([900, 7])
    draw_mistakes_by_class(dataset, Answers(classes, classes, predicted, torch.ones(1000).double()), "test images")
    assert len(found["names"]) == 20 and {"class 7", "class 8", "class 900"} <= set(found["names"])
    assert found["counts"].shape == (20, 20)
    assert found["title"] == "1,000 test images: 0.9980 right"
    assert found["note"] == "the 20 of 1,000 classes that are most confused with one another"
