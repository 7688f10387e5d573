import copy
import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch

from pipeline.data.dataset import ShardDataset
from pipeline.export.activations import clipping_defects, float16_defects, look, opened
from pipeline.export.parity import OPTIMIZATIONS, ask_onnx, open_session
from pipeline.export.quantize import to_float16
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from tests.unit.export.given import scale_between, shrink_between
from tests.unit.export.sabotage import change_weight, weight_of


@pytest.fixture(scope="module")
def images(tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> torch.Tensor:
    dataset = ShardDataset(tiny_dataset, "test", tiny_spec)
    return torch.stack([dataset.image(index) for index in range(len(dataset))])  # (12, 3, 16, 16)


def eights(images: torch.Tensor) -> list[torch.Tensor]:
    return [images[first : first + 8] for first in range(0, len(images), 8)]


def test_every_image_is_looked_at(exported_model: onnx.ModelProto, images: torch.Tensor) -> None:
    (name,) = [node.output[0] for node in exported_model.graph.node if node.op_type == "Conv"][:1]
    before = exported_model.SerializeToString(deterministic=True)
    names = [name, "logits"]
    seen = [*look(opened(exported_model, names), names, images)]
    assert [(which, values.shape) for which, values in seen] == [(name, (12, 8, 16, 16)), ("logits", (12, 3))]
    assert exported_model.SerializeToString(deterministic=True) == before


def test_a_sound_model_fits_float16(exported_model: onnx.ModelProto, images: torch.Tensor) -> None:
    assert [*float16_defects(exported_model, to_float16(exported_model), eights(images))] == []


@pytest.mark.parametrize(
    ("hide", "reason"),
    [
        (lambda model: scale_between(model, 1e5), r"float16 overflows: on real images `\w+` reaches \d\.\de\+\d\d"),
        (shrink_between, "float16 keeps too few digits: with each activation rounded to it, as a GPU does"),
    ],
)
def test_activations_that_float16_cannot_hold_are_found_though_the_answers_are_right(
    exported_model: onnx.ModelProto, images: torch.Tensor, hide: Callable[[onnx.ModelProto], onnx.ModelProto], reason: str
) -> None:
    model = hide(exported_model)
    half = to_float16(model)
    wanted, seen = (
        ask_onnx(open_session(each.SerializeToString(), OPTIMIZATIONS["on"]), images) for each in (exported_model, half)
    )
    # What a CPU says of it: rounded weights and logits, and nothing else.
    np.testing.assert_allclose(seen["probabilities"], wanted["probabilities"], rtol=0, atol=0.015)
    (defect,) = float16_defects(model, half, eights(images))
    assert re.match(reason, defect)


def test_an_activation_that_is_no_number_does_not_fit_float16(exported_model: onnx.ModelProto, images: torch.Tensor) -> None:
    broken = copy.deepcopy(exported_model)
    first = next(node for node in broken.graph.node if node.op_type == "Conv")
    change_weight(weight_of(broken, first), lambda weights: weights * np.float32("nan"))
    (defect,) = float16_defects(broken, to_float16(exported_model), eights(images))
    assert re.match(r"float16 overflows: on real images `\w+` reaches inf, ", defect)


def test_values_outside_of_their_range_are_counted(exported_model: onnx.ModelProto, images: torch.Tensor) -> None:
    (values,) = [values for _, values in look(opened(exported_model, ["logits"]), ["logits"], images[:8])]
    low, high = float(values.min()), float(values.max())
    assert [*clipping_defects(exported_model, {"logits": (low, high), "not there": (0, 1)}, [images[:8]])] == []
    assert [*clipping_defects(exported_model, {}, [images])] == []
    (defect,) = clipping_defects(exported_model, {"logits": (low, low / 2)}, [images[:8]])
    assert "it was calibrated on images unlike these: " in defect
    assert f"% of the values of `logits`, {low:.3g} to {high:.3g}, lie outside of its range" in defect
