"""Random changes of training images that keep their size, made of a whole batch at once and on the training device.

What an image becomes depends on its own seed alone, that of (seed, epoch, sample), and not on what else is in the batch:
numbers are drawn on the CPU, each image has an amount of its own, and pixels are reckoned in integers, or in single operations
of float32, each of which every device rounds alike. The meaning of each change and its range is torchvision's, but for the
hue: it turns about the axis of greys in YIQ (as NVIDIA DALI's does), which with brightness, contrast and saturation makes one
matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pipeline.config import AugmentConfig
from pipeline.data.augment import draws, neutral_colour
from pipeline.preprocess import PreprocessSpec

Floats = npt.NDArray[np.float64]
Seeds = npt.NDArray[np.uint64]
Apply = Callable[[torch.Tensor, Floats], torch.Tensor]  # uint8 (n, 3, H, W) and an amount for each (n,) to uint8 (n, 3, H, W)

# Numbers of an image's stream where each change begins to draw; crop and flip take those up to 40.
OF_AFFINE, OF_POLICY, OF_JITTER, OF_ERASING = 64, 72, 96, 104
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# Rows are Y, I and Q of NTSC's colours.
YIQ = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
BITS = 12  # behind the point of the integers of `recolour`
ONE = 1 << BITS
# A CPU works on so few at once that they stay near it: of 64 images of 224 x 224, colours then take 0.3 ms each instead of 2.
PIXELS_IN_CACHE = 1 << 18
# RandAugment's, of Cubuk et al., 2019 (arXiv 1909.13719): two changes, each of the size 9 of 31 from none to the largest.
RANDAUGMENT_CHANGES, NUM_SIZES, RANDAUGMENT_SIZE = 2, 31, 9
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # Zhong et al., 2017 (arXiv 1708.04896)


class PixelChanges:
    """What `config` asks for: affine changes, then a policy's, colours, and erasing."""

    def __init__(self, config: AugmentConfig, spec: PreprocessSpec) -> None:
        assert spec.fixed_size is not None
        self.config, self.fill = config, neutral_colour(spec)
        self.policy = _policy(config.policy, spec.fixed_size, self.fill) if config.policy != "none" else []

    def __call__(self, images: torch.Tensor, seeds: Seeds) -> torch.Tensor:
        """Changed images, of uint8 ones (n, 3, H, W) and the seed of each, (n,)."""
        changed = torch.empty_like(images)
        at_once = len(images) if images.is_cuda else max(1, PIXELS_IN_CACHE // images[0, 0].numel())
        for first in range(0, len(images), at_once):
            part = slice(first, first + at_once)
            changed[part] = self._change(images[part].clone(memory_format=torch.contiguous_format), seeds[part])
        return changed

    def _change(self, images: torch.Tensor, seeds: Seeds) -> torch.Tensor:
        """Of a few images, which are written into."""
        config = self.config
        if config.rotate_degrees or config.translate or config.scale:
            images = warp(images, self._affine(seeds, *images.shape[2:]), [0, 0, 0])
        if config.policy != "none":
            images = self._apply_policy(images, seeds)
        if config.brightness or config.contrast or config.saturation or config.hue:
            images = self._jitter(images, seeds)
        if config.erase:
            images = self._erase(images, seeds)
        return images

    def _affine(self, seeds: Seeds, height: int, width: int) -> Floats:
        angle, right, down, larger = 2 * draws(seeds, OF_AFFINE, 4) - 1
        shift = self.config.translate * np.stack([right * width, down * height], axis=1)  # (n, 2)
        return _inverse(np.radians(self.config.rotate_degrees * angle), shift.round(), 1 + self.config.scale * larger)

    def _apply_policy(self, images: torch.Tensor, seeds: Seeds) -> torch.Tensor:
        is_trivial = self.config.policy == "trivialaugment"
        for number in range(1 if is_trivial else RANDAUGMENT_CHANGES):
            which, size, sign = draws(seeds, OF_POLICY + 3 * number, 3)
            sizes = np.floor(size * NUM_SIZES) if is_trivial else np.full(len(seeds), float(RANDAUGMENT_SIZE))
            for place, change in enumerate(self.policy):
                rows = np.flatnonzero(np.floor(which * len(self.policy)) == place)
                if len(rows):
                    amounts = change.largest * sizes[rows] / (NUM_SIZES - 1)
                    amounts = np.where(change.is_signed & (sign[rows] < 0.5), -amounts, amounts)
                    here = torch.from_numpy(rows).to(images.device)
                    images[here] = change.apply(images[here], amounts)
        return images

    def _jitter(self, images: torch.Tensor, seeds: Seeds) -> torch.Tensor:
        config, drawn = self.config, 2 * draws(seeds, OF_JITTER, 4) - 1
        largest = (config.brightness, config.contrast, config.saturation)
        # A factor begins at 0 where the largest change is above 1, and is as likely to be anywhere up to its end.
        brightness, contrast, saturation = (
            max(0.0, 1 - most) + (each + 1) / 2 * (1 + most - max(0.0, 1 - most))
            for each, most in zip(drawn[:3], largest, strict=True)
        )
        return recolour(images, brightness, contrast, saturation, hue=drawn[3] * config.hue)

    def _erase(self, images: torch.Tensor, seeds: Seeds) -> torch.Tensor:
        height, width = images.shape[2:]
        is_erased, *drawn = draws(seeds, OF_ERASING, 5)
        erased = np.flatnonzero(is_erased < self.config.erase)
        of_area, of_ratio, of_top, of_left = (each[erased] for each in drawn)
        low, high = (math.log(ratio) for ratio in ERASED_RATIO)
        area = height * width * (ERASED_AREA[0] + of_area * (ERASED_AREA[1] - ERASED_AREA[0]))
        ratio = np.exp(low + of_ratio * (high - low))  # of height to width
        tall = np.sqrt(area * ratio).round().clip(1, height)
        wide = np.sqrt(area / ratio).round().clip(1, width)
        rows = _inside(np.floor(of_top * (height - tall + 1)), tall, height, images.device)  # (m, H)
        columns = _inside(np.floor(of_left * (width - wide + 1)), wide, width, images.device)  # (m, W)
        here, is_inside = torch.from_numpy(erased).to(images.device), rows[:, None, :, None] & columns[:, None, None, :]
        images[here] = torch.where(is_inside, _colour(self.fill, images), images[here])
        return images


def build_pixel_changes(config: AugmentConfig, spec: PreprocessSpec) -> PixelChanges | None:
    """Return what changes the pixels of training batches, or None where `config` asks for nothing of the kind."""
    asked = (config.rotate_degrees, config.translate, config.scale, config.brightness, config.contrast, config.saturation)
    return PixelChanges(config, spec) if any(asked) or config.hue or config.erase or config.policy != "none" else None


# ---- geometry ----


def warp(images: torch.Tensor, inverse: Floats, fill: list[int]) -> torch.Tensor:
    """Resample uint8 images (n, 3, H, W) between their pixels, with `fill` around them.

    `inverse` (n, 2, 3) gives the place (x, y) in an image of each pixel of the result, both from the middle, in pixels.
    """
    height, width = images.shape[2:]
    at = torch.from_numpy(inverse).float().to(images.device)[..., None, None]  # (n, 2, 3, 1, 1)
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    places = at[:, :, 0] * x + at[:, :, 1] * y + at[:, :, 2]  # (n, 2, H, W)
    grid = places.permute(0, 2, 3, 1) * torch.tensor([2 / width, 2 / height], device=images.device)
    background = _colour(fill, images).float()
    # What lies outside counts as 0, which is `fill` once that is added again.
    moved = functional.grid_sample(images.float() - background, grid, align_corners=False) + background
    return moved.round_().clamp_(0, 255).to(torch.uint8)


def _inverse(angle: Floats, shift: Floats, scale: Floats) -> Floats:
    """(n, 2, 3) for `warp`: turned by `angle` in radians, clockwise, made `scale` times as large, then shifted by (x, y)."""
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    turn = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], 1)  # (n, 2, 2)
    return np.concatenate([turn, -turn @ shift[..., None]], axis=2)


def _sheared(along_x: Floats, along_y: Floats, size: tuple[int, int]) -> Floats:
    """(n, 2, 3) for `warp`: leant to one side; the upper left corner of an image of `size` (H, W) stays where it is."""
    height, width = size
    zero = np.zeros_like(along_x)
    leant = np.stack([zero + 1, along_x, along_x * height / 2], axis=-1)
    tilted = np.stack([along_y, zero + 1, along_y * width / 2], axis=-1)
    return np.stack([leant, tilted], axis=1)


# ---- colours ----


def recolour(images: torch.Tensor, brightness: Floats, contrast: Floats, saturation: Floats, hue: Floats) -> torch.Tensor:
    """Brighter, then richer in contrast about its mean grey, then in colour, by factors (n,); its hue turned by `hue` circles.

    All of it is linear, so it is one matrix for each image of uint8 (n, 3, H, W).
    """
    grey = np.broadcast_to(LUMA, (3, 3))  # makes grey of a colour
    turn = 2 * np.pi * hue
    zero, cosine, sine = np.zeros_like(turn), np.cos(turn), np.sin(turn)
    turned = np.stack([zero + 1, zero, zero, zero, cosine, -sine, zero, sine, cosine], -1).reshape(-1, 3, 3)
    coloured = saturation[:, None, None] * np.eye(3) + (1 - saturation[:, None, None]) * grey
    matrix = (contrast * brightness)[:, None, None] * (np.linalg.inv(YIQ) @ turned @ YIQ @ coloured)
    # Greys stay as they are in `coloured` and `turned`, so the mean grey may be added at the end.
    return _linear(images, matrix, (1 - contrast) * brightness)


def _linear(images: torch.Tensor, matrix: Floats, of_mean: Floats) -> torch.Tensor:
    """Each pixel times its image's matrix, (n, 3, 3), and so much of the image's mean grey, (n,)."""
    device = images.device
    whole = torch.from_numpy(np.round(ONE * matrix).astype(np.int32)).to(device)[..., None, None]  # (n, 3, 3, 1, 1)
    share = torch.from_numpy(np.round(ONE * of_mean).astype(np.int64)).to(device)  # (n,)
    sums = images.sum(dim=(2, 3), dtype=torch.int64)  # (n, 3)
    luma = (sums * torch.tensor(np.round(1000 * LUMA).astype(np.int64), device=device)).sum(dim=1)  # (n,)
    middle = share * luma // (1000 * images.shape[2] * images.shape[3]) + ONE // 2
    total = middle.int()[:, None, None, None]
    for channel in range(3):
        total = total + whole[:, :, channel] * images[:, channel : channel + 1].int()
    return (total >> BITS).clamp_(0, 255).to(torch.uint8)


def sharpen(images: torch.Tensor, factors: Floats) -> torch.Tensor:
    """Away from what a small blur makes of uint8 images (n, 3, H, W), by factors (n,); 0 is the blur. Its border stays."""
    if min(images.shape[2:]) < 3:
        return images
    pixels = images.float()
    middle = pixels[:, :, 1:-1, 1:-1]
    blurred = pixels.clone()
    # The neighbours count 1 of 13 each, the pixel itself 5.
    around = functional.avg_pool2d(pixels, 3, stride=1, divisor_override=1)
    blurred[:, :, 1:-1, 1:-1] = ((around + 4 * middle) / 13).round_()
    factor = torch.from_numpy(factors).float().to(images.device)[:, None, None, None]
    return (blurred + factor * (pixels - blurred)).round_().clamp_(0, 255).to(torch.uint8)


def posterize(images: torch.Tensor, lost: Floats) -> torch.Tensor:
    """Uint8 images (n, 3, H, W) without their lowest bits, of which (n,) are `lost`."""
    mask = (256 - 2 ** np.round(lost)).astype(np.uint8)
    return images & torch.from_numpy(mask).to(images.device)[:, None, None, None]


def solarize(images: torch.Tensor, amounts: Floats) -> torch.Tensor:
    """Uint8 images (n, 3, H, W) with what is at least as bright as 255 less an amount (n,) turned into its negative."""
    least = torch.from_numpy(255 - amounts).float().to(images.device)[:, None, None, None]
    return torch.where(images >= least, 255 - images, images)


# ---- the published policies ----


@dataclass(frozen=True)
class Change:
    """One of a policy's: what it does, by how much at the most, and whether also the other way."""

    apply: Apply
    largest: float = 0.0
    is_signed: bool = False


def _policy(name: str, size: tuple[int, int], fill: list[int]) -> list[Change]:
    """The 14 changes that both policies draw from; TrivialAugment's (Müller and Hutter, 2021, arXiv 2103.10158) go further."""
    from torchvision.transforms.v2 import functional as of_torchvision

    height, width = size
    wide = name == "trivialaugment"
    shear, turn, colour = (0.99, 135.0, 0.99) if wide else (0.3, 30.0, 0.9)
    shift_x, shift_y = (32.0, 32.0) if wide else (150 / 331 * width, 150 / 331 * height)

    def moved(inverse: Callable[[Floats], Floats]) -> Apply:
        return lambda images, amounts: warp(images, inverse(amounts), fill)

    def coloured(brightness: int = 0, contrast: int = 0, saturation: int = 0) -> Apply:
        return lambda images, amounts: recolour(
            images, 1 + brightness * amounts, 1 + contrast * amounts, 1 + saturation * amounts, hue=0 * amounts
        )

    def shifted(x: int, y: int) -> Apply:
        return moved(lambda amounts: _inverse(0 * amounts, amounts[:, None] * [x, y], 1 + 0 * amounts))

    return [
        Change(lambda images, _: images),
        Change(moved(lambda amounts: _sheared(amounts, 0 * amounts, size)), shear, is_signed=True),
        Change(moved(lambda amounts: _sheared(0 * amounts, amounts, size)), shear, is_signed=True),
        Change(shifted(1, 0), shift_x, is_signed=True),
        Change(shifted(0, 1), shift_y, is_signed=True),
        Change(moved(lambda amounts: _inverse(np.radians(amounts), np.zeros((len(amounts), 2)), 1 + 0 * amounts)), turn, True),
        Change(coloured(brightness=1), colour, is_signed=True),
        Change(coloured(saturation=1), colour, is_signed=True),
        Change(coloured(contrast=1), colour, is_signed=True),
        Change(lambda images, amounts: sharpen(images, 1 + amounts), colour, is_signed=True),
        Change(posterize, 6.0 if wide else 4.0),
        Change(solarize, 255.0),
        Change(lambda images, _: of_torchvision.autocontrast(images)),
        Change(lambda images, _: of_torchvision.equalize(images)),
    ]


# ---- small things ----


def _colour(colour: list[int], images: torch.Tensor) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8, device=images.device)[:, None, None]


def _inside(first: Floats, length: Floats, limit: int, device: torch.device) -> torch.Tensor:
    """Which of `limit` places lie in each span, (n, limit)."""
    places = np.arange(limit)
    inside = (places >= first[:, None]) & (places < (first + length)[:, None])
    return torch.from_numpy(inside).to(device)
