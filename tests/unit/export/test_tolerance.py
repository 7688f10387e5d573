import copy
import typing
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from pipeline.export.graph import export_graph
from pipeline.export.tolerance import tolerance_of
from pipeline.models.normalize import Normalize
from pipeline.preprocess import PreprocessSpec
from tests.unit.conftest import THREE_CLASSES
from tests.unit.export import sabotage


def test_the_longest_sum_is_found_in_whichever_layer_it_is(tiny_spec: PreprocessSpec) -> None:
    layers = [nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Flatten(), nn.Linear(6 * 16 * 16, 3)]
    model = export_graph(nn.Sequential(Normalize(tiny_spec), *layers), THREE_CLASSES, tiny_spec, 20, {})
    assert "sqrt(2 layers * sums of 1,536)" in tolerance_of(model, None).reason


def test_a_chosen_number_is_taken_as_it_is(exported_model: onnx.ModelProto) -> None:
    tolerance = tolerance_of(exported_model, 1e-3)
    assert (tolerance.of(0.0), tolerance.of(100.0)) == (1e-3, 1e-3)


def test_float32_sums_in_any_order_stay_within_what_is_allowed_and_float16_weights_do_not(
    exported_model: onnx.ModelProto, tiny_network: nn.Sequential
) -> None:
    """The same network by torch, its sums in float64, and with weights that float16 rounded."""
    rounded = copy.deepcopy(exported_model)
    for tensor in rounded.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > 1:
            sabotage.change_weight(tensor, lambda weights: weights.astype(np.float16))
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = copy.deepcopy(tiny_network).double()(images).numpy()
        single = tiny_network(images).numpy()
    (half,) = typing.cast(list[Any], onnx.reference.ReferenceEvaluator(rounded).run(["logits"], {"image": images.numpy()}))
    allowed = tolerance_of(exported_model, None).of(float(np.abs(wanted).max()))
    assert np.abs(single - wanted).max() < 0.2 * allowed
    assert np.abs(half - wanted).max() > allowed
