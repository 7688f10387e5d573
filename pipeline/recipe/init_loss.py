"""Is the first loss that of a guess? One that starts higher spends its first steps on unlearning its initialisation."""

import torch

from pipeline.recipe.verdict import Subject, Verdict

RELATIVE_TOLERANCE = 0.1


def check_init_loss(subject: Subject) -> Verdict:
    """Compare the loss of a fresh network on the first batch with its theoretical value, in nats.

    Where each image has one label, classes count by their share of the training split, not by how often the batch happens to
    have them: a last bias of class priors would otherwise be judged by the luck of the draw.
    """
    guess = subject.loss_at_initialisation()
    network = subject.build_network(subject.config.seed)
    batch = subject.first_batch(augmented=False)
    with torch.no_grad():
        losses = subject.sample_losses(network(batch["image"]), batch["label"]).double()
    loss = float((losses * _shares(subject, batch["label"])).sum())
    expected = f"{guess:.4f} +- {RELATIVE_TOLERANCE:.0%}"
    if abs(loss - guess) <= RELATIVE_TOLERANCE * guess:
        return Verdict(
            "init_loss", "green", loss, expected, f"a fresh network's loss is {loss:.4f}, that of a guess {guess:.4f}"
        )
    why = (
        f"a fresh network's loss is {loss:.4f}, not {expected}; "
        "its last layer is initialised too large, or the images are not normalised"
    )
    return Verdict("init_loss", "red", loss, expected, why)


def _shares(subject: Subject, labels: torch.Tensor) -> torch.Tensor:
    """What each sample of a batch counts, (n,), with sum 1."""
    if labels.ndim > 1 or subject.is_streamed:
        return torch.full((len(labels),), 1 / len(labels), dtype=torch.float64, device=labels.device)
    counts = torch.tensor(subject.task.shares, dtype=torch.float64, device=labels.device)
    here = torch.bincount(labels, minlength=len(counts))
    shares = counts[labels] / here[labels]
    return shares / shares.sum()
