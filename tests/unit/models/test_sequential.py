import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.config import Config, ModelConfig
from pipeline.errors import ConfigError
from pipeline.manifest import DatasetManifest
from pipeline.models.blocks import GlobalAveragePool
from pipeline.models.normalize import Normalize
from pipeline.models.sequential import build_network, count_parameters, require_forward, summarise
from pipeline.preprocess import PreprocessSpec
from tests.unit.models.given import images_of, spec_of

Norm = Literal["batch", "group", "none"]
NORMS: list[Norm] = ["batch", "group", "none"]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch refuses whatever has no deterministic form."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_network_reads_normalize_features_classifier() -> None:
    network = build_network(ModelConfig(channels=[8, 16], dropout=0.3), 3, spec_of(16, 16))
    assert isinstance(network, nn.Sequential)
    assert [name for name, _ in network.named_children()] == ["normalize", "features", "classifier"]
    assert isinstance(network[0], Normalize)
    dropouts = {name: module for name, module in network.named_modules() if isinstance(module, nn.Dropout)}
    assert list(dropouts) == ["classifier.1"], "dropout sits in the classifier, before the last layer"
    assert dropouts["classifier.1"].p == 0.3
    assert [type(module) for module in network.get_submodule("classifier").children()] == [
        GlobalAveragePool,
        nn.Dropout,
        nn.Linear,
    ]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("convs_per_stage", [1, 2])
def test_images_become_one_logit_a_class(norm: Norm, convs_per_stage: int) -> None:
    config = ModelConfig(channels=[8, 16, 24], convs_per_stage=convs_per_stage, norm=norm)
    network = build_network(config, 5, spec_of(8, 13))
    assert network(images_of(4, 8, 13)).shape == (4, 5)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [module.out_channels for module in convolutions] == sorted([8, 16, 24] * convs_per_stage)
    # A bias before a normalisation is subtracted again.
    assert all((module.bias is None) == (norm != "none") for module in convolutions)


@pytest.mark.parametrize(("height", "width", "most"), [(16, 16, 4), (16, 40, 4), (7, 16, 2)])
def test_too_many_stages_are_refused_naming_how_many_fit(height: int, width: int, most: int) -> None:
    spec = spec_of(height, width)
    network = build_network(ModelConfig(channels=[8] * most), 2, spec)
    assert network(images_of(2, height, width)).shape == (2, 2)
    message = f"{most + 1} stages, but a {height} x {width} image has nothing left .* Use at most {most} stages"
    with pytest.raises(ConfigError, match=message):
        build_network(ModelConfig(channels=[8] * (most + 1)), 2, spec)


def test_group_norm_refuses_channels_that_it_cannot_share() -> None:
    with pytest.raises(ConfigError, match="cannot share 12 channels among 8 groups"):
        build_network(ModelConfig(channels=[16, 12], norm="group"), 2, spec_of(16, 16))


@pytest.mark.parametrize("channels", [[], [8, 0], [-8]])
def test_channels_must_be_positive_numbers(channels: list[int]) -> None:
    with pytest.raises(ConfigError, match="it must be a list of positive numbers"):
        build_network(ModelConfig(channels=channels), 2, spec_of(16, 16))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_a_fresh_network_guesses(norm: Norm, num_classes: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig(channels=[16, 32, 64], norm=norm)
    network = build_network(config, num_classes, spec_of(16, 16)).eval()
    with torch.no_grad():
        loss = float(functional.cross_entropy(network(images_of(64)), torch.arange(64) % num_classes))
    # The last layer's weights have a standard deviation of 0.01, so logits stay within a few hundredths of 0.
    assert loss == pytest.approx(math.log(num_classes), rel=0.05)


def test_the_small_network_draws_its_weights_as_it_always_has() -> None:
    torch.manual_seed(5)
    network = build_network(ModelConfig(channels=[8, 16]), 3, spec_of(16, 16))
    torch.manual_seed(5)
    convolutions = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 3, padding=1, bias=False)]
    last = nn.Linear(16, 3)
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(last.weight, std=0.01)
    weights = {
        "features.0.weight": convolutions[0].weight,
        "features.4.weight": convolutions[1].weight,
        "classifier.2.weight": last.weight,
    }
    for name, weight in weights.items():
        assert torch.equal(network.get_parameter(name), weight), name


@pytest.mark.parametrize("independent", [False, True])
def test_with_the_class_shares_as_last_bias_the_first_loss_is_their_entropy(independent: bool) -> None:
    shares = [0.7, 0.2, 0.1]
    torch.manual_seed(0)
    config = ModelConfig(channels=[8], prior_bias=True)
    network = build_network(config, 3, spec_of(16, 16), shares, independent=independent).eval()
    with torch.no_grad():
        logits = network(images_of(100))
    if independent:
        labels = torch.tensor([[row < 100 * share for share in shares] for row in range(100)]).float()  # (N, K)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        entropy = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares) / 3
    else:
        loss = functional.cross_entropy(logits, torch.tensor([0] * 70 + [1] * 20 + [2] * 10))
        entropy = -sum(p * math.log(p) for p in shares)
    # The last layer's weights of 0.01 move the logits by hundredths.
    assert float(loss) == pytest.approx(entropy, rel=0.03)


def test_one_output_starts_at_the_share_of_the_second_class() -> None:
    config = ModelConfig(channels=[8], prior_bias=True)
    network = build_network(config, 1, spec_of(16, 16), [0.8, 0.2])
    assert network.get_parameter("classifier.2.bias").sigmoid().tolist() == pytest.approx([0.2])
    assert (
        network.get_parameter("classifier.2.bias").tolist()
        != build_network(ModelConfig(channels=[8]), 1, spec_of(16, 16), [0.8, 0.2]).get_parameter("classifier.2.bias").tolist()
    )
    with pytest.raises(ConfigError, match=r"`model\.prior_bias`: 2 class shares for 3 outputs"):
        build_network(config, 3, spec_of(16, 16), [0.8, 0.2])


def test_the_table_of_a_run_needs_no_weights(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    state = torch.get_rng_state()
    rows = summarise(tiny_config, tiny_dataset, tiny_spec)
    assert rows[1] == ["features.0", "Conv2d 3 8 3x3 1x1", "8 x 16 x 16", "216", "55,296"]
    assert rows[-1][0] == "total"
    assert torch.equal(torch.get_rng_state(), state), "a run's weights are those of its seed all the same"


def test_one_seed_gives_one_network() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build_network(ModelConfig(channels=[8]), 2, spec_of(16, 16)).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_trial_image_leaves_the_network_as_it_was() -> None:
    spec = spec_of(16, 16)
    network = build_network(ModelConfig(channels=[8, 16]), 2, spec)
    network.get_submodule("features.1").eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    require_forward(network, spec)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [name for name, module in network.named_modules() if not module.training] == ["features.1"]


def test_only_trainable_numbers_are_counted() -> None:
    network = build_network(ModelConfig(channels=[8], norm="none"), 2, spec_of(16, 16))
    assert count_parameters(network) == (3 * 9 * 8 + 8) + (8 * 2 + 2)
    network.get_submodule("features").requires_grad_(False)
    assert count_parameters(network) == 8 * 2 + 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "config",
    [
        *(ModelConfig(channels=[16, 32], norm=norm) for norm in NORMS),
        ModelConfig(name="plain_cnn", channels=[16, 32], feature_dropout=0.1),
        ModelConfig(name="alexnet", width=0.25),
        ModelConfig(name="resnet18", width=0.25, stochastic_depth=0.2),
    ],
    ids=lambda config: f"{config.name}-{config.norm}",
)
def test_a_gpu_gives_the_same_gradients_twice(
    config: ModelConfig, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = build_network(config, 5, spec_of(96, 96)).cuda()
        torch.manual_seed(1)  # dropout
        loss = functional.cross_entropy(network(images_of(64, 96, 96).cuda()), torch.arange(64, device="cuda") % 5)
        return list(torch.autograd.grad(loss, list(network.parameters())))

    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_logits_of_the_cpu() -> None:
    torch.manual_seed(0)
    network = build_network(ModelConfig(channels=[16, 32]), 5, spec_of(32, 32)).eval()
    images = images_of(8, 32, 32)
    with torch.no_grad():
        on_cpu = network(images)
        on_gpu = network.cuda()(images.cuda()).cpu()
    # TF32 convolutions keep 10 bits of each factor; the logits of a fresh network are below 0.1.
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-2, atol=1e-3)
