"""MixUp and CutMix: two training images become one, on the training device, and both labels share its loss.

Each sample is mixed with its neighbour in the global batch, which is already in random order. So what a sample becomes depends
on (seed, step) alone and on no number of ranks, and can be shown again. Integers keep it the same on every device.

MixUp: Zhang et al., 2017 (arXiv 1710.09412). CutMix: Yun et al., 2019 (arXiv 1905.04899).
"""

import math
import random
from typing import NamedTuple

import torch

from pipeline.config import AugmentConfig
from pipeline.data.order import mix
from pipeline.errors import ConfigError

STEPS_OF_MIXUP = 256  # MixUp's share in whole 256ths


class Mixed(NamedTuple):
    """What a mixed batch shows: in row i its own image and, in part, that of row i^1, whose label is `other_label`."""

    other_label: torch.Tensor  # int64 (n,) or uint8 (n, K)
    share: torch.Tensor  # float32 (n,), how much of the loss belongs to the sample's own label


def require_mixable(config: AugmentConfig, local_batch_size: int) -> None:
    """Refuse a batch whose samples cannot be paired on each rank. Raises ConfigError."""
    if (config.mixup or config.cutmix) and local_batch_size % 2:
        raise ConfigError(
            f"MixUp and CutMix pair the samples of a process, but each has {local_batch_size}. "
            "Set `data.global_batch_size` to an even number for each process."
        )


def mix_batch(
    images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, config: AugmentConfig, seed: int, step: int
) -> tuple[torch.Tensor, Mixed | None]:
    """Mix each pair of rows as `config` says for this step; both off, nothing. Pairs with a masked row stay as they are.

    Images uint8 (n, 3, H, W), labels (n,) or (n, K), weights (n,), n even. Where both are on, a coin decides each step.
    """
    if not config.mixup and not config.cutmix:
        return images, None
    draw = random.Random(mix(seed, step, 2))  # noqa: S311 - reproducible, not secret
    use_cutmix = bool(config.cutmix) and (not config.mixup or draw.random() < 0.5)
    alpha = config.cutmix if use_cutmix else config.mixup
    share = draw.betavariate(alpha, alpha)
    partner = torch.arange(len(labels), device=labels.device) ^ 1
    both = (weights > 0) & (weights[partner] > 0)  # (n,)
    others = images[partner]
    mixed, share = _paste(images, others, share, draw) if use_cutmix else _blend(images, others, share)
    image = torch.where(both[:, None, None, None], mixed, images)
    return image, Mixed(labels[partner], torch.where(both, share, 1.0))


def _blend(images: torch.Tensor, others: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
    whole = round(share * STEPS_OF_MIXUP)
    total = images.int() * whole + others.int() * (STEPS_OF_MIXUP - whole) + STEPS_OF_MIXUP // 2
    return (total // STEPS_OF_MIXUP).to(torch.uint8), whole / STEPS_OF_MIXUP


def _paste(images: torch.Tensor, others: torch.Tensor, share: float, draw: random.Random) -> tuple[torch.Tensor, float]:
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    middle_y, middle_x = draw.random() * height, draw.random() * width
    top, bottom = (_within(middle_y + sign * side * height / 2, height) for sign in (-1, 1))
    left, right = (_within(middle_x + sign * side * width / 2, width) for sign in (-1, 1))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _within(place: float, limit: int) -> int:
    return min(max(round(place), 0), limit)
