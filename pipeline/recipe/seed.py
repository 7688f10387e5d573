"""Does one seed give one training? Without that, no two runs can be compared and no resume can be trusted."""

import hashlib

import torch

from pipeline.recipe.verdict import Subject, Verdict

NUM_STEPS = 3
LEARNING_RATE = 0.01


def check_seed(subject: Subject) -> Verdict:
    """Train a few steps twice with the run's seed and once with another: the first two must be equal bit for bit."""
    seed = subject.config.seed
    (fed, first), (fed_again, second), (_, other) = (_train(subject, number) for number in (seed, seed, seed + 1))
    expected = "equal weights for equal seeds, others for another seed"
    if fed != fed_again:
        why = "the same augmented batch, made twice, has different pixels; the augmentation is not seeded"
        return Verdict("seed", "red", f"{fed[:12]} != {fed_again[:12]}", expected, why)
    if first != second:
        why = f"two trainings of {NUM_STEPS} steps with seed {seed} ended with different weights; something is not seeded"
        return Verdict("seed", "red", f"{first[:12]} != {second[:12]}", expected, why)
    if first == other:
        why = f"seeds {seed} and {seed + 1} ended with the same weights; the seed is not used"
        return Verdict("seed", "red", first[:12], expected, why)
    return Verdict("seed", "green", first[:12], expected, f"{NUM_STEPS} steps with seed {seed} give the same weights twice")


def _train(subject: Subject, seed: int) -> tuple[str, str]:
    """Sha256 of the first batch, augmented, and of the weights after a few plain SGD steps on it with dropout."""
    network = subject.build_network(seed)
    batch = subject.first_batch(augmented=True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for _ in range(NUM_STEPS):
        loss = subject.sample_losses(network(batch["image"]), batch["label"]).mean()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=LEARNING_RATE)
    return _sha256([batch["image"]]), _sha256(list(network.state_dict().values()))


def _sha256(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
