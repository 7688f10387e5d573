"""Pretrained tensors into a network: all of them must fit, except the last layer where it is for other classes."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.initialise import head_of
from pipeline.pretraining import load_weights

# Auxiliary outputs, which only helped the pretraining.
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
# The files of torchvision's DenseNets are older than its names: `norm.1` is `norm1` today.
DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$")


def load_pretrained(
    network: nn.Sequential, config: ModelConfig, rename: Callable[[str], str], class_names: Sequence[str] | None
) -> None:
    """Load `model.weights` into `network`. Raises ConfigError where a tensor is missing, left over or of another shape.

    The last layer stays as it is where the weights' has another number of outputs, or other class names.
    """
    weights = load_weights(config)
    ours = network.state_dict()
    own_names = all(key in ours for key in weights.tensors)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in weights.tensors.items():
        if key.startswith(AUXILIARY):
            continue
        tensors[key if own_names else rename(DENSENET.sub(r"\1\2", key))] = tensor
    # The normalisation is the PreprocessSpec's, which came with the weights.
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("normalize.")}
    head = head_of(network)[0]
    if _is_for_other_classes(tensors, ours, f"{head}.weight", weights.class_names, class_names):
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{head}.")}
    needed = {key for key in ours if not key.startswith(("normalize.", f"{head}."))}
    _require_fit(tensors, ours, needed, f"`model.weights` {weights.path}")
    network.load_state_dict(_with_versions(tensors, weights.metadata, rename, own_names), strict=False)


def _is_for_other_classes(
    theirs: dict[str, torch.Tensor],
    ours: dict[str, torch.Tensor],
    key: str,
    their_names: Sequence[str] | None,
    our_names: Sequence[str] | None,
) -> bool:
    if key in theirs and theirs[key].shape[0] != ours[key].shape[0]:
        return True
    return their_names is not None and our_names is not None and list(their_names) != list(our_names)


def _require_fit(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], needed: Iterable[str], where: str) -> None:
    # Files from before 2018 do not count batches, which only matters without a momentum.
    missing = [key for key in needed if key not in theirs and not key.endswith("num_batches_tracked")]
    left_over = [key for key in theirs if key not in ours]
    if missing or left_over:
        what = f"it has no {min(missing)}" if missing else f"its {left_over[0]} has no place"
        others = len(missing) + len(left_over) - 1
        raise ConfigError(f"{where}: is for another network: {what}{f', and {others} more' if others else ''}.")
    for key, tensor in theirs.items():
        if tensor.shape != ours[key].shape:
            raise ConfigError(
                f"{where}: is for another network: its {key} is {tuple(tensor.shape)}, here it is {tuple(ours[key].shape)}."
            )


def _with_versions(
    tensors: dict[str, torch.Tensor], metadata: dict[str, Any], rename: Callable[[str], str], own_names: bool
) -> dict[str, torch.Tensor]:
    """The tensors as a state_dict that still says by which version of each module it was written (MNASNet asks)."""

    class StateDict(dict[str, torch.Tensor]):
        _metadata: dict[str, Any]

    state = StateDict(tensors)
    state._metadata = {(name if own_names else rename(f"{name}.").rstrip(".")): version for name, version in metadata.items()}
    return state
