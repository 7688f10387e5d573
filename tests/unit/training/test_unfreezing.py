from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from pipeline.config import Config
from pipeline.training.callbacks import WarmUpBuckets
from pipeline.training.classifier import Classifier
from pipeline.training.unfreezing import Unfreezing
from tests.unit.training.conftest import Fit, change

# Convolution and BatchNorm of the two stages.
FIRST, SECOND, HEAD = ("features.0", "features.1"), ("features.4", "features.5"), ("classifier.2",)


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Three epochs of nine steps: the head alone, then also the second stage; the first never."""
    config = change(tiny_config, "trainer", max_epochs=3, validate_every_steps=4)
    config = change(config, "data", global_batch_size=4)
    return change(config, "model", freeze=["features"], unfreeze=dict.fromkeys(SECOND, 1))


class Watch(L.Callback):
    """Notes in which epochs each module moved, by its weights and statistics."""

    def __init__(self) -> None:
        self.moved: dict[int, set[str]] = {}
        self.before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, Classifier)
        self.before = {name: tensor.clone() for name, tensor in module.network.state_dict().items()}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, Classifier)
        after = module.network.state_dict()
        moved = {name.rpartition(".")[0] for name, tensor in after.items() if not torch.equal(tensor, self.before[name])}
        self.moved.setdefault(trainer.current_epoch, set()).update(moved)


def unfreezing(config: Config) -> list[L.Callback]:
    return [WarmUpBuckets((16, 16)), Unfreezing(config.model, config.trainer.max_epochs)]


def test_parts_begin_to_train_at_their_epochs_and_frozen_statistics_stay(config: Config, fit: Fit) -> None:
    watch = Watch()
    fit(config, *unfreezing(config), watch)
    assert watch.moved == {0: {*HEAD}, 1: {*HEAD, *SECOND}, 2: {*HEAD, *SECOND}}


def test_the_optimizer_holds_whatever_ever_trains_from_the_start(config: Config, fit: Fit) -> None:
    module = fit(config, *unfreezing(config))
    names = {parameter: name for name, parameter in module.network.named_parameters()}
    held = {names[each].rpartition(".")[0] for group in module.trainer.optimizers[0].param_groups for each in group["params"]}
    assert held == {*HEAD, *SECOND}


def test_without_the_callback_nothing_is_frozen(tiny_config: Config, make_classifier: Callable[[Config], Classifier]) -> None:
    assert all(parameter.requires_grad for parameter in make_classifier(tiny_config).network.parameters())
