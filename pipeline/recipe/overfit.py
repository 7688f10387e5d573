"""Can the network learn one batch by heart? If not, no amount of data will help: labels, loss or network are wrong."""

import torch
from torch import nn

from pipeline.recipe.verdict import Subject, Verdict

MAX_SAMPLES = 32
MAX_STEPS = 300
LEARNING_RATE = 3e-3
LOSS_GOAL = 0.05


def check_overfit(subject: Subject) -> Verdict:
    """Fit one small batch, without dropout and augmentation, until every label is right and the loss is near 0."""
    network = subject.build_network(subject.config.seed)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = subject.first_batch(augmented=False, size=MAX_SAMPLES)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    number = len(batch["label"])
    expected = f"loss < {LOSS_GOAL} and all of {number} labels right within {MAX_STEPS} steps"
    loss, correct = float("nan"), 0
    for step in range(MAX_STEPS):
        logits = network(batch["image"])  # (N, K)
        mean_loss = subject.sample_losses(logits, batch["label"]).mean()
        loss, correct = float(mean_loss.detach()), int(subject.task.correct(logits, batch["label"]).sum())
        if loss < LOSS_GOAL and correct == number:
            return Verdict("overfit", "green", loss, expected, f"{number} images learned by heart in {step} steps")
        optimizer.zero_grad()
        torch.autograd.backward(mean_loss)
        optimizer.step()
    why = (
        f"after {MAX_STEPS} steps on the same {number} images the loss is {loss:.4f} and {correct} labels are right; "
        "look for equal images with different labels, or a network that is too small"
    )
    return Verdict("overfit", "red", loss, expected, why)
