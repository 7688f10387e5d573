"""Do gradients go where they should, and nowhere else? What mixes samples or has died trains on, only worse.

(Karpathy, "A Recipe for Training Neural Networks": use backprop to chart dependencies.)
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline.data.dataset import Batch
from pipeline.recipe.verdict import Subject, Verdict
from pipeline.report.html import Table

MAX_SAMPLES = 32
NUM_INDEPENDENT = 4
# A residual branch that starts at zero, or a last layer that does, lets gradients through only after the first step.
NUM_STEPS = 3
LEARNING_RATE = 1e-3
LAYERS_SHOWN = 60


@dataclass
class Watched:
    """What a few training steps showed: parameters that got a gradient, and how much of each ReLU's output was 0."""

    reached: set[str] = field(default_factory=set)
    zeros: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # a share for each time it was called

    @property
    def dead(self) -> list[str]:
        """ReLUs that never let anything through."""
        return [name for name, shares in self.zeros.items() if min(shares) == 1]


def check_gradients(subject: Subject) -> Verdict:
    """Three questions, none of which has a tolerance: a gradient, or an output, is 0 or it is not.

    In a few training steps, does every parameter that `model.freeze` does not name get a gradient, and does every nn.ReLU let
    something of the batch through? In evaluation after them, has a sample's loss a gradient at its own image, and exactly none
    at the others'?
    """
    batch = subject.first_batch(augmented=False, size=MAX_SAMPLES)
    expected = "each loss depends on its own image only, every parameter gets a gradient, no ReLU is 0 on the whole batch"
    network = subject.build_network(subject.config.seed)
    watched = _train(subject, network, batch)
    meant = [name for name, _ in network.named_parameters() if not subject.is_frozen(name)]
    silent = [name for name in meant if name not in watched.reached]
    held = [name for name, parameter in network.named_parameters() if name in meant and not parameter.requires_grad]
    faults = [*_dependencies(subject, network, batch)]
    if held:
        faults.append(f"{_listed(held)} frozen, which `model.freeze` does not ask for")
    if watched.dead:
        faults.append(f"dead ReLU, 0 for every image: {_listed(watched.dead)}")
    if set(silent) - set(held):
        faults.append(f"no gradient reaches {_listed([name for name in silent if name not in held])}")
    value = f"{len(meant) - len(silent)} of {len(meant)} parameters"
    blocks = (_table(watched),) if watched.zeros else ()
    if faults:
        return Verdict("gradients", "red", value, expected, "; ".join(faults), blocks)
    why = f"{value} get a gradient, {len(watched.zeros)} ReLUs are alive, no image touches another's loss"
    return Verdict("gradients", "green", value, expected, why, blocks)


def _dependencies(subject: Subject, network: nn.Sequential, batch: Batch) -> Iterator[str]:
    """What is wrong with the gradients of single losses at all inputs, in evaluation."""
    network.eval()
    number = min(NUM_INDEPENDENT, len(batch["label"]))
    images = batch["image"][:number].float().requires_grad_()
    losses = subject.sample_losses(network(images), batch["label"][:number])
    touched = torch.zeros(number, number)  # (loss, image)
    for place in range(number if losses.requires_grad else 0):
        (gradient,) = torch.autograd.grad(losses[place], images, retain_graph=True, allow_unused=True)
        if gradient is not None:
            touched[place] = gradient.abs().flatten(1).amax(dim=1).cpu()
    network.train()
    own = touched.diagonal()
    if not bool(torch.isfinite(touched).all()):
        yield "gradients are no finite numbers"
    elif not bool(own.any()):
        yield "no loss depends on its image"
    elif bool((touched - own.diag()).any()):
        yield "in evaluation, the loss of an image depends on others in its batch"


def _train(subject: Subject, network: nn.Sequential, batch: Batch) -> Watched:
    watched = Watched()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        return watched
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
    relus = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.ReLU | nn.ReLU6)]
    hooks = [module.register_forward_hook(_watch(watched, name)) for name, module in relus]
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(subject.sample_losses(network(batch["image"]), batch["label"]).mean())
        for name, parameter in network.named_parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                watched.reached.add(name)
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return watched


def _watch(watched: Watched, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    def hook(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        watched.zeros[name].append(float((output <= 0).float().mean()))

    return hook


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _table(watched: Watched) -> Table:
    rows = [[name, f"{shares[0]:.1%}"] for name, shares in list(watched.zeros.items())[:LAYERS_SHOWN]]
    return Table(["ReLU", "outputs that are 0"], rows, "A fresh network on the first batch")
