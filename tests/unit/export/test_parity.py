import copy
import dataclasses
import json
import re

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.config import ExportConfig
from pipeline.data.dataset import ShardDataset
from pipeline.errors import DataError, GateError
from pipeline.export.parity import Parity, coloured_images, compare, describe_failure, same_answers
from tests.unit.conftest import THREE_CLASSES, THREE_LABELS
from tests.unit.export import sabotage
from tests.unit.export.sabotage import Change

CONFIG = ExportConfig(max_batch_size=5)


def ask(network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset) -> Parity:
    return compare(network, THREE_CLASSES, model.SerializeToString(), "s" * 64, dataset, CONFIG)


def test_the_true_model_passes_in_every_case(
    tiny_network: nn.Sequential, exported_model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    parity = ask(tiny_network, exported_model, dataset)
    assert parity.passed
    asked = {(case.batch, case.optimization, case.run) for case in parity.cases}
    coloured = len(coloured_images(dataset))
    assert asked == {(batch, level, run) for batch in (1, 2, 3, 5, 7, coloured) for level in ("off", "on") for run in (1, 2)}
    assert parity.cases[-1].batch in (5, 2), "the farthest batch of the whole split"
    # float32 logits of order 1 differ by a few units in the last place.
    assert max(case.max_abs for case in parity.cases) < 1e-5
    assert (parity.top1_agreement, parity.num_samples) == (1.0, 12)
    assert parity.reference_max_abs < 1e-5
    assert parity.accuracy["torch"] == parity.accuracy["onnx"]


def test_images_that_cannot_be_decoded_are_not_held_against_the_model(
    tiny_network: nn.Sequential, exported_model: onnx.ModelProto, dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = dataset.image

    def some(index: int) -> torch.Tensor:
        if index in (0, 7):
            raise DataError("cut short")
        return image(index)

    monkeypatch.setattr(dataset, "image", some)
    parity = ask(tiny_network, exported_model, dataset)
    assert (parity.passed, parity.top1_agreement, parity.num_samples) == (True, 1.0, 10)


def test_the_report_has_the_fields_of_the_contract(
    tiny_network: nn.Sequential, exported_model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    report = json.loads(json.dumps(dataclasses.asdict(ask(tiny_network, exported_model, dataset))))
    assert set(report) == {
        *("passed", "cases", "top1_agreement", "num_samples", "sha256"),
        *("accuracy", "reference_max_abs", "golden_sha256", "reason", "precision", "tolerance_reason", "repeat_max_abs"),
        *("allowed_accuracy_difference", "evaluation", "checkpoint_sha256", "data_digest", "preprocess_hash"),
    }
    assert set(report["cases"][0]) == {"batch", "optimization", "run", "max_abs", "tolerance"}


def test_what_grey_images_do_not_show_is_seen(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = dataset.image
    monkeypatch.setattr(dataset, "image", lambda index: image(index)[:1].expand(3, -1, -1))
    assert ask(tiny_network, model, dataset).passed
    sabotage.turn_the_weights(model)
    parity = ask(tiny_network, model, dataset)
    assert not parity.passed
    assert "its channels are swapped" in parity.reason


def test_an_answer_that_is_off_for_one_image_of_the_split_is_seen(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = dataset.image
    monkeypatch.setattr(dataset, "image", lambda index: torch.full_like(image(0), 255) if index == 10 else image(index))
    assert ask(tiny_network, model, dataset).passed
    sabotage.raise_the_logits_of_bright_images(model)
    parity = ask(tiny_network, model, dataset)
    assert (parity.passed, parity.top1_agreement) == (False, 1.0)
    assert [case.max_abs > case.tolerance for case in parity.cases] == [False] * (len(parity.cases) - 1) + [True]


@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
def test_a_changed_weight_fails(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset, value: float
) -> None:
    sabotage.change_a_weight(model, value)
    parity = ask(tiny_network, model, dataset)
    assert not parity.passed
    assert len(parity.cases) == 6 * 2 * 2 + 1
    assert parity.reference_max_abs > 1e-3
    assert all(case.max_abs > case.tolerance for case in parity.cases)
    if not np.isfinite(value):
        assert {case.max_abs for case in parity.cases} == {np.inf}, "an answer that is no number is infinitely wrong"
    assert "does not give the trained network's answers: it" in describe_failure(parity)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sabotage.add_training_dropout, "it answers the same images otherwise each time: something in it is random"),
        (sabotage.draw_noise, "it answers the same images otherwise each time: something in it is random"),
        (sabotage.turn_the_channels, "its channels are swapped: it takes blue for red"),
        (sabotage.turn_the_weights, "its channels are swapped: it takes blue for red"),
        (sabotage.transpose_the_classes, "its classes are in another order: its output 0 is the network's 1"),
        (sabotage.overflow, "it gives answers that are no numbers: an overflow"),
        (sabotage.freeze_the_batch_inside, "it cannot take a batch of 1, as where a size is frozen"),
        (sabotage.sharpen_the_probabilities, "its probabilities are not those of its logits"),
        (sabotage.move_the_mean, "its answers differ by .*, more than "),
        (sabotage.change_a_weight, "its answers differ by .*, more than "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_is_named_and_not_only_measured(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset, change: Change, reason: str
) -> None:
    change(model)
    parity = ask(tiny_network, model, dataset)
    assert not parity.passed
    assert re.match(reason, parity.reason), parity.reason
    assert parity.reason in describe_failure(parity)


def test_a_dropout_in_training_mode_fails_though_the_optimiser_may_hide_it(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    sabotage.add_training_dropout(model)
    parity = ask(tiny_network, model, dataset)
    assert not parity.passed
    assert any(case.max_abs > case.tolerance for case in parity.cases if case.optimization == "off")


def test_noise_below_the_tolerance_is_still_noise(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    sabotage.draw_noise(model, scale=1e-3)
    wide = dataclasses.replace(CONFIG, tolerance=10.0)
    parity = compare(tiny_network, THREE_CLASSES, model.SerializeToString(), "s" * 64, dataset, wide)
    assert all(case.max_abs <= case.tolerance for case in parity.cases)
    assert not parity.passed
    assert parity.repeat_max_abs > 0
    assert "something in it is random" in parity.reason


def test_a_model_that_onnxruntime_cannot_load_is_refused(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    sabotage.cut_a_wire(model)
    with pytest.raises(GateError, match="onnxruntime cannot load the exported model"):
        ask(tiny_network, model, dataset)


def test_a_network_whose_own_answers_are_no_numbers_is_refused(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    broken = copy.deepcopy(tiny_network)
    with torch.no_grad():
        broken.get_parameter("classifier.2.weight")[0] = float("nan")
    parity = ask(broken, model, dataset)
    assert parity.reason == "the trained network itself gives answers that are no numbers"
    assert {case.max_abs for case in parity.cases} == {np.inf}
    assert parity.reference_max_abs == np.inf
    assert "(largest difference inf, " in describe_failure(parity)
    last = sabotage.weight_of(model, sabotage.node_of(model, "logits"))
    sabotage.change_weight(last, lambda weight: np.concatenate([weight[:1] * np.nan, weight[1:]]))
    alike = ask(broken, model, dataset)
    assert (alike.passed, alike.reason) == (False, "the trained network itself gives answers that are no numbers")


def test_what_is_allowed_follows_from_the_arithmetic_and_is_said(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    parity = ask(tiny_network, model, dataset)
    # Two convolutions and one product of matrices; the longest sum has 8 channels of 3 x 3.
    relative = 2**-23 * (3 * 72) ** 0.5
    images = torch.stack([dataset.image(index) for index in range(5)])
    with torch.no_grad():
        largest = float(tiny_network(images).abs().max())
    (allowed,) = {case.tolerance for case in parity.cases if case.batch == 5}
    assert allowed == pytest.approx(relative * (1 + largest))
    assert parity.tolerance_reason == ("float32: 1.19e-07 * sqrt(3 layers * sums of 72) * (1 + the largest logit)")
    assert max(case.max_abs / case.tolerance for case in parity.cases) < 0.2, "rounding stays well below it"


def test_a_number_in_the_configuration_counts_instead(
    tiny_network: nn.Sequential, model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    strict = dataclasses.replace(CONFIG, tolerance=1e-12)
    parity = compare(tiny_network, THREE_CLASSES, model.SerializeToString(), "s" * 64, dataset, strict)
    assert {case.tolerance for case in parity.cases} == {1e-12}
    assert (parity.passed, parity.tolerance_reason) == (False, "export.tolerance")


def test_a_split_smaller_than_the_largest_batch_is_repeated(
    tiny_network: nn.Sequential, exported_model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    config = dataclasses.replace(CONFIG, max_batch_size=32)
    parity = compare(tiny_network, THREE_CLASSES, exported_model.SerializeToString(), "s" * 64, dataset, config)
    assert parity.passed
    assert max(case.batch for case in parity.cases) == 32
    assert parity.num_samples == 12


def test_another_class_fails_however_wide_the_tolerance(
    tiny_network: nn.Sequential, exported_model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    model = copy.deepcopy(exported_model)
    sabotage.change_weight(sabotage.weight_of(model, sabotage.node_of(model, "logits")), lambda weights: -weights)
    wide = dataclasses.replace(CONFIG, tolerance=1e9)
    parity = compare(tiny_network, THREE_CLASSES, model.SerializeToString(), "s" * 64, dataset, wide)
    assert all(case.max_abs <= case.tolerance for case in parity.cases)
    assert parity.top1_agreement == 0.0, "the most probable class became the least"
    assert parity.reason == "it gives another answer to 100.00% of the images"
    assert not parity.passed


def test_the_network_is_asked_in_evaluation_mode_whatever_mode_it_comes_in(
    tiny_network: nn.Sequential, exported_model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    tiny_network.train()
    before = {name: tensor.clone() for name, tensor in tiny_network.state_dict().items()}
    try:
        assert ask(tiny_network, exported_model, dataset).passed
    finally:
        tiny_network.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_network.state_dict().items())


# ---- several labels an image ----


def test_a_model_of_several_labels_passes_and_one_of_another_task_does_not(
    tiny_network: nn.Sequential, multi_model: onnx.ModelProto, exported_model: onnx.ModelProto, dataset: ShardDataset
) -> None:
    dataset.label_rows = np.eye(3, dtype=np.uint8)[dataset.rows["label"]]
    parity = compare(tiny_network, THREE_LABELS, multi_model.SerializeToString(), "s" * 64, dataset, CONFIG)
    assert parity.passed
    assert parity.top1_agreement == 1.0
    assert parity.accuracy["torch"] == parity.accuracy["onnx"]
    other = compare(tiny_network, THREE_LABELS, exported_model.SerializeToString(), "s" * 64, dataset, CONFIG)
    assert not other.passed
    assert other.top1_agreement < 1.0, "a softmax puts other labels over 0.5 than a sigmoid does"


def test_the_most_probable_class_may_be_another_only_on_the_edge() -> None:
    wanted = np.array([[0.6, 0.3, 0.1], [0.4, 0.4 - 1e-6, 0.2], [0.4, 0.39, 0.21]], np.float32)
    found = np.array([[0.5, 0.4, 0.1], [0.39, 0.41, 0.2], [0.39, 0.4, 0.21]], np.float32)
    same = same_answers(THREE_CLASSES, {"probabilities": wanted}, {"probabilities": found})
    assert same.tolist() == [True, True, False]


def test_answers_agree_where_every_label_is_on_the_same_side_or_on_the_edge() -> None:
    wanted = np.array([[0.9, 0.1], [0.5, 0.1], [0.9, 0.6], [0.499, 0.1]], np.float32)
    found = np.array([[0.8, 0.2], [0.499999, 0.1], [0.9, 0.4], [0.501, 0.1]], np.float32)
    same = same_answers(THREE_LABELS, {"probabilities": wanted}, {"probabilities": found})
    assert same.tolist() == [True, True, False, False]
