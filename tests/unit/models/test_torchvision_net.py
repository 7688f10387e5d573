import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.normalize import Normalize
from pipeline.models.sequential import build_network
from pipeline.models.shapes import describe_network
from pipeline.preprocess import PreprocessSpec
from pipeline.pretraining import brought_spec
from tests.unit.models.given import images_of, on_meta, spec_of
from tests.unit.models.test_classics import save_random_weights

# One of each family, at the smallest size.
FAMILIES = ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "densenet121"]
LARGER = ["googlenet", "regnet_y_400mf", "convnext_tiny", "swin_t", "vit_b_16", "maxvit_t"]


@pytest.mark.parametrize("name", FAMILIES + LARGER)
def test_any_network_of_torchvision_gets_a_last_layer_for_our_classes(name: str) -> None:
    network = on_meta(ModelConfig(name=f"torchvision:{name}"), num_outputs=7)
    assert [child for child, _ in network.named_children()] == ["normalize", "features", "classifier"]
    assert describe_network(network, spec_of(224, 224))[-1].shape == (7,)
    theirs = torchvision.models.get_model_weights(name)["DEFAULT"].meta["num_params"]
    full = on_meta(ModelConfig(name=f"torchvision:{name}"))
    ours = sum(parameter.numel() for parameter in full.parameters())
    # MaxVit's own last layer has no bias.
    assert ours == theirs + (1000 if name == "maxvit_t" else 0)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0"])
def test_its_weights_give_its_logits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    theirs = save_random_weights(name, path)
    ours = build_network(ModelConfig(name=f"torchvision:{name}", weights=str(path)), 1000, spec_of(64, 64)).eval()
    images = images_of(2, 64, 64)
    with torch.no_grad():
        expected = theirs(ours.get_submodule("normalize")(images))
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=0)
    for_others = build_network(ModelConfig(name=f"torchvision:{name}", weights=str(path)), 5, spec_of(64, 64)).eval()
    with torch.no_grad():
        logits = for_others(images)  # (N, 5)
        assert torch.equal(for_others[:2](images), ours[:2](images)), "the body is the pretrained one"
    assert logits.shape == (2, 5)


def test_googlenet_is_fed_what_torchvision_makes_of_its_images_inside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    config = ModelConfig(name="torchvision:googlenet", weights="DEFAULT")
    spec = brought_spec(config)
    assert spec is not None and (spec.mean, spec.std) == ([0.5] * 3, [0.5] * 3)
    from_file = dataclasses.replace(config, weights=str(tmp_path / "weights.pth"))
    ours = build_network(from_file, 1000, dataclasses.replace(spec, crop=[64, 64])).eval()
    images = images_of(2, 64, 64)
    with torch.no_grad():
        expected = theirs(Normalize(torchvision_spec(spec))(images))
        # The same normalisation in another order of operations, through 22 layers: logits are about 1.
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-4)


def torchvision_spec(spec: PreprocessSpec) -> PreprocessSpec:
    """What torchvision's transforms normalise by, for every classification model."""
    return dataclasses.replace(spec, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def test_the_dropout_is_the_networks_own_unless_said() -> None:
    def dropouts(name: str, dropout: float | None) -> list[float]:
        network = on_meta(ModelConfig(name=f"torchvision:{name}", dropout=dropout), 5)
        return [module.p for module in network.modules() if isinstance(module, nn.Dropout) and module.p]

    assert dropouts("efficientnet_b0", None) == [0.2]
    assert dropouts("efficientnet_b0", 0.4) == [0.4]
    assert dropouts("efficientnet_b0", 0.0) == []
    assert dropouts("resnet18", None) == []
    assert dropouts("resnet18", 0.3) == [0.3]


def test_stochastic_depth_is_scaled_or_refused() -> None:
    from torchvision.ops import StochasticDepth

    def largest(p: float | None) -> float:
        network = on_meta(ModelConfig(name="torchvision:convnext_tiny", stochastic_depth=p), 5)
        return max(float(module.p) for module in network.modules() if isinstance(module, StochasticDepth))

    assert (largest(None), largest(0.4), largest(0.0)) == pytest.approx((0.1, 0.4, 0.0))
    with pytest.raises(ConfigError, match="resnet18 has no residual branches that can be dropped"):
        on_meta(ModelConfig(name="torchvision:resnet18", stochastic_depth=0.1))


def test_an_unknown_network_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no classification model 'resnet51'\. Did you mean 'resnet\d+'\?"):
        on_meta(ModelConfig(name="torchvision:resnet51"))
