import pytest
import torch
from torch import nn

from pipeline.recipe.layers import copy_weights, measure_gradients, measure_updates, observe, summarise


@pytest.fixture
def network() -> nn.Sequential:
    """A convolution with a channel that is always negative, a rectifier, dropout and a linear layer."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 1)
    nn.init.constant_(convolution.weight, 0.01)
    assert convolution.bias is not None
    convolution.bias.data = torch.tensor([0.5, 0.5, 0.5, -1e6])
    return nn.Sequential(convolution, nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(4 * 4, 2))


IMAGES = torch.randint(0, 256, (5, 3, 2, 2), generator=torch.Generator().manual_seed(1)).float()


def test_a_look_leaves_no_trace_and_sees_the_network_as_evaluation_does(network: nn.Sequential) -> None:
    network[2].eval()
    modes = [module.training for module in network.modules()]
    logits, _ = observe(network, IMAGES)
    assert [module.training for module in network.modules()] == modes
    assert all(not module._forward_hooks for module in network.modules())
    assert torch.equal(logits, network.eval()(IMAGES))


def test_a_channel_that_is_never_above_zero_is_dead(network: nn.Sequential) -> None:
    _, layers = observe(network, IMAGES)
    rows = {row.layer: row for row in layers}
    assert rows["1"].kind == "ReLU" and rows["1"].dead == 0.25
    assert [row.layer for row in layers if row.dead is not None] == ["1"]
    assert rows["0"].mean == pytest.approx(float(network[0](IMAGES).mean()), rel=1e-6)
    assert rows["0"].std == pytest.approx(float(network[0](IMAGES).std()), rel=1e-6)
    assert rows["2"].weight is None


def test_gradients_and_updates_are_those_of_the_step(network: nn.Sequential) -> None:
    network[2].eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.autograd.backward(network(IMAGES).square().mean())
    gradients, before = measure_gradients(network), copy_weights(network)
    optimizer.step()
    moved = measure_updates(network, before)
    linear = torch.cat([each.flatten() for each in before["4"]])
    assert set(gradients) == set(moved) == {"0", "4"}
    assert moved["4"] == pytest.approx(0.1 * gradients["4"] / float(linear.norm()), rel=1e-4)  # float32 weights lose digits


def test_a_step_that_was_skipped_has_no_gradients(network: nn.Sequential) -> None:
    assert measure_gradients(network) == {}


def test_few_figures_stand_for_all_layers(network: nn.Sequential) -> None:
    _, layers = observe(network, IMAGES)
    for row, update in zip(layers, (0.1, None, float("nan"), None, 0.3), strict=True):
        row.update = update
    figures = summarise(layers)
    assert set(figures) == {"std_min", "std_median", "std_max", "update_min", "update_median", "update_max", "dead_max"}
    assert (figures["update_min"], figures["update_median"], figures["update_max"]) == (0.1, 0.2, 0.3)
    assert figures["dead_max"] == 0.25
