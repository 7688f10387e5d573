"""Does the network take anything from its input? Trained on black images it must do worse than on the real ones.

(Karpathy, "A Recipe for Training Neural Networks": the input-independent baseline.)
"""

import torch

from pipeline.recipe.fitting import fit_batch, without_dropout
from pipeline.recipe.verdict import Subject, Verdict
from pipeline.report.charts import LineChart

MAX_SAMPLES = 64
# Learning rate and steps, until one tells: a weak network needs more of them, one without norms smaller ones.
ATTEMPTS = ((3e-3, 30), (3e-3, 200), (3e-4, 200))
STANDARD_ERRORS = 4.0


def check_zero_input(subject: Subject) -> Verdict:
    """Train two equal networks on the same labels, one with the images and one with zeros in their place.

    The loss on the zeros must exceed that on the images by STANDARD_ERRORS of its mean over the samples, a paired comparison
    that a network blind to its input passes once in 30,000. It is judged on the images that were trained on: what can be
    learned by heart has come through, also where labels mean nothing, which is for another check to find.
    """
    batch = subject.first_batch(augmented=False, size=MAX_SAMPLES)
    expected = f"a loss on zeros that is {STANDARD_ERRORS:g} standard errors above that on images"
    if bool((batch["label"] == batch["label"][:1]).all()):
        return Verdict("zero_input", "skipped", None, expected, "all labels of the first batch are the same")
    for lr, num_steps in ATTEMPTS:
        real, zero = (_curve(subject, images, batch["label"], lr, num_steps) for images in (batch["image"], batch["image"] * 0))
        value = _standard_errors(zero[-1] - real[-1])
        if value >= STANDARD_ERRORS:
            break
    figures = f"after {num_steps} steps the loss is {real[-1].mean():.3f} on images, {zero[-1].mean():.3f} on zeros"
    chart = LineChart("step", "loss", {name: [float(losses.mean()) for losses in c] for name, c in _named(real, zero)})
    if value >= STANDARD_ERRORS:
        return Verdict("zero_input", "green", value, expected, figures, (chart,))
    why = f"{figures}: the network learns nothing from what it sees. Look at what lies between the pixels and the loss"
    return Verdict("zero_input", "red", value, expected, why, (chart,))


def _curve(subject: Subject, images: torch.Tensor, labels: torch.Tensor, lr: float, num_steps: int) -> list[torch.Tensor]:
    network = without_dropout(subject.build_network(subject.config.seed))
    return fit_batch(subject, network, images, labels, lr=lr, max_steps=num_steps)


def _named(real: list[torch.Tensor], zero: list[torch.Tensor]) -> list[tuple[str, list[torch.Tensor]]]:
    return [("images", real), ("zeros", zero)]


def _standard_errors(differences: torch.Tensor) -> float:
    """The mean of paired differences (n,) in standard errors of that mean."""
    error = differences.std() / len(differences) ** 0.5
    return float(differences.mean() / (error + 1e-9))
