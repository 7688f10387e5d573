from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import GateError
from pipeline.export.graph import export_graph, require_clean
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec
from tests.unit.conftest import THREE_CLASSES

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture
def model(exported_model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(exported_model)
    return copy


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def test_a_network_in_training_mode_is_exported_for_inference(model: onnx.ModelProto, tiny_spec: PreprocessSpec) -> None:
    require_clean(model, tiny_spec, 20)
    assert "Dropout" not in {node.op_type for node in nodes(model)}


def test_the_signature_is_the_contract(model: onnx.ModelProto) -> None:
    (image,) = model.graph.input
    logits, probabilities = model.graph.output
    assert (image.name, logits.name, probabilities.name) == ("image", "logits", "probabilities")
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [axis.dim_param or axis.dim_value for axis in image.type.tensor_type.shape.dim] == ["batch", 3, 16, 16]
    assert [axis.dim_param or axis.dim_value for axis in logits.type.tensor_type.shape.dim] == ["batch", 3]


def test_nothing_of_the_building_machine_is_inside(model: onnx.ModelProto) -> None:
    content = model.SerializeToString()
    for path in (Path.cwd(), Path(onnx.__file__).parents[1], Path(__file__).parents[3]):
        assert str(path).encode() not in content
    assert b"site-packages" not in content
    assert b".py" not in content
    assert not any(node.doc_string or node.metadata_props for node in nodes(model))


def test_no_part_of_the_graph_keeps_what_the_exporter_noted_on_it(model: onnx.ModelProto) -> None:
    graph = model.graph
    parts = [model, graph, *nodes(model), *graph.input, *graph.output, *graph.value_info, *graph.initializer, *model.functions]
    assert not [part for part in parts if part.doc_string]
    assert not [part for part in parts if part is not model and part.metadata_props]


def test_the_metadata_carries_what_serving_needs(model: onnx.ModelProto, tiny_spec: PreprocessSpec) -> None:
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found["shardline.class_names"] == '["blue", "green", "red"]'
    assert found["shardline.preprocess_hash"] == tiny_spec.hash()
    assert all(key.startswith("shardline.") for key in found)


def add_training_dropout(model: onnx.ModelProto) -> None:
    """What an export in training mode leaves: noise on the features that an optimiser may or may not remove."""
    ratio = onnx.helper.make_tensor("ratio", onnx.TensorProto.FLOAT, [], [0.5])
    mode = onnx.helper.make_tensor("mode", onnx.TensorProto.BOOL, [], [True])
    model.graph.initializer.extend([ratio, mode])
    (last,) = [node for node in model.graph.node if "logits" in node.output]
    features = last.input[0]
    last.input[0] = "noisy"
    model.graph.node.insert(
        list(model.graph.node).index(last),
        onnx.helper.make_node("Dropout", [features, "ratio", "mode"], ["noisy"], name="noise"),
    )


def train_the_norm(model: onnx.ModelProto) -> None:
    node = model.graph.node[0]
    node.attribute.append(onnx.helper.make_attribute("training_mode", 1))


def rename_the_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "x"
    for node in model.graph.node:
        for number, name in enumerate(node.input):
            if name == "image":
                node.input[number] = "x"


def fix_the_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def keep_weights_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL


def use_a_private_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Secret", ["image"], ["unused"], domain="com.acme"))


def hide_a_dropout_in_a_branch(model: onnx.ModelProto) -> None:
    """An If whose branch holds the noise: what a network with a condition in it exports."""
    dropout = onnx.helper.make_node("Dropout", ["probabilities"], ["branch"], name="noise")
    value = onnx.helper.make_tensor_value_info("branch", onnx.TensorProto.FLOAT, ["batch", 3])
    branch = onnx.helper.make_graph([dropout], "branch", [], [value])
    model.graph.initializer.append(onnx.helper.make_tensor("condition", onnx.TensorProto.BOOL, [], [True]))
    model.graph.node.append(
        onnx.helper.make_node("If", ["condition"], ["unused"], name="if", then_branch=branch, else_branch=branch)
    )


def cut_a_wire(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "nothing"


def leak_a_path(model: onnx.ModelProto) -> None:
    model.graph.node[0].doc_string = f"{Path(__file__).parents[3]}/pipeline/models/sequential.py"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_training_dropout, r"node noise \(Dropout\) belongs to training"),
        (hide_a_dropout_in_a_branch, r"node noise \(Dropout\) belongs to training"),
        (cut_a_wire, "it is not valid ONNX"),
        (train_the_norm, "belongs to training"),
        (rename_the_input, r"its input is \[\('x'"),
        (fix_the_batch, "its input is"),
        (keep_weights_elsewhere, "it keeps weights in another file"),
        (use_a_private_operator, "it uses operators of com.acme, which other runtimes lack"),
        (leak_a_path, "it holds the path .* of this machine"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused(
    model: onnx.ModelProto, tiny_spec: PreprocessSpec, change: Change, reason: str
) -> None:
    change(model)
    with pytest.raises(GateError, match=f"the exported graph is refused: .*{reason}") as refusal:
        require_clean(model, tiny_spec, 20)
    assert refusal.value.exit_code == 3


def test_another_opset_than_the_one_asked_for_is_refused(model: onnx.ModelProto, tiny_spec: PreprocessSpec) -> None:
    with pytest.raises(GateError, match="its opset is 20, not 21"):
        require_clean(model, tiny_spec, 21)


def test_the_bytes_of_a_weight_are_not_taken_for_a_path(
    model: onnx.ModelProto, tiny_spec: PreprocessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder as short as a container's /w: any file of some megabytes has these two bytes somewhere.
    monkeypatch.setattr(Path, "cwd", lambda: Path("/w"))
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = weight.raw_data[:8] + b"/w.B" + weight.raw_data[12:]
    require_clean(model, tiny_spec, 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_network_on_a_gpu_is_exported_as_one_on_the_cpu(tiny_spec: PreprocessSpec) -> None:
    def export(device: str) -> bytes:
        torch.manual_seed(0)
        network: nn.Module = build_network(ModelConfig(channels=[8]), 3, tiny_spec).to(device)
        model = export_graph(network, THREE_CLASSES, tiny_spec, 20, {})
        require_clean(model, tiny_spec, 20)
        return bytes(model.SerializeToString(deterministic=True))

    assert export("cuda") == export("cpu")
