import copy
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from torch import nn

from pipeline.config import Calibration
from pipeline.data.dataset import ShardDataset
from pipeline.errors import DataError, GateError
from pipeline.export import quantize
from pipeline.export.lint import require_clean
from pipeline.export.proto import metadata
from pipeline.export.quantize import (
    activation_ranges,
    network_tensors,
    to_float16,
    to_int8,
    with_precision,
    with_rounded_activations,
)
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from tests.unit.export.given import Images, scale_between
from tests.unit.export.sabotage import change_weight, weight_of


@pytest.fixture(scope="module")
def images(tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> Images:
    """The training split, (36, 3, 16, 16)."""
    dataset = ShardDataset(tiny_dataset, "train", tiny_spec)
    return np.stack([dataset.image(index).numpy() for index in range(len(dataset))])


def ask(model: onnx.ModelProto, images: Images, output: str = "probabilities") -> Images:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run([output], {"image": images})
    return np.asarray(answers)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every weight that a node reads, by the node's operator."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {node.op_type: types[node.input[1]] for node in model.graph.node if len(node.input) > 1 and node.input[1] in types}


# ---- float16 ----


def test_float16_answers_alike_in_half_the_bytes(
    exported_model: onnx.ModelProto, tiny_network: nn.Sequential, tiny_spec: PreprocessSpec, images: Images
) -> None:
    half = to_float16(exported_model)
    require_clean(half, tiny_spec, 20)
    with torch.no_grad():
        wanted = tiny_network(torch.from_numpy(images)).softmax(dim=1).numpy()
    # Logits of order 10 have steps of 0.008 in float16.
    np.testing.assert_allclose(ask(half, images), wanted, rtol=0, atol=5e-3)
    kept = [tensor.name for tensor in half.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert {*kept} == {node.input[1] for node in half.graph.node if node.op_type in ("Div", "Sub")}
    weights = [tensor for tensor in half.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
    assert sum(len(tensor.raw_data) for tensor in weights) == 2 * sum(np.prod(tensor.dims) for tensor in weights)
    assert metadata(half) == metadata(exported_model) | {"shardline.precision": "fp16"}


def test_normalisation_and_softmax_stay_in_float32(exported_model: onnx.ModelProto, images: Images) -> None:
    half = to_float16(exported_model)
    types = types_of(half)
    assert types["Div"] == types["Sub"] == onnx.TensorProto.FLOAT
    assert types["Conv"] == types["Gemm"] == onnx.TensorProto.FLOAT16
    assert ask(half, images, "logits").dtype == np.float32
    sums = ask(half, images).sum(axis=1)
    np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-6)  # in float16 it would be 5e-4


def test_true_half_precision_arithmetic_gives_the_same_answers(exported_model: onnx.ModelProto, images: Images) -> None:
    half = to_float16(exported_model)
    answers: Any = onnx.reference.ReferenceEvaluator(half).run(["probabilities"], {"image": images[:4]})
    # onnxruntime computes in float32 on a CPU; numpy rounds after every operator.
    np.testing.assert_allclose(answers[0], ask(half, images[:4]), rtol=0, atol=1e-2)


def test_rounded_activations_are_those_of_float16(exported_model: onnx.ModelProto, images: Images) -> None:
    edges = [0.0, 6.1e-5, 6.0e-5, 5.96e-8, 2.9e-8, 1e-9, 1.0005, 2049.0, 65504.0, 65519.0, -3.3e-6]
    values = np.concatenate([np.array(edges, np.float32), np.random.default_rng(0).normal(size=5000).astype(np.float32) ** 7])
    graph = onnx.helper.make_graph(
        quantize._rounding("x", "y"),
        "rounding",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None])],
        [onnx.numpy_helper.from_array(np.array(value, np.float32), name) for name, value in quantize.ROUNDING.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": values})
    assert (found == values.astype(np.float16).astype(np.float32)).all()
    rounded = with_rounded_activations(exported_model)
    true: Any = onnx.reference.ReferenceEvaluator(to_float16(exported_model)).run(["probabilities"], {"image": images[:4]})
    np.testing.assert_allclose(ask(rounded, images[:4]), true[0], rtol=0, atol=5e-3)  # numpy rounds sums, too


def test_a_number_that_keeps_a_divisor_from_0_does_not_become_0() -> None:
    rounded = quantize._nearest_float16(np.array([1e-12, -1e-9, 0.0, 0.1, 1.0], np.float32))
    assert rounded.dtype == np.float16
    assert rounded.tolist() == [2.0**-24, -(2.0**-24), 0.0, float(np.float16(0.1)), 1.0]


def test_a_weight_that_float16_cannot_hold_is_named(exported_model: onnx.ModelProto) -> None:
    scaled = scale_between(exported_model, 1e7)
    first = next(node for node in scaled.graph.node if node.op_type == "Conv")
    with pytest.raises(
        GateError, match=rf"the weight {re.escape(first.input[1])} reaches \d\.\de\+\d\d, and float16 ends at 65504"
    ):
        to_float16(scaled)
    broken = copy.deepcopy(exported_model)
    change_weight(weight_of(broken, first), lambda values: values * np.float32("nan"))
    with pytest.raises(GateError, match="reaches nan"):
        to_float16(broken)


def test_the_model_that_is_converted_is_not_changed(exported_model: onnx.ModelProto, images: Images) -> None:
    before = exported_model.SerializeToString(deterministic=True)
    to_float16(exported_model)
    to_int8(exported_model, [images], "minmax")
    with_precision(exported_model, "int8")
    assert exported_model.SerializeToString(deterministic=True) == before


# ---- INT8 ----


@pytest.mark.parametrize("calibration", ["minmax", "entropy"])
def test_int8_answers_alike_on_integers(
    exported_model: onnx.ModelProto, tiny_spec: PreprocessSpec, images: Images, calibration: Calibration
) -> None:
    integer = to_int8(exported_model, np.array_split(images, 3), calibration)
    require_clean(integer, tiny_spec, 20)
    same = ask(integer, images).argmax(axis=1) == ask(exported_model, images).argmax(axis=1)
    assert same.mean() >= 0.9
    assert metadata(integer) == metadata(exported_model) | {"shardline.precision": "int8"}
    assert integer.producer_name == "shardline"
    weights = [onnx.numpy_helper.to_array(t) for t in integer.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    # 7 bits: two products of them and of 8-bit activations fit 16 bits.
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights if weight.ndim > 1) == 64
    per_channel = {tensor.name: tensor.dims for tensor in integer.graph.initializer if tensor.name.endswith("weight_scale")}
    assert sorted(dims[0] for dims in per_channel.values()) == [3, 8, 16], "one scale a channel"


def test_logits_and_probabilities_are_not_cut_to_256_levels(exported_model: onnx.ModelProto, images: Images) -> None:
    integer = to_int8(exported_model, [images], "minmax")
    quantized = {node.input[0] for node in integer.graph.node if node.op_type == "QuantizeLinear"}
    assert not quantized & {"logits", "probabilities"}
    assert {node.op_type for node in integer.graph.node if {"logits"} & {*node.input}} == {"Softmax"}


def test_ranges_are_those_of_the_calibration_images_whatever_their_batches(
    exported_model: onnx.ModelProto, images: Images
) -> None:
    whole = activation_ranges(to_int8(exported_model, [images], "minmax"))
    parts = activation_ranges(to_int8(exported_model, np.array_split(images, 5), "minmax"))
    assert whole == parts
    dark = activation_ranges(to_int8(exported_model, [images // 8], "minmax"))
    normalised = exported_model.graph.node[3].output[0]
    assert dark[normalised][1] < whole[normalised][1] - 0.5


def test_entropy_cuts_off_what_hardly_occurs(exported_model: onnx.ModelProto, images: Images) -> None:
    spiked = images.copy()
    spiked[0, :, 0, 0] = 255
    minmax = activation_ranges(to_int8(exported_model, [spiked], "minmax"))
    entropy = activation_ranges(to_int8(exported_model, [spiked], "entropy"))
    assert entropy.keys() == minmax.keys()
    assert all(entropy[name][1] <= high * 1.01 for name, (_, high) in minmax.items())
    assert any(entropy[name][1] < high * 0.95 for name, (_, high) in minmax.items())


def test_what_onnxruntime_cannot_quantise_is_refused_with_its_reason(
    exported_model: onnx.ModelProto, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.export.quantize.INTEGER_OPERATORS", ["Conv", "NoSuchOperator"])
    unknown = copy.deepcopy(exported_model)
    unknown.graph.node[4].op_type = "NoSuchOperator"
    with pytest.raises(GateError, match=r"onnxruntime cannot quantise this graph: .*NoSuchOperator"):
        to_int8(unknown, [images], "minmax")


def test_images_that_cannot_be_read_are_no_fault_of_the_graph(exported_model: onnx.ModelProto) -> None:
    def unreadable() -> Iterator[Images]:
        raise DataError("no image can be decoded")
        yield

    with pytest.raises(DataError, match="no image can be decoded"):
        to_int8(exported_model, unreadable(), "minmax")


def test_nothing_is_printed_and_logging_goes_on_afterwards(
    exported_model: onnx.ModelProto, images: Images, capfd: pytest.CaptureFixture[str]
) -> None:
    to_int8(exported_model, [images], "entropy")
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_network_tensors_are_those_between_normalisation_and_logits(exported_model: onnx.ModelProto) -> None:
    names = network_tensors(exported_model)
    (normalised,) = [node.input[0] for node in exported_model.graph.node if node.op_type == "Conv"][:1]
    assert normalised not in names
    assert "logits" in names
    assert "probabilities" not in names
