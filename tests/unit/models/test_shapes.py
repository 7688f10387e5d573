import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.sequential import build_network, require_forward
from pipeline.models.shapes import COLUMNS, describe_network, network_table
from tests.unit.models.given import images_of, on_meta, spec_of


def test_the_summary_says_what_each_layer_makes_of_an_image() -> None:
    network = build_network(ModelConfig(channels=[8]), 3, spec_of(16, 12))
    layers = {layer.name: layer for layer in describe_network(network, spec_of(16, 12))}
    assert list(layers) == [
        "normalize",
        *(f"features.{number}" for number in range(4)),
        *(f"classifier.{number}" for number in range(3)),
    ]
    convolution = layers["features.0"]
    assert (convolution.shape, convolution.parameters) == ((8, 16, 12), 3 * 9 * 8)
    assert convolution.macs == 16 * 12 * 3 * 9 * 8
    assert convolution.what == "Conv2d 3 8 3x3 1x1"
    assert (layers["classifier.2"].shape, layers["classifier.2"].macs) == ((3,), 8 * 3)


def test_the_shapes_are_those_of_a_real_image() -> None:
    network = build_network(ModelConfig(name="resnet18", width=0.1), 3, spec_of(40, 56)).eval()
    values: torch.Tensor = images_of(1, 40, 56)
    for name, child in network.named_children():
        values = child(values)
        last = [layer for layer in describe_network(network, spec_of(40, 56)) if layer.name.startswith(name)][-1]
        assert last.shape == tuple(values.shape[1:])


def test_the_table_ends_with_the_sum_and_leaves_out_what_changes_nothing() -> None:
    rows = network_table(describe_network(on_meta(ModelConfig(name="alexnet")), spec_of(224, 224)))
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert rows[-1] == ["total", "", "", "61,100,840", "714,188,480"]
    assert not any("ReLU" in row[1] or "Dropout" in row[1] for row in rows)


@pytest.mark.parametrize(
    ("name", "side", "layer"),
    [("alexnet", 16, r"features\.5 \(MaxPool2d"), ("vgg11", 16, r"features\.20 \(MaxPool2d")],
)
def test_an_image_too_small_names_the_layer_that_cannot_take_it(name: str, side: int, layer: str) -> None:
    with pytest.raises(ConfigError, match=rf"`model`: {layer}.*\) cannot take its input of \d+ x \d x \d: "):
        on_meta(ModelConfig(name=name), side=side)


def test_a_layer_of_the_wrong_size_is_found_without_computing() -> None:
    network = on_meta(ModelConfig(name="plain_cnn"), side=32)
    network.get_submodule("classifier")[1] = nn.Linear(7, 10)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"`model`: classifier\.1 \(Linear 7 10\) cannot take its input of 128: "):
        require_forward(network, spec_of(32, 32))
