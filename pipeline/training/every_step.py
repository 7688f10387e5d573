"""One callback that calls what all others do at a step: Lightning takes 2 us to call one, and asks each of them six times.

Whoever reads a profile finds the callbacks of a step here, in the order in which `fit` names them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class EveryStep(L.Callback):
    """Takes over the step hooks of `callbacks`, which keep all others; a hook that nobody has is not called at all."""

    def __init__(self, callbacks: Sequence[L.Callback]) -> None:
        for name in STEP_HOOKS:
            has_own = [each for each in callbacks if getattr(type(each), name) is not getattr(L.Callback, name)]
            calls = tuple(getattr(each, name) for each in has_own)
            for each in callbacks:
                setattr(each, name, None)  # Lightning passes over what cannot be called
            setattr(self, name, functools.partial(_call_each, calls) if calls else None)


def _call_each(calls: Sequence[Callable[..., None]], *arguments: Any) -> None:
    for call in calls:
        call(*arguments)
