"""Quick features of an image for a linear classifier: what can be told of a class without training a network.

Small pixels know place and colour, a colour histogram knows colour wherever it is, and gradient orientations know shape
whatever its colour: over the whole image wherever it is, over cells where it is (Dalal and Triggs, "Histograms of Oriented
Gradients for Human Detection", 2005).
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pipeline.data.dataset import Batch

LARGEST_SIDE = 64
PIXEL_SIDE = 8
COLOUR_BINS = 8
CELLS = 4
CELL_ORIENTATIONS, ORIENTATIONS = 8, 16
PIXELS_OF_BASELINE = 16


@dataclass(frozen=True)
class Described:
    """Random samples of a split: features (n, D), small pixels (n, P), labels (n,) or (n, K), a digest of each one's pixels."""

    features: npt.NDArray[np.float32]
    pixels: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    digests: list[bytes]

    def __len__(self) -> int:
        return len(self.labels)


def describe_batches(batches: Iterable[Batch]) -> Described:
    """Describe every image of some batches, keeping none of them."""
    features, pixels, labels, digests = [], [], [], []
    for batch in batches:
        images = batch["image"].cpu()  # (n, 3, H, W)
        features.append(describe(images))
        pixels.append(_shrunk(images, PIXELS_OF_BASELINE).flatten(1))
        labels.append(batch["label"].cpu().long())
        digests += [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images]
    return Described(torch.cat(features).numpy(), torch.cat(pixels).numpy(), torch.cat(labels).numpy(), digests)


def describe(images: torch.Tensor) -> torch.Tensor:
    """Features (n, D) of uint8 images (n, 3, H, W), on a scale of 0 to 1."""
    small = _shrunk(images, LARGEST_SIDE)
    parts = [_shrunk(images, PIXEL_SIDE).flatten(1), _colours(small), *_orientations(small)]
    return torch.cat(parts, dim=1)


def _shrunk(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images as float of 0 to 1, no side longer than `side`."""
    height, width = (min(side, length) for length in images.shape[-2:])
    return functional.adaptive_avg_pool2d(images.float() / 255, (height, width))


def _colours(images: torch.Tensor) -> torch.Tensor:
    """How often each channel has each of COLOUR_BINS levels, (n, 3 * COLOUR_BINS)."""
    levels = (images * COLOUR_BINS).long().clamp(max=COLOUR_BINS - 1)  # (n, 3, H, W)
    return functional.one_hot(levels, COLOUR_BINS).float().mean(dim=(2, 3)).flatten(1)


def _orientations(images: torch.Tensor) -> list[torch.Tensor]:
    """Shares of gradient magnitude by orientation, over the whole image and in each of CELLS x CELLS parts of it."""
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    # Of each pixel the channel with the steepest gradient counts: two colours may be equally bright.
    magnitude, channel = torch.hypot(across, down).max(dim=1, keepdim=True)  # (n, 1, H, W)
    angle = torch.atan2(down.gather(1, channel), across.gather(1, channel)).remainder(math.pi) / math.pi  # 0 to 1
    found = []
    for bins, cells in ((ORIENTATIONS, 1), (CELL_ORIENTATIONS, CELLS)):
        # Bins are centred on 0 degrees, so that the noise of an upright edge does not fall to either side of one.
        number = (angle * bins + 0.5).long().remainder(bins)
        voted = torch.zeros(len(images), bins, *images.shape[-2:]).scatter_(1, number, magnitude)
        histogram = functional.adaptive_avg_pool2d(voted, cells)  # (n, bins, cells, cells)
        found.append((histogram / (histogram.sum(dim=1, keepdim=True) + 1e-3)).flatten(1))
    return found
