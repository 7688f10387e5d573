"""What the tests of the smaller forms start from."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx

Images = npt.NDArray[np.uint8]


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def change(model: onnx.ModelProto, name: str, edit: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> None:
    """Edit the initializer `name`."""
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(edit(onnx.numpy_helper.to_array(tensor)).astype(np.float32), name))


def scale_between(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """The same function with the activations between the first two convolutions `factor` times as large."""
    scaled = copy_of(model)
    first, second = [node for node in scaled.graph.node if node.op_type == "Conv"][:2]
    for name in first.input[1:]:
        change(scaled, name, lambda values: values * np.float32(factor))
    change(scaled, second.input[1], lambda values: values / np.float32(factor))
    return scaled


def shrink_between(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with one activation made 2**26 times smaller and then as large as before."""
    shrunk = copy_of(model)
    place = next(number for number, node in enumerate(shrunk.graph.node) if node.op_type == "Relu")
    name = shrunk.graph.node[place].output[0]
    shrunk.graph.node[place].output[0] = f"{name}.0"
    for step, factor in enumerate((2.0**-13, 2.0**-13, 2.0**13, 2.0**13)):
        made = name if step == 3 else f"{name}.{step + 1}"
        shrunk.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), f"factor.{step}"))
        node = onnx.helper.make_node("Mul", [f"{name}.{step}", f"factor.{step}"], [made], name=f"shrink.{step}")
        shrunk.graph.node.insert(place + 1 + step, node)
    return shrunk


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}
