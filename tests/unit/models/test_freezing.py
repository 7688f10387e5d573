from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.freezing import freeze_parameters, frozen
from pipeline.models.sequential import build_network
from tests.unit.models.given import images_of, on_meta, spec_of

# Each stage is a convolution, its BatchNorm, an activation and a pooling: features.8 and features.9 are the last stage's.
LAST_STAGE = {"features.8": 1, "features.9": 1}
GRADUAL = ModelConfig(channels=[8, 16, 24], freeze=["features"], unfreeze={**LAST_STAGE, "features.4": 3}, dropout=0.5)


def trained_at(config: ModelConfig, epoch: int) -> set[str]:
    network = build_network(config, 3, spec_of(16, 16))
    freeze_parameters(network, frozen(config, epoch))
    return {name.rsplit(".", 1)[0] for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_parts_begin_to_train_one_after_the_other() -> None:
    head = {"classifier.2"}
    assert trained_at(GRADUAL, 0) == head
    assert trained_at(GRADUAL, 1) == trained_at(GRADUAL, 2) == {*head, *LAST_STAGE}
    assert trained_at(GRADUAL, 3) == {*head, *LAST_STAGE, "features.4"}


def test_what_is_only_in_unfreeze_waits_for_its_epoch_too() -> None:
    config = ModelConfig(channels=[8], unfreeze={"features": 2})
    assert trained_at(config, 1) == {"classifier.2"}
    assert trained_at(config, 2) == {"classifier.2", "features.0", "features.1"}


def test_a_prefix_ends_at_a_dot() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    freeze_parameters(network, ["1"])
    assert [name for name, parameter in network.named_parameters() if not parameter.requires_grad] == ["1.weight", "1.bias"]


def test_frozen_batch_norm_keeps_its_statistics_and_dropout_goes_on() -> None:
    network = build_network(GRADUAL, 3, spec_of(16, 16)).train()
    freeze_parameters(network, frozen(GRADUAL, 1))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(images_of(8))
    moved = {name for name, buffer in network.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {f"features.9.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert network.get_submodule("classifier.1").training


def test_an_unfrozen_batch_norm_follows_its_network_again() -> None:
    network = build_network(GRADUAL, 3, spec_of(16, 16)).train()
    freeze_parameters(network, ["features"])
    assert not network.get_submodule("features.1").training
    freeze_parameters(network, [])
    assert network.get_submodule("features.1").training
    freeze_parameters(network.eval(), [])
    assert not network.get_submodule("features.1").training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ["feature"]}, r"`model\.freeze` names 'feature', .* Did you mean 'features'\?"),
        ({"unfreeze": {"clasifier": 2}}, r"`model\.unfreeze` names 'clasifier', .* Did you mean 'classifier'\?"),
        ({"freeze": ["xyz"]}, r"The network has: classifier, features\."),
        ({"unfreeze": {"features": 0}}, r"lets features train from epoch 0 on; it must be 1 or later"),
    ],
)
def test_a_prefix_that_no_parameter_has_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on_meta(ModelConfig(**settings), side=16)
