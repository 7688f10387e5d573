"""From a trained network to an ONNX model: input `image` uint8 (batch, 3, H, W), outputs `logits` and `probabilities`.

A module left in training mode exports its dropout, and onnxruntime's optimiser hides that from a parity test; so
evaluation mode is forced here, and the finished graph is linted for it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

from pipeline.errors import GateError
from pipeline.preprocess import PreprocessSpec
from pipeline.task import Task

PREFIX = "shardline."


class Answers(nn.Module):
    """The trained network with its logits (N, num_outputs) and, for people, the probabilities of all classes (N, K)."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities of uint8 images (N, 3, H, W)."""
        logits = self.network(image)
        return logits, self.task.probabilities(logits)


def export_graph(
    network: nn.Module, task: Task, spec: PreprocessSpec, opset: int, metadata: dict[str, object]
) -> onnx.ModelProto:
    """Return the ONNX model of `network`, with `metadata` under `shardline.` and nothing of the machine that built it."""
    assert spec.fixed_size is not None
    answers = Answers(network, task).cpu().eval()
    example = torch.zeros(2, 3, *spec.fixed_size, dtype=torch.uint8)
    program = torch.onnx.export(
        answers,
        (example,),
        dynamo=True,
        input_names=["image"],
        output_names=["logits", "probabilities"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=opset,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _strip_building_machine(model)
    model.producer_name = "shardline"
    model.producer_version = ""
    onnx.helper.set_model_props(model, {f"{PREFIX}{key}": _as_text(value) for key, value in metadata.items()})
    return model


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _strip_building_machine(model: onnx.ModelProto) -> None:
    """Remove stack traces and source paths, which the exporter leaves on nodes, values and functions."""
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in _graphs(model):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            value.doc_string = ""
            del value.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
    for node in _nodes(model):
        node.doc_string = ""
        del node.metadata_props[:]


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield model.graph
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph, its functions and all their subgraphs."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            waiting += attribute.g.node
            for graph in attribute.graphs:
                waiting += graph.node


def require_clean(model: onnx.ModelProto, spec: PreprocessSpec, opset: int) -> None:
    """Lint the graph. Raises GateError naming everything that breaks the contract of an exported model."""
    defects = [
        *_training_defects(model),
        *_signature_defects(model, spec),
        *_opset_defects(model, opset),
        *_leak_defects(model),
    ]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        defects.append(f"it is not valid ONNX: {str(error).splitlines()[0]}")
    if defects:
        raise GateError(f"the exported graph is refused: {'; '.join(defects)}.")


def _training_defects(model: onnx.ModelProto) -> Iterator[str]:
    for node in _nodes(model):
        training = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
        if node.op_type == "Dropout" or training:
            yield f"node {node.name} ({node.op_type}) belongs to training"


def _signature_defects(model: onnx.ModelProto, spec: PreprocessSpec) -> Iterator[str]:
    assert spec.fixed_size is not None
    inputs = [_signature(value) for value in model.graph.input]
    if inputs != [("image", onnx.TensorProto.UINT8, ["batch", 3, *spec.fixed_size])]:
        yield f"its input is {inputs}"
    outputs = [(name, kind, shape[0]) for name, kind, shape in map(_signature, model.graph.output)]
    wanted = [(name, onnx.TensorProto.FLOAT, "batch") for name in ("logits", "probabilities")]
    if outputs != wanted:
        yield f"its outputs are {outputs}"
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        yield "it keeps weights in another file"


def _signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]


def _opset_defects(model: onnx.ModelProto, opset: int) -> Iterator[str]:
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found.get("") != opset:
        yield f"its opset is {found.get('')}, not {opset}"
    foreign = sorted({node.domain for node in _nodes(model) if node.domain not in ("", "ai.onnx")})
    if foreign:
        yield f"it uses operators of {', '.join(foreign)}, which other runtimes lack"


def _leak_defects(model: onnx.ModelProto) -> Iterator[str]:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        tensor.ClearField("raw_data")  # megabytes of weights hold any few bytes by chance
    content = bare.SerializeToString()
    for folder in {Path.cwd(), Path.home(), Path(__file__).parents[2], Path(torch.__file__).parents[1]}:
        if len(folder.parts) > 1 and str(folder).encode() in content:
            yield f"it holds the path {folder} of this machine"
