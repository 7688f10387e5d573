import onnx

from pipeline.export.proto import constants, nodes, tensors, texts
from tests.unit.export import sabotage


def test_what_lies_in_branches_functions_and_attributes_is_found(model: onnx.ModelProto) -> None:
    sabotage.hide_a_dropout_in_a_branch(model)
    sabotage.train_in_a_function(model)
    sabotage.keep_a_constant_of_a_branch_elsewhere(model)
    sabotage.keep_sparse_weights_elsewhere(model)
    kinds = [node.op_type for node in nodes(model)]
    assert (kinds.count("Dropout"), kinds.count("BatchNormalization")) == (2, 1)
    assert {"c", "sparse"} <= {tensor.name for tensor in tensors(model)}


def test_every_word_is_found_and_no_weight_is_taken_for_one(model: onnx.ModelProto) -> None:
    sabotage.leak_in_an_attribute(model)
    model.graph.initializer[0].raw_data = b"SECRET" + model.graph.initializer[0].raw_data[6:]
    found = set(texts(model))
    assert {"image", "logits", "shardline.class_names", f"{sabotage.HOME}/.venv"} <= found
    assert not [text for text in found if "SECRET" in text]


def test_constants_are_found_as_initializers_and_as_nodes(model: onnx.ModelProto) -> None:
    value = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["two"], value=value))
    found = constants(model)
    assert list(found["two"].dims) == [2]
    assert {tensor.name for tensor in model.graph.initializer} < set(found)
