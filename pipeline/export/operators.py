"""The operators that an exported model may use, wherever it is to run; in this one place, so that the list stays small.

An operator is on the list because one of our networks or torchvision's uses it, or a quantised form of them
(`tests/unit/export/test_networks.py` exports them all), and because each runtime says that it executes it in opset 20:

- onnxruntime, CPU and CUDA: docs/OperatorKernels.md of microsoft/onnxruntime; what CUDA lacks runs on the CPU.
- Triton: its ONNX backend is onnxruntime.
- OpenVINO: src/frontends/onnx/docs/supported_ops.md of openvinotoolkit/openvino.
- onnxruntime-web: its WebAssembly engine is onnxruntime's CPU engine compiled, with all of its operators (js/web/README.md).
"""

from collections.abc import Iterator

import onnx

from pipeline.export.proto import nodes

ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Sqrt", "Pow", "Reciprocal", "Clip", "Cast"}
LAYERS = {"Conv", "Gemm", "MatMul", "Einsum", "MaxPool", "AveragePool", "GlobalAveragePool"}
SUMS = {"ReduceMean", "ReduceSum", "ReduceL2"}
NORMS = {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
ACTIVATIONS = {"Relu", "LeakyRelu", "Elu", "Erf", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softmax"}
SHAPES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Pad", "Expand", "Shape"}
PLACES = {"Constant", "ConstantOfShape", "Identity", "Gather", "GatherND", "ScatterND", "Where", "Equal", "Not", "Range"}
QUANTISED = {"QuantizeLinear", "DequantizeLinear"}
ALLOWED = frozenset(ARITHMETIC | LAYERS | SUMS | NORMS | ACTIVATIONS | SHAPES | PLACES | QUANTISED)


def operator_defects(model: onnx.ModelProto) -> Iterator[str]:
    """What keeps `model` from running everywhere: operators of other makers, and those that are not on the list."""
    used = {(node.domain, node.op_type) for node in nodes(model)}
    foreign = sorted({domain for domain, _ in used if domain not in ("", "ai.onnx")})
    if foreign:
        yield f"it uses operators of {', '.join(foreign)}, which other runtimes lack"
    unknown = sorted({name for domain, name in used if domain in ("", "ai.onnx") and name not in ALLOWED})
    if unknown:
        yield f"it uses {', '.join(unknown)}, which are not among the operators that every runtime is known to execute"
