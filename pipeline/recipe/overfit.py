"""Can the network learn one batch by heart? If not, no amount of data will help: labels, loss or network are wrong."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.data.dataset import Batch
from pipeline.recipe.fitting import LEARNING_RATES, fit_batch, without_dropout
from pipeline.recipe.verdict import Subject, Verdict
from pipeline.report.charts import LineChart

MAX_SAMPLES = 32
MAX_STEPS = 300
LOSS_GOAL = 0.05
LEARNED = 0.5
# With dropout on, judged as it is evaluated: the network must have gone at least this part of the way from a guess.
REGULARISED_SHARE = 0.5
STEPS_BETWEEN_LOOKS = 10
FLOOR_STEPS = 200


@dataclass(frozen=True)
class Attempt:
    """A training on one batch: its mean losses above the floor, step by step, and whether it reached its goal."""

    curve: list[float]
    reached: bool
    num_learned: int
    lr: float


def check_overfit(subject: Subject) -> Verdict:
    """Fit one small batch twice: without dropout to a loss of about 0, with the configured dropout to a looser goal.

    Losses count from the lowest that any logits could have on these labels, which is above 0 with smoothed labels. An image is
    learned when its own loss is within LEARNED of that: its label then has six tenths of the probability.
    """
    batch = subject.first_batch(augmented=False, size=MAX_SAMPLES)
    number = len(batch["label"])
    half = REGULARISED_SHARE * subject.loss_at_initialisation()
    expected = (
        f"loss < {LOSS_GOAL} and all of {number} images learned within {MAX_STEPS} steps; with dropout on, loss < {half:.3f}"
    )
    floor = _lowest_losses(subject, batch)
    plain = _without_regularisation(subject, batch, floor)
    loss = plain.curve[-1]
    charts: tuple[LineChart, ...] = (LineChart("step", "loss", {"regularisation off": plain.curve}),)
    if not plain.reached:
        why = (
            f"after {MAX_STEPS} steps on the same {number} images the loss is {loss:.4f} and {plain.num_learned} are learned; "
            "look for a softmax before the loss, equal images with different labels, or a network that is too small"
        )
        return Verdict("overfit", "red", loss, expected, why, charts)
    regularised = _with_regularisation(subject, batch, floor, plain.lr, half)
    charts = (LineChart("step", "loss", {"regularisation off": plain.curve, "on, as evaluated": regularised.curve}),)
    steps = len(plain.curve) - 1
    if not regularised.reached:
        why = (
            f"{number} images are learned by heart in {steps} steps, but with dropout on the loss is still "
            f"{regularised.curve[-1]:.4f} after {MAX_STEPS}; lower it, or widen the layer that it follows"
        )
        return Verdict("overfit", "red", regularised.curve[-1], expected, why, charts)
    why = f"{number} images learned by heart in {steps} steps; with dropout on the loss fell to {regularised.curve[-1]:.3f}"
    return Verdict("overfit", "green", loss, expected, why, charts)


def _without_regularisation(subject: Subject, batch: Batch, floor: torch.Tensor) -> Attempt:
    """The first learning rate that reaches the goal, or the best of them."""
    attempts = []
    for lr in LEARNING_RATES:
        network = without_dropout(subject.build_network(subject.config.seed))
        losses = fit_batch(
            subject,
            network,
            batch["image"],
            batch["label"],
            lr=lr,
            max_steps=MAX_STEPS,
            learned=lambda _, losses: _is_learned(losses - floor),
        )
        above = [losses_of_step - floor for losses_of_step in losses]
        num_learned = int((above[-1] < LEARNED).sum())
        attempts.append(Attempt([float(loss.mean()) for loss in above], _is_learned(above[-1]), num_learned, lr))
        if attempts[-1].reached:
            return attempts[-1]
    return min(attempts, key=lambda attempt: attempt.curve[-1] if math.isfinite(attempt.curve[-1]) else math.inf)


def _is_learned(above: torch.Tensor) -> bool:
    return bool(above.mean() < LOSS_GOAL) and bool((above < LEARNED).all())


def _with_regularisation(subject: Subject, batch: Batch, floor: torch.Tensor, lr: float, goal: float) -> Attempt:
    """Train with dropout, look without it every few steps."""
    network = subject.build_network(subject.config.seed)
    curve: list[float] = []

    def look(step: int, _: torch.Tensor) -> bool:
        # The first looks would judge BatchNorm's running statistics, not the weights.
        if step % STEPS_BETWEEN_LOOKS:
            return False
        curve.append(float((_evaluate(subject, network, batch) - floor).mean()))
        return step > 0 and curve[-1] < goal

    fit_batch(subject, network, batch["image"], batch["label"], lr=lr, max_steps=MAX_STEPS, learned=look)
    return Attempt(_spread_out(curve), curve[-1] < goal, 0, lr)


def _spread_out(curve: list[float]) -> list[float]:
    """One value a step of a curve with one value every STEPS_BETWEEN_LOOKS."""
    pairs = itertools.pairwise(curve)
    between = [a + (b - a) * part / STEPS_BETWEEN_LOOKS for a, b in pairs for part in range(STEPS_BETWEEN_LOOKS)]
    return [*between, curve[-1]]


def _evaluate(subject: Subject, network: nn.Sequential, batch: Batch) -> torch.Tensor:
    network.eval()
    with torch.no_grad():
        losses = subject.sample_losses(network(batch["image"]), batch["label"])
    network.train()
    return losses


def _lowest_losses(subject: Subject, batch: Batch) -> torch.Tensor:
    """The loss of each sample, (n,), when its logits are free to be anything."""
    with torch.no_grad():
        logits = torch.zeros_like(subject.build_network(subject.config.seed)(batch["image"][:2])[:1].float())
    free = logits.repeat(len(batch["label"]), 1).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.5)
    for _ in range(FLOOR_STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(subject.sample_losses(free, batch["label"]).sum())
        optimizer.step()
    return subject.sample_losses(free, batch["label"]).detach()
