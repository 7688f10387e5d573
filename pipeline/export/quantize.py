"""Smaller forms of a proved float32 model: float16 weights and arithmetic, or 8-bit integers in QDQ form (static INT8).

Both keep the contract of the file: uint8 images in, float32 logits and probabilities out. The normalisation before the first
weights and the softmax or sigmoid behind the logits stay in float32, where a rounded constant would cost every image a digit.

onnxruntime's own float16 converter is not used: it takes the kept parts through float16 and back at every node, and what it
makes fails ONNX's full check (1.32). A newcomer would hand `quantize_static` the model itself, which empties its weights into a
temporary folder; it gets a file.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime import quantization
from onnxruntime.quantization import calibrate

from pipeline.config import Calibration, Precision
from pipeline.errors import GateError, ShardlineError
from pipeline.export.graph import PREFIX, strip_building_machine
from pipeline.export.proto import metadata

WEIGHTED = ("Conv", "Gemm", "MatMul")
LARGEST_FLOAT16 = 65504.0
# What computes on 8-bit integers. Activation functions that are not here (sigmoid, GELU, ...) and attention stay in float32.
INTEGER_OPERATORS = [
    *("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Flatten", "Reshape", "Transpose"),
]
Images = npt.NDArray[np.uint8]


def with_precision(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """A copy of `model` whose metadata names its precision."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.helper.set_model_props(copy, metadata(model) | {f"{PREFIX}precision": precision})
    return copy


# ---- float16 ----


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float16 between normalisation and logits. Raises GateError where a weight is beyond float16."""
    half = with_precision(model, "fp16")
    graph = half.graph
    is_float = _float_tensors(half)
    inner = _network_nodes(graph)
    if half.functions or any(attribute.type == onnx.AttributeProto.GRAPH for node in inner for attribute in node.attribute):
        raise GateError("the graph has functions or subgraphs, which are not converted to float16")
    made_inside = {name for node in inner for name in node.output}
    renamed = {}  # what the inner nodes read instead
    for name in dict.fromkeys(name for node in inner for name in node.input if name in is_float and name not in made_inside):
        renamed[name] = f"{name}.fp16"
    weights = {tensor.name: tensor for tensor in graph.initializer}
    casts = []
    for name, new in renamed.items():
        if name in weights:
            graph.initializer.append(_rounded(weights[name], new))
        else:
            casts.append(onnx.helper.make_node("Cast", [name], [new], name=f"cast.{new}", to=onnx.TensorProto.FLOAT16))
    for node in inner:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = ["logits.fp16" if name == "logits" else name for name in node.output]  # the only one that leaves
        _cast_to_float16(node)
    casts.append(onnx.helper.make_node("Cast", ["logits.fp16"], ["logits"], name="cast.logits", to=onnx.TensorProto.FLOAT))
    return _finished(half, [*graph.node, *casts])


def with_rounded_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float32 with every value between normalisation and logits rounded to what float16 holds, short of overflow.

    A pair of casts would be taken out again by onnxruntime. To 11 bits a float32 is rounded by c - (c - x), c = (2**13 + 1) x
    (Veltkamp; Dekker 1971); below 2**-14, where float16 has steps of 2**-24, by adding and subtracting a number whose own last
    bit is that.
    """
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    is_float, inner = _float_tensors(rounded), _network_nodes(rounded.graph)
    weights = {tensor.name: tensor for tensor in rounded.graph.initializer}
    made_inside = {name for node in inner for name in node.output}
    read = dict.fromkeys(name for node in inner for name in node.input if name in is_float and name not in made_inside)
    nodes = [*rounded.graph.node]
    for name in read:
        if name in weights:
            values = _nearest_float16(onnx.numpy_helper.to_array(weights[name])).astype(np.float32)
            weights[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
        else:
            nodes += _rounding(name, f"{name}.rounded")
    for node in inner:
        node.input[:] = [f"{name}.rounded" if name in read and name not in weights else name for name in node.input]
        for place, name in enumerate(node.output):
            if name in is_float:
                node.output[place] = f"{name}.exact"
                nodes += _rounding(f"{name}.exact", name)
    for name, value in ROUNDING.items():
        rounded.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
    return _finished(rounded, nodes)


ROUNDING = {"round.normal": 2.0**-14, "round.steps": 0.75, "round.split": 2.0**13 + 1}


def _rounding(name: str, rounded: str) -> list[onnx.NodeProto]:
    """Nodes that make `rounded` of the tensor `name`."""
    steps = [
        ("Abs", [name], "size"),
        ("Less", ["size", "round.normal"], "is_small"),
        ("Add", [name, "round.steps"], "shifted"),
        ("Sub", ["shifted", "round.steps"], "small"),
        ("Mul", [name, "round.split"], "split"),
        ("Sub", ["split", name], "rest"),
        ("Sub", ["split", "rest"], "normal"),
        ("Where", ["is_small", "small", "normal"], ""),
    ]
    own = {made: f"{rounded}.{made}" if made else rounded for _, _, made in steps}
    return [
        onnx.helper.make_node(operator, [own.get(value, value) for value in read], [own[made]], name=f"round.{own[made]}")
        for operator, read, made in steps
    ]


def _rounded(weight: onnx.TensorProto, name: str) -> onnx.TensorProto:
    values = onnx.numpy_helper.to_array(weight)
    peak = float(np.abs(values).max()) if values.size else 0.0
    if not peak <= LARGEST_FLOAT16:
        raise GateError(f"the weight {weight.name} reaches {peak:.1e}, and float16 ends at {LARGEST_FLOAT16:.0f}")
    return onnx.numpy_helper.from_array(_nearest_float16(values), name)


def _nearest_float16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Rounded, but a number that keeps a divisor from being 0 never to 0 itself."""
    rounded = values.astype(np.float16)
    vanished = (rounded == 0) & (values != 0)
    return np.where(vanished, np.copysign(np.float16(2.0**-24), values), rounded).astype(np.float16)


def _cast_to_float16(node: onnx.NodeProto) -> None:
    """Change what a node says of the type that it makes."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = onnx.TensorProto.FLOAT16
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == onnx.TensorProto.FLOAT:
            attribute.t.CopyFrom(_rounded(attribute.t, attribute.t.name))


def _network_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes from the first weights to the logits: behind the normalisation and before softmax or sigmoid."""
    behind_weights, behind_logits = set[str](), {"logits"}
    found = []
    for node in graph.node:  # in the order of computation
        if behind_logits.intersection(node.input):
            behind_logits.update(node.output)
        elif node.op_type in WEIGHTED or behind_weights.intersection(node.input):
            behind_weights.update(node.output)
            found.append(node)
    return found


def network_tensors(model: onnx.ModelProto) -> list[str]:
    """Names of the activations between normalisation and logits, which a smaller form holds in fewer bits."""
    is_float = _float_tensors(model)
    return [name for node in _network_nodes(model.graph) for name in node.output if name in is_float]


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    return values | weights | {value.name for value in graph.output}


def _finished(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """`model` with `nodes` in an order in which they can be computed, and the initializers that they read."""
    nodes = _in_order(nodes, {value.name for value in [*model.graph.input, *model.graph.initializer]})
    needed = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    graph = onnx.helper.make_graph(nodes, model.graph.name, model.graph.input, model.graph.output, initializers)
    model.graph.CopyFrom(graph)
    return model


def _in_order(nodes: list[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    ordered = []
    while nodes:
        ready = [node for node in nodes if known.issuperset(filter(None, node.input))]
        assert ready, "the graph has a circle"
        known.update(name for node in ready for name in node.output)
        ordered += ready
        done = set(map(id, ready))
        nodes = [node for node in nodes if id(node) not in done]
    return ordered


# ---- static INT8 ----


def to_int8(model: onnx.ModelProto, batches: Iterable[Images], calibration: Calibration) -> onnx.ModelProto:
    """The model with 8-bit weights, each output channel by a scale of its own, and 8-bit activations. Raises GateError.

    `batches`, each (n, 3, H, W), show the ranges of the activations: from the smallest to the largest value (minmax), or cut
    where the histogram keeps most information (entropy: Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Weights have 7 bits, so that pairs of products fit 16 bits: x86 without VNNI adds them saturating, and the same file would
    give other answers there. The sums of fully connected layers are not cut to 8 bits again: logits of 256 levels would move
    probabilities by 0.004 between two implementations of the same graph; so it is 0.0001 (digits).
    """
    integer = with_precision(model, "int8")
    inner = {node.name for node in _network_nodes(integer.graph)}
    outside = [node.name for node in integer.graph.node if node.name not in inner]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, ranges, target = (Path(folder) / name for name in ("fp32.onnx", "ranges.json", "int8.onnx"))
        onnx.save(onnx.shape_inference.infer_shapes(integer), source)
        try:
            calibrate.save_tensors_data(_ranges(source, batches, calibration), ranges)
            quantization.quantize_static(
                source,
                target,
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=INTEGER_OPERATORS,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=outside,
                calibrate_method=METHODS[calibration],
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"], "MatMulConstBOnly": True},
                calibration_cache_path=ranges,
            )
        except ShardlineError:  # of the images
            raise
        except Exception as error:  # neither onnxruntime nor its tools have a common base for their errors
            raise GateError(f"onnxruntime cannot quantise this graph: {' '.join(str(error).split())[:200]}") from error
        quantized = onnx.load(target)
    strip_building_machine(quantized)
    quantized.producer_name, quantized.producer_version = model.producer_name, model.producer_version
    quantized.metadata_props.extend(integer.metadata_props)
    return quantized


METHODS = {"minmax": quantization.CalibrationMethod.MinMax, "entropy": quantization.CalibrationMethod.Entropy}
# onnxruntime's default of 128 bins for 128 levels leaves entropy nothing to choose: it would be a symmetric minmax.
HISTOGRAM = {"num_bins": 1024, "num_quantized_bins": 128}


class _Batch:
    """One batch, as onnxruntime's calibrators ask for it."""

    def __init__(self, images: Images) -> None:
        self.waiting = [{"image": images}]

    def get_next(self) -> dict[str, Images] | None:
        return self.waiting.pop() if self.waiting else None


def _ranges(source: Path, batches: Iterable[Images], calibration: Calibration) -> Any:
    """The range of each activation. Batch by batch, because a calibrator keeps every activation of what it is given at once."""
    calibrator = calibrate.create_calibrator(
        source,
        INTEGER_OPERATORS,
        augmented_model_path=str(source.with_name("augmented.onnx")),
        calibrate_method=METHODS[calibration],
        extra_options=HISTOGRAM if calibration == "entropy" else {},
    )
    for images in batches:
        calibrator.collect_data(_Batch(images))
    return calibrator.compute_data()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's prints, and its advice to optimise the graph first, which would make it one for this machine."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def activation_ranges(int8: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """The smallest and largest value that each quantized activation can hold, by the tensor's name."""
    known = {tensor.name: tensor for tensor in int8.graph.initializer}
    found = {}
    for node in int8.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = (onnx.numpy_helper.to_array(known[name]) for name in node.input[1:3])
            limits = np.iinfo(zero.dtype)
            found[node.input[0]] = tuple(float((limit - int(zero)) * scale) for limit in (limits.min, limits.max))
    return found  # type: ignore[return-value]
