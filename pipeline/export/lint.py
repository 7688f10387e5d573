"""What the graph of an exported model may hold, looked at before anybody asks it anything.

Parity cannot see all of it: onnxruntime's optimiser removes a dropout that was left in training mode, a leaked path gives right
answers, and so does a file that reads its weights from another one as long as that lies beside it.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch

from pipeline.errors import GateError
from pipeline.export.graph import BATCH, PREFIX
from pipeline.export.operators import operator_defects
from pipeline.export.proto import nodes, tensors, texts
from pipeline.preprocess import PreprocessSpec

RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
# What a path of the machine that built the model looks like, whichever machine that was.
PATHS = re.compile(
    r"[\w./~-]*(?:(?:site|dist)-packages|/(?:home|root|Users)/|\.pyc?\b)[\w./-]*|\b[A-Za-z]:\\[\w.\\-]*"
    r"|(?<![\w./-])/(?:mnt|srv|opt|usr|var|tmp|data|scratch|workspace|media|nfs|lustre|Volumes)/[\w.-]+/[\w./-]*"
)
PASSWORD = re.compile(r"\b\w+://[^/\s:@]+:[^/\s@]+@")


def require_clean(model: onnx.ModelProto, spec: PreprocessSpec, opset: int) -> None:
    """Lint the graph. Raises GateError naming everything that breaks the contract of an exported model."""
    defects = [
        *_training_defects(model),
        *_random_defects(model),
        *_signature_defects(model, spec),
        *_file_defects(model),
        *_opset_defects(model, opset),
        *operator_defects(model),
        *_leak_defects(model),
    ]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        defects.append(f"it is not valid ONNX: {str(error).splitlines()[0]}")
    if defects:
        raise GateError(f"the exported graph is refused: {'; '.join(dict.fromkeys(defects))}.")


def _training_defects(model: onnx.ModelProto) -> Iterator[str]:
    for node in nodes(model):
        # Of a function's node the mode may be its caller's to say.
        training = any(mode.name == "training_mode" and (mode.i or mode.ref_attr_name) for mode in node.attribute)
        if node.op_type == "Dropout" or training:
            yield f"node {node.name} ({node.op_type}) belongs to training"


def _random_defects(model: onnx.ModelProto) -> Iterator[str]:
    for node in nodes(model):
        if node.op_type in RANDOM:
            yield f"node {node.name} ({node.op_type}) draws random numbers, so the same image has another answer each time"


def _signature_defects(model: onnx.ModelProto, spec: PreprocessSpec) -> Iterator[str]:
    assert spec.fixed_size is not None
    inputs, outputs = ([_signature(value) for value in values] for values in (model.graph.input, model.graph.output))
    for name, _, shape in [*inputs, *outputs]:
        if shape and shape[0] != BATCH:
            yield f"the batch axis of `{name}` is frozen at {shape[0]}" if shape[0] else f"`{name}` has no named batch axis"
    if [(name, kind, shape[1:]) for name, kind, shape in inputs] != [("image", onnx.TensorProto.UINT8, [3, *spec.fixed_size])]:
        yield f"its input is {inputs}, not one `image` of uint8 (batch, 3, {spec.fixed_size[0]}, {spec.fixed_size[1]})"
    found = [(name, kind, len(shape)) for name, kind, shape in outputs]
    if found != [(name, onnx.TensorProto.FLOAT, 2) for name in ("logits", "probabilities")]:
        yield f"its outputs are {outputs}, not `logits` and `probabilities` of float32 (batch, classes)"


def _signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]


def _file_defects(model: onnx.ModelProto) -> Iterator[str]:
    for tensor in tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            yield f"it keeps weights in another file ({tensor.name or 'a constant'})"


def _opset_defects(model: onnx.ModelProto, opset: int) -> Iterator[str]:
    imports = [*model.opset_import, *(entry for function in model.functions for entry in function.opset_import)]
    foreign = sorted({entry.domain for entry in imports} - {"", "ai.onnx"})
    if foreign:
        yield f"it asks for operators of {', '.join(foreign)}"
    if model.functions:
        yield f"it has functions of its own ({', '.join(function.name for function in model.functions)})"
    for version in sorted({entry.version for entry in imports if entry.domain in ("", "ai.onnx")} - {opset}):
        yield f"its opset is {version}, not {opset}"


def _leak_defects(model: onnx.ModelProto) -> Iterator[str]:
    home = Path(os.environ.get("HOME") or "/")  # some users have none
    folders = {Path.cwd(), home, Path(__file__).parents[2], Path(torch.__file__).parents[1], Path(sys.prefix)}
    folders |= {Path(tempfile.gettempdir())}
    own = re.compile("|".join(rf"{re.escape(str(folder))}(?![\w.-])[\w./-]*" for folder in folders if len(folder.parts) > 1))
    # A class may be called anything.
    theirs = {entry.value for entry in model.metadata_props if entry.key == f"{PREFIX}class_names"}
    for text in set(texts(model)) - theirs:
        found = own.search(text) or PATHS.search(text)
        if found:
            yield f"it holds the path {found[0]} of the machine that built it"
        if PASSWORD.search(text):
            yield "it holds an address with a password"
