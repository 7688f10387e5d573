"""torchvision's own networks beside ours, with the same weights from a file."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from pipeline.config import ModelConfig
from pipeline.models.sequential import build_network
from tests.unit.models.given import images_of, spec_of


def save_random_weights(name: str, path: Path) -> nn.Module:
    """torchvision's network with weights of its own initialisation, which are saved as its downloads are."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(std=0.1)
    torch.save(network.state_dict(), path)
    return network.eval()


def logits_of_both(theirs: nn.Module, config: ModelConfig, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    ours = build_network(config, 1000, spec_of(side, side)).eval()
    images = images_of(2, side, side)
    with torch.no_grad():
        return ours(images), theirs(ours.get_submodule("normalize")(images))


@pytest.mark.parametrize(
    ("theirs", "config", "side"),
    [
        ("alexnet", ModelConfig(name="alexnet"), 224),
        ("vgg11", ModelConfig(name="vgg11"), 224),
        ("resnet18", ModelConfig(name="resnet18"), 96),
        ("resnet50", ModelConfig(name="resnet50"), 64),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torchvisions_weights_give_torchvisions_logits(theirs: str, config: ModelConfig, side: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    network = save_random_weights(theirs, path)
    ours, expected = logits_of_both(network, dataclasses.replace(config, weights=str(path)), side)
    path.unlink()  # half a gigabyte
    assert float(expected.std()) > 1e-3
    # The same operations in the same order, except for the mean of global pooling: rounding of logits below 10.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 if "resnet" in theirs else 0)


def test_a_vgg_with_batch_norm_has_torchvisions_names() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model("vgg13_bn", weights=None).state_dict()
        ours = build_network(ModelConfig(name="vgg13", norm="batch"), 1000, spec_of(224, 224)).state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.items() if not name.startswith("normalize.")}
    assert shapes == {name: tensor.shape for name, tensor in theirs.items()}
