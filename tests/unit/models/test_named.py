import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.named import FAMILIES, require_options, with_defaults
from pipeline.models.sequential import build_network
from pipeline.models.shapes import describe_network
from tests.unit.models.given import images_of, on_meta, spec_of

# Parameters and MACs of one 224 x 224 image at 1000 classes, in billions, as torchvision's weights state them.
KNOWN = {
    "alexnet": (61_100_840, 0.714),
    "vgg11": (132_863_336, 7.609),
    "vgg13": (133_047_848, 11.308),
    "vgg16": (138_357_544, 15.470),
    "vgg19": (143_667_240, 19.632),
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_classic_network_has_its_published_size(name: str) -> None:
    layers = describe_network(on_meta(ModelConfig(name=name)), spec_of(224, 224))
    parameters, billions = KNOWN[name]
    assert sum(layer.parameters for layer in layers) == parameters
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(billions, abs=0.0005)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_is_sequential_from_end_to_end(name: str) -> None:
    network = on_meta(ModelConfig(name=name), num_outputs=7, side=64)
    names = [child for child, _ in network.named_children()]
    assert [child for child in names if child != "pool"] == ["normalize", "features", "classifier"]
    assert isinstance(network.get_submodule("features"), nn.Sequential)
    layers = describe_network(network, spec_of(64, 64))
    assert layers[-1].shape == (7,)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(name="simple_net", hidden=[12, 6]),
        ModelConfig(name="plain_cnn", channels=[8, 16], convs_per_stage=2, feature_dropout=0.1, activation="silu"),
        ModelConfig(name="alexnet", width=0.05, norm="group"),
        ModelConfig(name="vgg11", width=0.02, norm="batch", activation="leaky_relu"),
        ModelConfig(name="resnet18", width=0.1, stochastic_depth=0.2),
        ModelConfig(name="resnet50", width=0.1, norm="none", activation="gelu"),
        ModelConfig(blocks=[{"conv": 8}, {"pool": 2}, {"residual": 16, "stride": 2}, {"dropout": 0.1}], norm="group"),
    ],
    ids=lambda config: config.name if not config.blocks else "blocks",
)
def test_every_parameter_of_a_network_gets_a_gradient(config: ModelConfig) -> None:
    torch.manual_seed(0)
    network = build_network(dataclasses.replace(config, dropout=0.1, zero_init_residual=False), 3, spec_of(64, 64))
    logits = network(images_of(6, 64, 64))
    assert logits.shape == (6, 3)
    torch.autograd.backward(nn.functional.cross_entropy(logits, torch.arange(6) % 3))
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    silent = [name for name, gradient in gradients.items() if gradient is None or not float(gradient.abs().sum()) > 0]
    assert not silent


def test_the_fully_connected_network_is_12288_84_50_2() -> None:
    network = on_meta(ModelConfig(name="simple_net"), num_outputs=2, side=64)
    sizes = [(module.in_features, module.out_features) for module in network.modules() if isinstance(module, nn.Linear)]
    assert sizes == [(12288, 84), (84, 50), (50, 2)]


def test_width_scales_every_layer_to_multiples_of_eight() -> None:
    network = on_meta(ModelConfig(name="vgg11", width=0.3), num_outputs=5)
    channels = [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert channels == [16, 40, 80, 80, 152, 152, 152, 152]


def test_settings_left_at_null_are_the_networks_own() -> None:
    assert (with_defaults(ModelConfig()).norm, with_defaults(ModelConfig()).dropout) == ("batch", 0.2)
    alexnet = with_defaults(ModelConfig(name="alexnet"))
    assert (alexnet.norm, alexnet.dropout) == ("none", 0.5)
    assert with_defaults(ModelConfig(name="alexnet", dropout=0.1)).dropout == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vgg12"}, r"`model\.name` is 'vgg12', which is no network\. Did you mean 'vgg1\d'\?"),
        ({"name": "transformer"}, r"which is no network\. Known: simple_net, .*torchvision:NAME"),
        (
            {"name": "alexnet", "channels": [8]},
            r"`model\.channels` is \[8\], but alexnet has no such setting \(it has act",
        ),
        ({"name": "alexnet", "stochastic_depth": 0.2}, r"`model\.stochastic_depth` is 0\.2, but alexnet has no such setting"),
        ({"name": "simple_net", "norm": "batch"}, r"`model\.norm` is batch, but simple_net has no such setting"),
        ({"hidden": [8]}, r"`model\.hidden` is \[8\], but small_cnn has no such setting"),
        ({"name": "torchvision:resnet18", "width": 2.0}, r"`model\.width` is 2\.0, but torchvision:resnet18 has no such"),
        ({"name": "vgg11", "blocks": [{"conv": 8}]}, r"`model\.blocks` .* `model\.name` is vgg11: give one of them"),
        ({"blocks": [{"conv": 8}], "channels": [8]}, r"but a network of `model\.blocks` has no such setting"),
        ({"name": "simple_net", "hidden": []}, r"`model\.hidden` is \[\]; it must be a list of positive numbers"),
    ],
)
def test_a_setting_that_the_network_does_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on_meta(ModelConfig(**settings))


def test_regularisation_may_be_switched_off_for_any_network() -> None:
    off: dict[str, Any] = {"dropout": 0.0, "feature_dropout": 0.0, "stochastic_depth": 0.0, "zero_init_residual": False}
    for name in [*FAMILIES, "torchvision:resnet18"]:
        require_options(ModelConfig(name=name, **off))
