"""Every way in which we know an exported model to go wrong; each function damages a model as one real mistake would."""

import json
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Change = Callable[[onnx.ModelProto], None]
HOME = "/home/somebody/shardline"


def node_of(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    """The node that makes a value."""
    (found,) = [node for node in model.graph.node if output in node.output]
    return typing.cast(onnx.NodeProto, found)


def insert_behind(model: onnx.ModelProto, value: str, *nodes: onnx.NodeProto) -> None:
    """Put nodes between a value and whoever reads it; the first reads `value`, the last makes what is read instead."""
    place = 0 if value == "image" else list(model.graph.node).index(node_of(model, value)) + 1
    for node in model.graph.node:
        node.input[:] = [nodes[-1].output[0] if name == value else name for name in node.input]
    for node in reversed(nodes):
        model.graph.node.insert(place, node)


def weight_of(model: onnx.ModelProto, node: onnx.NodeProto, place: int = 1) -> onnx.TensorProto:
    """The initializer that a node reads."""
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[place]]
    return typing.cast(onnx.TensorProto, found)


def change_weight(tensor: onnx.TensorProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put other numbers of the same kind into an initializer."""
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(values.copy())).astype(values.dtype), tensor.name))


def features_of(model: onnx.ModelProto) -> str:
    """What the last layer reads."""
    return str(node_of(model, "logits").input[0])


# ---- training mode, noise ----


def add_training_dropout(model: onnx.ModelProto) -> None:
    """What an export in training mode leaves: noise on the features that an optimiser may or may not remove."""
    ratio = helper.make_tensor("ratio", TensorProto.FLOAT, [], [0.5])
    mode = helper.make_tensor("mode", TensorProto.BOOL, [], [True])
    model.graph.initializer.extend([ratio, mode])
    features = features_of(model)
    insert_behind(model, features, helper.make_node("Dropout", [features, "ratio", "mode"], ["noisy"], name="noise"))


def train_the_norm(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("training_mode", 1))


def train_in_a_function(model: onnx.ModelProto) -> None:
    """A function whose caller says that it trains."""
    norm = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="norm")
    norm.attribute.append(onnx.AttributeProto(name="training_mode", type=onnx.AttributeProto.INT, ref_attr_name="mode"))
    names = ["x", "s", "b", "m", "v"]
    opset = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("local", "Norm", names, ["y"], [norm], opset, ["mode"]))
    model.opset_import.append(helper.make_opsetid("local", 1))


def hide_a_dropout_in_a_branch(model: onnx.ModelProto) -> None:
    """An If whose branch holds the noise: what a network with a condition in it exports."""
    dropout = helper.make_node("Dropout", ["probabilities"], ["branch"], name="noise")
    value = helper.make_tensor_value_info("branch", TensorProto.FLOAT, ["batch", 3])
    branch = helper.make_graph([dropout], "branch", [], [value])
    model.graph.initializer.append(helper.make_tensor("condition", TensorProto.BOOL, [], [True]))
    model.graph.node.append(
        helper.make_node("If", ["condition"], ["unused"], name="if", then_branch=branch, else_branch=branch)
    )


def draw_noise(model: onnx.ModelProto, scale: float = 1e-3) -> None:
    """Random numbers of this size, added to the features."""
    features = features_of(model)
    noise = helper.make_node("RandomNormalLike", [features], ["drawn"], name="noise", dtype=TensorProto.FLOAT, scale=scale)
    insert_behind(model, features, noise, helper.make_node("Add", [features, "drawn"], ["noisy"]))


# ---- what a comparison with the network sees ----


def turn_the_channels(model: onnx.ModelProto) -> None:
    """The graph turns RGB into BGR itself."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))
    insert_behind(model, "image", helper.make_node("Gather", ["image", "bgr"], ["turned"], axis=1))


def turn_the_weights(model: onnx.ModelProto) -> None:
    """The first convolution was made for BGR."""
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    change_weight(weight_of(model, first), lambda weight: weight[:, ::-1])


def move_the_mean(model: onnx.ModelProto, by: float = 0.1) -> None:
    (subtraction,) = [node for node in model.graph.node if node.op_type == "Sub"]
    change_weight(weight_of(model, subtraction), lambda mean: mean + by)


def leave_out_the_normalisation(model: onnx.ModelProto) -> None:
    """Whoever serves the model is thought to normalise."""
    (subtraction,) = [node for node in model.graph.node if node.op_type == "Sub"]
    (cast,) = [node for node in model.graph.node if node.op_type == "Cast"]
    normalised = next(node for node in model.graph.node if node.op_type == "Conv").input[0]
    for node in model.graph.node:
        node.input[:] = [cast.output[0] if name == normalised else name for name in node.input]
    for node in [subtraction, *(node for node in model.graph.node if node.op_type == "Div")]:
        model.graph.node.remove(node)


def hide_the_input(model: onnx.ModelProto) -> None:
    """What follows the input says nothing of a normalisation."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 3, 16, 16]), "same"))
    insert_behind(model, "image", helper.make_node("Reshape", ["image", "same"], ["shown"]))


def transpose_the_classes(model: onnx.ModelProto) -> None:
    """The last layer's first two outputs change places."""
    last = node_of(model, "logits")
    for place in range(1, len(last.input)):  # a bias of zeros is left out
        change_weight(weight_of(model, last, place), lambda weight: weight[[1, 0, 2]])


def overflow(model: onnx.ModelProto) -> None:
    """Features that float16 cannot hold, as when weights were converted without looking at what they meet."""
    features = features_of(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e6, np.float32), "large"))
    insert_behind(
        model,
        features,
        helper.make_node("Mul", [features, "large"], ["huge"]),
        helper.make_node("Cast", ["huge"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["whole"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["whole", "large"], ["overflown"]),
    )


def freeze_the_batch_inside(model: onnx.ModelProto) -> None:
    """The signature says any batch, a reshape inside says 2: what tracing by example leaves."""
    features = features_of(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, -1]), "two"))
    insert_behind(model, features, helper.make_node("Reshape", [features, "two"], ["frozen"]))
    del model.graph.value_info[:]


def sharpen_the_probabilities(model: onnx.ModelProto) -> None:
    softmax = node_of(model, "probabilities")
    model.graph.initializer.append(numpy_helper.from_array(np.array(2.0, np.float32), "two"))
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Mul", ["logits", "two"], ["doubled"]))
    softmax.input[0] = "doubled"


def raise_the_logits_of_bright_images(model: onnx.ModelProto) -> None:
    """A mistake that few images meet, and that changes no class."""
    last = node_of(model, "logits")
    place = list(model.graph.node).index(last) + 1
    last.output[0] = "plain"
    numbers = {"sides": np.array([2, 3]), "channels": np.array([1]), "bright": np.float32(200), "share": np.float32(0.05)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items())
    nodes = [
        helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["levels", "sides"], ["means"], keepdims=0),
        helper.make_node("ReduceMean", ["means", "channels"], ["mean_level"], keepdims=1),
        helper.make_node("Sub", ["mean_level", "bright"], ["above"]),
        helper.make_node("Relu", ["above"], ["excess"]),
        helper.make_node("Mul", ["excess", "share"], ["raise"]),
        helper.make_node("Add", ["plain", "raise"], ["logits"]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(place, node)


def change_a_weight(model: onnx.ModelProto, value: float = 3.0) -> None:
    """Set the first number of the largest weight."""
    largest = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))

    def change(weights: np.ndarray) -> np.ndarray:
        weights.flat[0] = value
        return weights

    change_weight(largest, change)


# ---- what the file says of itself ----


def set_metadata(model: onnx.ModelProto, name: str, value: str) -> None:
    """Say something else of the model."""
    (entry,) = [entry for entry in model.metadata_props if entry.key == f"shardline.{name}"]
    entry.value = value


def rename_the_classes(model: onnx.ModelProto) -> None:
    set_metadata(model, "class_names", json.dumps(["green", "blue", "red"]))


def claim_another_size(model: onnx.ModelProto) -> None:
    (entry,) = [entry for entry in model.metadata_props if entry.key == "shardline.preprocess"]
    entry.value = json.dumps({**json.loads(entry.value), "interpolation": "nearest"})


def claim_another_task(model: onnx.ModelProto) -> None:
    set_metadata(model, "task", "multi")


def claim_other_data(model: onnx.ModelProto) -> None:
    set_metadata(model, "data_digest", "e" * 64)


def say_nothing(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


# ---- the graph and the file ----


def rename_the_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "x"
    for node in model.graph.node:
        node.input[:] = ["x" if name == "image" else name for name in node.input]


def rename_an_output(model: onnx.ModelProto) -> None:
    node_of(model, "probabilities").output[0] = "p"
    model.graph.output[1].name = "p"


def freeze_the_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def freeze_the_batch_of_an_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2


def leave_the_batch_unnamed(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")


def keep_weights_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def constant_elsewhere() -> onnx.NodeProto:
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return helper.make_node("Constant", [], ["constant"], name="constant", value=tensor)


def keep_a_constant_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.append(constant_elsewhere())


def keep_a_constant_of_a_branch_elsewhere(model: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info("constant", TensorProto.FLOAT, [1])
    branch = helper.make_graph([constant_elsewhere()], "branch", [], [value])
    model.graph.node.append(helper.make_node("If", ["condition"], ["unused"], then_branch=branch, else_branch=branch))


def keep_sparse_weights_elsewhere(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.name, sparse.values.data_location = "sparse", TensorProto.EXTERNAL


def use_a_private_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Secret", ["image"], ["unused"], domain="com.acme"))


def use_a_rare_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Det", ["probabilities"], ["unused"]))


def cut_a_wire(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "nothing"


def leak_in_a_note(model: onnx.ModelProto) -> None:
    model.graph.node[0].doc_string = f"{Path(__file__).parents[3]}/pipeline/models"


def leak_in_a_name(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = f"{HOME}/network/conv1"


def leak_a_folder_of_data(model: onnx.ModelProto) -> None:
    model.graph.node[0].doc_string = "from /mnt/patients/2026/scans"


def leak_a_password(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="source", value="s3://key:secret@bucket/images")


def ask_for_another_domain(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.acme", version=1)


def bring_a_function(model: onnx.ModelProto) -> None:
    """Of the name of a standard operator."""
    opset = [helper.make_opsetid("", 20)]
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [node], opset))


def leak_in_a_nodes_metadata(model: onnx.ModelProto) -> None:
    model.graph.node[0].metadata_props.add(key="source", value="models/network.py:12")


def leak_in_the_metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="shardline.source", value="C:\\Users\\somebody\\network")


def leak_in_an_attribute(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="text", data_type=TensorProto.STRING, dims=[1], string_data=[f"{HOME}/.venv".encode()])
    model.graph.node.append(helper.make_node("Constant", [], ["text"], name="text", value=tensor))
