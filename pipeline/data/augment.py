"""Random crops and mirror images, made as an image is decoded: pure functions of a key, which is that of (seed, epoch, sample).

They come from numbers of our own, so that the decoder in C can draw the same ones, and a resumed run sees the very pixels of
the undisturbed one. What keeps an image's size is done to whole batches by `pipeline.data.pixel_changes`, and what mixes two
by `pipeline.data.mixing`, both on the training device.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config import AugmentConfig
from pipeline.data.decode import Box, EncodedImage, decode_crop
from pipeline.data.native import CropReader
from pipeline.preprocess import PreprocessSpec, decode_image

# The customary range of the width-to-height ratio of a random crop (Szegedy et al., "Going deeper with convolutions", 2014).
ASPECT_RATIOS = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """How a training image is decoded: a random crop of the original, perhaps mirrored."""

    size: tuple[int, int]  # (H, W)
    crop_scale: float  # smallest share of the area; 1 for the crop of an evaluation
    flip: float = 0.0  # probability of a mirror image
    crops: CropReader | None = None  # the native decoder, which makes crop and flip in one

    def image(self, encoded: bytes, spec: PreprocessSpec, key: int) -> torch.Tensor:
        """Decode as `key` draws: uint8 (3, H, W). Raises DataError."""
        native = self.crops.decode(encoded, key) if self.crops is not None else None
        return self.decoded(encoded, spec, key) if native is None else torch.from_numpy(native).permute(2, 0, 1)

    def decoded(self, encoded: bytes, spec: PreprocessSpec, key: int) -> torch.Tensor:
        """Crop and flip by the general decoder: uint8 (3, H, W). Raises DataError."""
        if self.crop_scale < 1:
            image = EncodedImage(encoded, spec.background)
            pixels = decode_crop(image, random_box(key, image.height, image.width, self.crop_scale), self.size)
        else:
            pixels = plain_image(encoded, spec)
        return pixels.flip(-1) if draw(key, 0, 1)[0] < self.flip else pixels


def plain_image(encoded: bytes, spec: PreprocessSpec) -> torch.Tensor:
    """The pixels of an evaluation: uint8 (3, H, W). Raises DataError."""
    return torch.from_numpy(decode_image(encoded, spec).copy()).permute(2, 0, 1)


def build_augmentation(config: AugmentConfig, spec: PreprocessSpec, is_native: bool = False) -> Augmentation | None:
    """Return the crop and flip that `config` asks for, or None where images are decoded as for an evaluation."""
    assert spec.fixed_size is not None
    if config.crop_scale == 1 and not config.horizontal_flip:
        return None
    uses_native = is_native and config.crop_scale < 1
    crops = CropReader(config.crop_scale, config.horizontal_flip, spec.fixed_size) if uses_native else None
    return Augmentation(spec.fixed_size, config.crop_scale, config.horizontal_flip, crops)


def neutral_colour(spec: PreprocessSpec) -> list[int]:
    """The colour, 0..255, that the normalisation turns into about 0."""
    return [round(255 * mean) for mean in spec.mean]


def draws(keys: npt.NDArray[np.uint64], first: int, number: int) -> npt.NDArray[np.float64]:
    """Numbers from `first` on, in [0, 1), of the stream of each key (n,): (number, n).

    The stream is splitmix64's (Steele et al., 2014); its number 0 is the flip's.
    """
    places = np.arange(first + 1, first + 1 + number, dtype=np.uint64)[:, None]
    value = keys + places * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    numbers: npt.NDArray[np.float64] = np.ldexp(((value ^ value >> np.uint64(31)) >> np.uint64(11)).astype(np.float64), -53)
    return numbers


def draw(key: int, first: int, number: int) -> list[float]:
    """The same of one key."""
    numbers: list[float] = draws(np.array([key], np.uint64), first, number)[:, 0].tolist()
    return numbers


def random_box(key: int, height: int, width: int, smallest: float) -> Box:
    """A crop of `smallest` to all of the area and an aspect ratio between 3/4 and 4/3, drawn as torchvision draws it.

    Where ten draws do not fit, the largest central crop of an allowed ratio. `random_box` of native/module.c is the same.
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for attempt in range(CROP_ATTEMPTS):
        of_area, of_ratio, of_top, of_left = draw(key, 4 * attempt + 1, 4)
        area = height * width * (smallest + of_area * (1 - smallest))
        ratio = math.exp(low + of_ratio * (high - low))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(of_top * (height - box_height + 1)), int(of_left * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    ratio = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
    box_width, box_height = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)
