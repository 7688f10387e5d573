import dataclasses
import json

import onnx
import pytest
import torch
from torch import nn

from pipeline.errors import GateError
from pipeline.export.contract import require_contract
from pipeline.export.graph import export_graph
from pipeline.manifest import DatasetManifest
from pipeline.models.normalize import Normalize
from pipeline.preprocess import PreprocessSpec
from tests.unit.conftest import THREE_CLASSES, THREE_LABELS
from tests.unit.export import sabotage
from tests.unit.export.sabotage import Change


@pytest.fixture
def manifest(tiny_dataset: DatasetManifest) -> DatasetManifest:
    return dataclasses.replace(tiny_dataset, digest="d" * 64)  # what the exported model says


def test_the_true_model_keeps_its_contract(
    model: onnx.ModelProto, manifest: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    require_contract(model, manifest, THREE_CLASSES, tiny_spec)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sabotage.rename_the_classes, "of its 3 classes number 0 is 'green', that of the data set is 'blue'"),
        (sabotage.claim_another_size, "its preprocessing is not that of the training"),
        (sabotage.claim_another_task, "its task is multi, not single"),
        (sabotage.claim_other_data, "its data_digest is eeee"),
        (sabotage.say_nothing, "its metadata cannot be read"),
        (sabotage.move_the_mean, r"its normalisation is not that of its preprocessing: level \d+ of \w+ becomes .*, not "),
        (sabotage.leave_out_the_normalisation, "its normalisation is not that of its preprocessing"),
        (sabotage.hide_the_input, "no normalisation follows its input"),
        (sabotage.turn_the_channels, "its channels are swapped: it takes blue for red"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_contradicts_its_training_is_refused(
    model: onnx.ModelProto, manifest: DatasetManifest, tiny_spec: PreprocessSpec, change: Change, reason: str
) -> None:
    change(model)
    with pytest.raises(GateError, match=f"the exported file contradicts its training: {reason}"):
        require_contract(model, manifest, THREE_CLASSES, tiny_spec)


@pytest.mark.parametrize("names", [["blue", "green"], ["blue", "green", "red", "white"]])
def test_a_class_list_that_begins_as_that_of_the_data_is_refused_by_its_length(
    model: onnx.ModelProto, manifest: DatasetManifest, tiny_spec: PreprocessSpec, names: list[str]
) -> None:
    sabotage.set_metadata(model, "class_names", json.dumps(names))
    with pytest.raises(GateError, match=f"it has {len(names)} classes, the data set 3"):
        require_contract(model, manifest, THREE_CLASSES, tiny_spec)


@pytest.mark.parametrize("by", [1e-4, -1e-4])
def test_a_mean_that_is_a_fortieth_of_a_level_off_is_seen(
    model: onnx.ModelProto, manifest: DatasetManifest, tiny_spec: PreprocessSpec, by: float
) -> None:
    sabotage.move_the_mean(model, by)
    with pytest.raises(GateError, match="its normalisation is not that"):
        require_contract(model, manifest, THREE_CLASSES, tiny_spec)


def test_a_model_of_another_number_of_classes_is_refused(
    model: onnx.ModelProto, manifest: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    model.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 2
    with pytest.raises(GateError, match="`probabilities` has 2 values an image, not 3"):
        require_contract(model, manifest, THREE_CLASSES, tiny_spec)


def test_a_file_of_several_labels_keeps_its_contract(
    multi_model: onnx.ModelProto, manifest: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    require_contract(multi_model, manifest, THREE_LABELS, tiny_spec)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.0] * 3, [1.0] * 3), ([0.5] * 3, [0.5] * 3), ([0.02, 0.01, 0.9], [1e-3, 0.2, 0.3])]
)
def test_any_normalisation_is_read_off_the_graph(
    manifest: DatasetManifest, tiny_spec: PreprocessSpec, mean: list[float], std: list[float]
) -> None:
    spec = dataclasses.replace(tiny_spec, mean=mean, std=std, resize=[5, 7])  # an image has not room for all levels
    network = nn.Sequential(Normalize(spec), nn.Flatten(), nn.Linear(3 * 5 * 7, 3))
    metadata: dict[str, object] = {
        "class_names": manifest.class_names,
        "task": "single",
        "preprocess": dataclasses.asdict(spec),
        "preprocess_hash": spec.hash(),
        "data_digest": manifest.digest,
    }
    torch.manual_seed(0)
    require_contract(export_graph(network, THREE_CLASSES, spec, 20, metadata), manifest, THREE_CLASSES, spec)
