"""What the tests of the smaller forms start from."""

import copy

import numpy as np
import numpy.typing as npt
import onnx

from tests.unit.export.sabotage import change_weight, weight_of

Images = npt.NDArray[np.uint8]


def scale_between(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """The same function with the activations between the first two convolutions `factor` times as large."""
    scaled = copy.deepcopy(model)
    first, second = [node for node in scaled.graph.node if node.op_type == "Conv"][:2]
    for place in (1, 2):
        change_weight(weight_of(scaled, first, place), lambda values: values * np.float32(factor))
    change_weight(weight_of(scaled, second), lambda values: values / np.float32(factor))
    return scaled


def shrink_between(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with one activation made 2**26 times smaller and then as large as before."""
    shrunk = copy.deepcopy(model)
    place = next(number for number, node in enumerate(shrunk.graph.node) if node.op_type == "Relu")
    name = shrunk.graph.node[place].output[0]
    shrunk.graph.node[place].output[0] = f"{name}.0"
    for step, factor in enumerate((2.0**-13, 2.0**-13, 2.0**13, 2.0**13)):
        made = name if step == 3 else f"{name}.{step + 1}"
        shrunk.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), f"factor.{step}"))
        node = onnx.helper.make_node("Mul", [f"{name}.{step}", f"factor.{step}"], [made], name=f"shrink.{step}")
        shrunk.graph.node.insert(place + 1 + step, node)
    return shrunk
