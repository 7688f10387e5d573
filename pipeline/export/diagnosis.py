"""Why an exported model gives other answers than the trained network: the mistake that explains them, if one does.

A number alone sends a person looking for rounding. The usual mistakes leave answers that can be recognised: the same columns in
another order, the answers to the same images with red and blue exchanged, numbers that are none, or others each time.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array = npt.NDArray[np.float32]
Outputs = dict[str, Array]  # logits (N, num_outputs), probabilities (N, K)
# Of a logit of 1: what threads may change between two runs, where they add up in another order.
REPEATED = 16 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Evidence:
    """The answers to the same images uint8 (N, 3, H, W): of the trained network, and of the file, twice."""

    images: torch.Tensor
    wanted: Outputs
    found: Outputs
    again: Outputs


def explain(network: nn.Module, evidence: Evidence, tolerance: float) -> str:
    """The mistake that explains the answers of the file, in words, or an empty string."""
    wanted, found = evidence.wanted["logits"], evidence.found["logits"]
    if found.shape != wanted.shape:
        return f"it gives {found.shape[-1]} logits an image, not {wanted.shape[-1]}"
    if not np.isfinite(wanted).all():
        return "the trained network itself gives answers that are no numbers"
    if not all(np.isfinite(answers).all() for answers in evidence.found.values()):
        return "it gives answers that are no numbers: an overflow, as in float16, which ends at 65,504"
    if max_abs(evidence.again, evidence.found) > REPEATED * (1 + float(np.abs(found).max())):
        return "it answers the same images otherwise each time: something in it is random"
    if _is_near(found, wanted, tolerance):
        return "its probabilities are not those of its logits"
    order = _order_of(found, wanted, tolerance)
    if order:
        moved = next(place for place, source in enumerate(order) if place != source)
        return f"its classes are in another order: its output {moved} is the network's {order[moved]}"
    if any(_is_near(found, logits, tolerance) for logits in _with_swapped_channels(network, evidence.images)):
        return "its channels are swapped: it takes blue for red"
    return ""


def max_abs(found: Outputs, wanted: Outputs) -> float:
    """The largest difference of any logit or probability; infinite where an answer is no number or of another shape."""
    largest = 0.0
    for name, answer in wanted.items():
        if found[name].shape != answer.shape or not (np.isfinite(found[name]).all() and np.isfinite(answer).all()):
            return float("inf")
        largest = max(largest, float(np.abs(found[name] - answer).max()))
    return largest


def _is_near(found: Array, wanted: Array, tolerance: float) -> bool:
    return bool(np.abs(found - wanted).max() <= tolerance)


def _order_of(found: Array, wanted: Array, tolerance: float) -> list[int]:
    """Which column (N,) of `wanted` each column of `found` is; empty where they are not the same columns."""
    order = []
    for column in found.T:
        differences = np.abs(wanted - column[:, None]).max(axis=0)  # (num_outputs,)
        order.append(int(differences.argmin()))
        if differences[order[-1]] > tolerance:
            return []
    return order if sorted(order) == list(range(len(order))) else []


def _with_swapped_channels(network: nn.Module, images: torch.Tensor) -> list[Array]:
    """What the network would say with red and blue exchanged: before its normalisation, and behind it."""
    with torch.no_grad():
        found = [network(images.flip(1)).numpy()]
        if isinstance(network, nn.Sequential):
            found.append(network[1:](network[0](images).flip(1)).numpy())
    return found
