import copy

import onnx
import pytest
import torch
from torch import nn

from pipeline.data.dataset import ShardDataset
from pipeline.export.graph import Answers
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from tests.unit.conftest import THREE_CLASSES


@pytest.fixture
def model(exported_model: onnx.ModelProto) -> onnx.ModelProto:
    """The exported model, for a test to damage."""
    return copy.deepcopy(exported_model)


@pytest.fixture
def dataset(tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> ShardDataset:
    """The 12 images of the test split."""
    return ShardDataset(tiny_dataset, "test", tiny_spec)


@pytest.fixture(scope="session")
def trained_graph(tiny_network: nn.Sequential, exported_model: onnx.ModelProto) -> onnx.GraphProto:
    """What an export that does not see to evaluation mode makes of `tiny_network`: dropout and all. Copy before changing."""
    program = torch.onnx.export(
        Answers(copy.deepcopy(tiny_network), THREE_CLASSES).train(),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8),),
        dynamo=True,
        input_names=["image"],
        output_names=["logits", "probabilities"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=20,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    return program.model_proto.graph
