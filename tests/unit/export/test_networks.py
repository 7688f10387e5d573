"""Every kind of network and of weights passes the whole gate: exported, linted, held against its contract, compared.

The rest of the named networks is slow: `pytest -m slow tests/unit/export/test_networks.py`.
"""

import dataclasses
import importlib.util
import typing
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.bench.runtimes import openvino_core
from pipeline.config import ExportConfig, ModelConfig
from pipeline.data.dataset import ShardDataset
from pipeline.export.contract import require_contract
from pipeline.export.graph import export_graph
from pipeline.export.lint import require_clean
from pipeline.export.parity import Parity, compare
from pipeline.manifest import DatasetManifest
from pipeline.models.named import FAMILIES
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec
from pipeline.task import Task
from tests.unit.conftest import THREE_CLASSES, THREE_LABELS

# One of each family of torchvision, at the smallest size that it has and on the smallest image that it takes.
OF_TORCHVISION = {
    "squeezenet1_1": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x0_5": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "regnet_y_400mf": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "vgg11_bn": 64,
    "alexnet": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_16": 224,
    "maxvit_t": 224,
}
CONFIG = ExportConfig(max_batch_size=4)


def spec_at(spec: PreprocessSpec, side: int) -> PreprocessSpec:
    return dataclasses.replace(spec, resize=[side, side])


def trained(config: ModelConfig, num_outputs: int, spec: PreprocessSpec) -> nn.Sequential:
    """A network that looks trained: a large last layer, and running statistics of its own."""
    torch.manual_seed(3)
    network = build_network(config, num_outputs, spec)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return network


def pass_gate(
    network: nn.Module, task: Task, spec: PreprocessSpec, manifest: DatasetManifest
) -> tuple[onnx.ModelProto, Parity]:
    """Everything that stands between a trained network and its publication."""
    manifest = dataclasses.replace(manifest, class_names=manifest.class_names[: task.num_classes])
    metadata: dict[str, object] = {
        "class_names": manifest.class_names,
        "task": task.kind,
        "preprocess": dataclasses.asdict(spec),
        "preprocess_hash": spec.hash(),
        "data_digest": manifest.digest,
    }
    model = export_graph(network, task, spec, 20, metadata)
    require_clean(model, spec, 20)
    require_contract(model, manifest, task, spec)
    dataset = ShardDataset(manifest, "test", spec)
    if task.kind == "multi":
        dataset.label_rows = np.eye(3, dtype=np.uint8)[dataset.rows["label"]]
    parity = compare(network, task, model.SerializeToString(), "s" * 64, dataset, CONFIG)
    assert parity.passed, parity.reason
    # What is allowed is reasoned from the arithmetic; what is found lies well below it.
    assert max(case.max_abs / case.tolerance for case in parity.cases) < 0.2
    return model, parity


@pytest.mark.parametrize("name", ["small_cnn", "simple_net", "torchvision:squeezenet1_1"])
def test_a_sample_of_networks_passes(name: str, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    spec = spec_at(tiny_spec, 32)
    pass_gate(trained(ModelConfig(name=name), 3, spec), THREE_CLASSES, spec, tiny_dataset)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_by_name_passes(name: str, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    spec = spec_at(tiny_spec, 64)
    pass_gate(trained(ModelConfig(name=name), 3, spec), THREE_CLASSES, spec, tiny_dataset)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_a_network_of_each_family_of_torchvision_passes(
    name: str, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    spec = spec_at(tiny_spec, OF_TORCHVISION[name])
    pass_gate(trained(ModelConfig(name=f"torchvision:{name}"), 3, spec), THREE_CLASSES, spec, tiny_dataset)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(norm="group", activation="gelu"),
        ModelConfig(activation="silu", feature_dropout=0.2),
        ModelConfig(activation="elu", convs_per_stage=2),
        ModelConfig(activation="leaky_relu", norm="none"),
        ModelConfig(name="resnet18", stochastic_depth=0.2, norm="group"),
        ModelConfig(blocks=[{"conv": 16}, {"pool": 2, "kind": "average"}, {"residual": 32, "stride": 2}, {"dropout": 0.1}]),
    ],
    ids=lambda config: f"{config.name}-{config.activation}-{config.norm}-{len(config.blocks)}",
)
def test_every_kind_of_layer_passes(config: ModelConfig, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    spec = spec_at(tiny_spec, 32)
    pass_gate(trained(config, 3, spec), THREE_CLASSES, spec, tiny_dataset)


@pytest.mark.parametrize("task", [Task("binary", (0.5, 0.5)), THREE_LABELS], ids=lambda task: task.kind)
def test_a_network_of_each_task_passes(task: Task, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    network = trained(ModelConfig(channels=[8, 16]), task.num_outputs, tiny_spec)
    model, parity = pass_gate(network, task, tiny_spec, tiny_dataset)
    sizes = [value.type.tensor_type.shape.dim[1].dim_value for value in model.graph.output]
    assert sizes == [task.num_outputs, task.num_classes]
    assert parity.num_samples == 12


# ---- weights that were trained in every way ----


def averaged(network: nn.Sequential) -> nn.Sequential:
    """The network with a moving average of its weights, as EMA leaves them in the best checkpoint."""
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        average.update_parameters(network)
    network.load_state_dict({name: tensor.clone() for name, tensor in average.module.state_dict().items()})
    return network


def from_bfloat16(network: nn.Sequential) -> nn.Sequential:
    """The network with weights that were kept in bfloat16, loaded as any checkpoint is."""
    weights = network.state_dict()
    network.load_state_dict(weights | {name: weights[name].to(torch.bfloat16) for name, _ in network.named_parameters()})
    return network


def channels_last(network: nn.Sequential) -> nn.Sequential:
    return network.to(memory_format=torch.channels_last)


def compiled_in_place(network: nn.Sequential) -> nn.Sequential:
    network.compile(backend="eager")  # as `trainer.compile` does; a C++ compiler is not needed to find out
    return network


def compiled_around(network: nn.Sequential) -> nn.Module:
    return typing.cast(nn.Module, torch.compile(network, backend="eager"))


@pytest.mark.parametrize("change", [averaged, from_bfloat16, channels_last, compiled_in_place, compiled_around])
def test_a_network_passes_however_it_was_trained(
    change: Callable[[nn.Sequential], nn.Module], tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    network = change(trained(ModelConfig(channels=[8, 16]), 3, tiny_spec))
    model, _ = pass_gate(network, THREE_CLASSES, tiny_spec, tiny_dataset)
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer)
    assert set(kinds) <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}, "weights are exported in float32"


# ---- another runtime ----


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_openvino_gives_the_same_answers(
    exported_model: onnx.ModelProto, tiny_network: nn.Sequential, dataset: ShardDataset
) -> None:
    core = openvino_core()
    graph = core.read_model(exported_model.SerializeToString())
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in (1, 5, 12):
        images = torch.stack([dataset.image(index) for index in range(size)])
        with torch.no_grad():
            wanted = tiny_network(images)
        found = compiled(images.numpy())
        # Two float32 runtimes through three layers, logits below 10: what rounding explains is some 1e-6.
        np.testing.assert_allclose(found["logits"], wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["probabilities"], wanted.softmax(dim=1), rtol=0, atol=1e-5)
