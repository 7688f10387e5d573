from collections.abc import Callable
from typing import Any

import lightning as L

from pipeline.config import Config
from pipeline.training.every_step import STEP_HOOKS, EveryStep
from tests.unit.training.conftest import Fit, weights_of


class Noter(L.Callback):
    """Notes when it is called, and with what."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.notes.append(f"{self.name} {trainer.global_step} {batch_idx}")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.notes.append(f"{self.name} end")


class Idle(L.Callback):
    """Has nothing to do at a step."""


def test_all_are_called_once_a_step_in_their_order_and_keep_their_other_hooks(tiny_config: Config, fit: Fit) -> None:
    notes: list[str] = []
    callbacks = [Noter("a", notes), Idle(), Noter("b", notes)]
    plain = weights_of(fit(tiny_config))
    assert (weights_of(fit(tiny_config, *callbacks, EveryStep(callbacks))) == plain).all()
    steps = [note for note in notes if "end" not in note]
    assert steps[:4] == ["a 1 0", "b 1 0", "a 2 1", "b 2 1"]
    assert len(steps) == 2 * 4 * tiny_config.trainer.max_epochs, "4 steps an epoch"
    assert notes[-2:] == ["a end", "b end"]


def test_a_hook_that_nobody_has_is_not_called_at_all() -> None:
    noter = Noter("a", [])
    every = EveryStep([noter, Idle()])
    hooks: dict[str, Callable[..., None] | None] = {name: getattr(every, name) for name in STEP_HOOKS}
    assert [name for name, hook in hooks.items() if hook is not None] == ["on_train_batch_end"]
    assert noter.on_train_batch_end is None
