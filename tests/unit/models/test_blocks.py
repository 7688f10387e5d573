import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.models.blocks import AdaptiveAveragePool, ResidualBlock, StochasticDepth, falling
from pipeline.models.initialise import initialise, start_as_identity

CONFIG = ModelConfig(norm="batch", activation="relu")


@pytest.mark.parametrize(("before", "after"), [((6, 6), (6, 6)), ((12, 18), (6, 6)), ((13, 9), (6, 7)), ((1, 2), (7, 7))])
def test_the_pooling_is_torchs_adaptive_pooling(before: tuple[int, int], after: tuple[int, int]) -> None:
    features = torch.randn(2, 3, *before, generator=torch.Generator().manual_seed(0))
    pool = AdaptiveAveragePool(before, after)
    # Sums of at most a few numbers of size 1 in another order.
    torch.testing.assert_close(pool(features), nn.AdaptiveAvgPool2d(after)(features), rtol=0, atol=1e-6)
    assert not pool.state_dict(), "torchvision's checkpoints have nothing there"


def test_the_pooling_to_the_same_size_changes_nothing() -> None:
    features = torch.randn(2, 3, 6, 6)
    assert torch.equal(AdaptiveAveragePool((6, 6), (6, 6))(features), features)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = StochasticDepth(0.25)
    branch = drop(torch.ones(4000, 2, 3, 3))  # (N, C, H, W)
    values = branch.flatten(1)
    assert bool((values == values[:, :1]).all()), "a sample is dropped as a whole"
    assert values.unique().tolist() == pytest.approx([0, 4 / 3])
    # Four standard deviations of the mean of 4000 draws.
    assert float(branch.mean()) == pytest.approx(1, abs=4 * (0.25 / 0.75 / 4000) ** 0.5)
    assert torch.equal(drop.eval()(torch.ones(8, 2, 3, 3)), torch.ones(8, 2, 3, 3))


def test_the_deeper_a_block_the_more_often_it_is_dropped() -> None:
    assert list(falling(0.4, 4)) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_fresh_residual_block_is_the_identity(bottleneck: bool, norm: str) -> None:
    block = ResidualBlock(16, 16, ModelConfig(norm=norm), bottleneck=bottleneck)  # type: ignore[arg-type]
    initialise(block, head=nn.Identity())
    start_as_identity(block)
    features = torch.rand(2, 16, 5, 5)
    assert torch.equal(block(features), features)
    torch.autograd.backward(block(features).square().sum())
    assert block.last_scale.grad is not None and float(block.last_scale.grad.abs().sum()) > 0, "and learns to be more"


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_residual_block_changes_channels_and_size_by_its_shortcut(bottleneck: bool) -> None:
    block = ResidualBlock(8, 32, CONFIG, stride=2, bottleneck=bottleneck)
    assert block(torch.rand(2, 8, 7, 7)).shape == (2, 32, 4, 4)
    assert [type(layer) for layer in block.shortcut] == [nn.Conv2d, nn.BatchNorm2d]
