"""Everything inside an ONNX model, however deep: functions, subgraphs and attributes hold nodes, tensors and text as well.

A newcomer would look at `model.graph.node` and `model.graph.initializer` alone, and miss the branch of an If.
"""

from collections.abc import Iterator
from typing import Any

import onnx


def parts(message: Any) -> Iterator[Any]:
    """`message` and every message inside it, in the order of the file, each before its own parts."""
    waiting = [message]
    while waiting:
        part = waiting.pop()
        yield part
        inside = list[Any]()
        for field, value in part.ListFields():
            if field.type == field.TYPE_MESSAGE:
                inside += value if field.is_repeated else [value]
        waiting += reversed(inside)


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph, its functions and all their subgraphs."""
    return (part for part in parts(model) if isinstance(part, onnx.NodeProto))


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor: initializers, the two halves of sparse ones, and constants in attributes."""
    return (part for part in parts(model) if isinstance(part, onnx.TensorProto))


def texts(model: onnx.ModelProto) -> Iterator[str]:
    """Every name, note and string; the numbers of tensors are none."""
    for part in parts(model):
        for field, value in part.ListFields():
            if field.type not in (field.TYPE_STRING, field.TYPE_BYTES) or field.name == "raw_data":
                continue
            for text in value if field.is_repeated else [value]:
                yield text if isinstance(text, str) else text.decode(errors="replace")


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """What the file says of itself, by key."""
    return {entry.key: entry.value for entry in model.metadata_props}


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """What the nodes of the outermost graph can read as a constant, by its name."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found
