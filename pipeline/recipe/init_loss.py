"""Is the first loss that of a guess? One that starts higher spends its first steps on unlearning its initialisation."""

import torch

from pipeline.recipe.verdict import Subject, Verdict

RELATIVE_TOLERANCE = 0.1


def check_init_loss(subject: Subject) -> Verdict:
    """Compare the loss of a fresh network on the first batch with that of a guess, in nats."""
    guess = subject.loss_at_initialisation()
    network = subject.build_network(subject.config.seed)
    batch = subject.first_batch(augmented=False)
    with torch.no_grad():
        loss = float(subject.sample_losses(network(batch["image"]), batch["label"]).mean())
    expected = f"{guess:.4f} +- {RELATIVE_TOLERANCE:.0%}"
    if abs(loss - guess) <= RELATIVE_TOLERANCE * guess:
        return Verdict("init_loss", "green", loss, expected, f"a fresh network's loss is {loss:.4f}")
    why = (
        f"a fresh network's loss is {loss:.4f}, not {expected}; "
        "its last layer is initialised too large, or the images are not normalised"
    )
    return Verdict("init_loss", "red", loss, expected, why)
