from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.export.graph import export_graph
from pipeline.export.lint import require_clean
from pipeline.export.proto import metadata, nodes, parts
from pipeline.models.normalize import Normalize
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec
from tests.unit.conftest import THREE_CLASSES


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
    assert not [part for part in parts(model) if getattr(part, "doc_string", "")]
    assert not [part for part in parts(model) if part is not model and getattr(part, "metadata_props", None)]


def test_the_metadata_carries_what_serving_needs(model: onnx.ModelProto, tiny_spec: PreprocessSpec) -> None:
    found = metadata(model)
    assert found["shardline.class_names"] == '["blue", "green", "red"]'
    assert found["shardline.preprocess_hash"] == tiny_spec.hash()
    assert all(key.startswith("shardline.") for key in found)


def test_the_network_is_left_in_the_mode_it_came_in(tiny_spec: PreprocessSpec) -> None:
    network = build_network(ModelConfig(channels=[8]), 3, tiny_spec).train()
    network.get_submodule("features").eval()  # frozen, as fine-tuning leaves it
    modes = [module.training for module in network.modules()]
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    export_graph(network, THREE_CLASSES, tiny_spec, 20, {})
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_a_pool_rounds_up_only_where_there_is_something_to_round(tiny_spec: PreprocessSpec) -> None:
    pools = [nn.MaxPool2d(3, stride=stride, padding=1, ceil_mode=True) for stride in (1, 2)]
    network = nn.Sequential(Normalize(tiny_spec), *pools, nn.Flatten(), nn.Linear(3 * 9 * 9, 3))
    model = export_graph(network, THREE_CLASSES, tiny_spec, 20, {})
    found = [{entry.name for entry in node.attribute} for node in nodes(model) if node.op_type == "MaxPool"]
    assert ["ceil_mode" in names for names in found] == [False, True]


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
