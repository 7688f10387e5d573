"""Random changes of training images, each a pure function of a key, which is that of (seed, epoch, sample).

Crop and flip come from numbers of our own, so that the decoder in C can draw the same ones. torchvision's transforms draw from
torch's default generator; seeding that for each sample is what makes a resumed run see the very tensors of the undisturbed one.
MixUp and CutMix need the batch and so lie in `pipeline.data.mixing`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pipeline.config import AugmentConfig
from pipeline.data.decode import Box, EncodedImage, decode_crop
from pipeline.data.native import CropReader
from pipeline.preprocess import PreprocessSpec, decode_image

# The customary range of the width-to-height ratio of a random crop (Szegedy et al., "Going deeper with convolutions", 2014).
ASPECT_RATIOS = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image: a random crop of the original, then changes of the pixels that keep the size."""

    size: tuple[int, int]  # (H, W)
    crop_scale: float  # smallest share of the area; 1 for the crop of an evaluation
    change: Callable[[torch.Tensor], torch.Tensor] | None
    flip: float = 0.0  # probability of a mirror image
    crops: CropReader | None = None  # the native decoder, which makes crop and flip in one

    def image(self, encoded: bytes, spec: PreprocessSpec, key: int) -> torch.Tensor:
        """Decode and change as `key` draws: uint8 (3, H, W). Raises DataError."""
        native = self.crops.decode(encoded, key) if self.crops is not None else None
        pixels = self.decoded(encoded, spec, key) if native is None else torch.from_numpy(native).permute(2, 0, 1)
        if self.change is None:
            return pixels
        with seeded(key):
            return self.change(pixels)

    def decoded(self, encoded: bytes, spec: PreprocessSpec, key: int) -> torch.Tensor:
        """Crop and flip by the general decoder: uint8 (3, H, W). Raises DataError."""
        if self.crop_scale < 1:
            image = EncodedImage(encoded, spec.background)
            pixels = decode_crop(image, random_box(key, image.height, image.width, self.crop_scale), self.size)
        else:
            pixels = plain_image(encoded, spec)
        return pixels.flip(-1) if draw(key, 0) < self.flip else pixels


def plain_image(encoded: bytes, spec: PreprocessSpec) -> torch.Tensor:
    """The pixels of an evaluation: uint8 (3, H, W). Raises DataError."""
    return torch.from_numpy(decode_image(encoded, spec).copy()).permute(2, 0, 1)


def build_augmentation(config: AugmentConfig, spec: PreprocessSpec, is_native: bool = False) -> Augmentation | None:
    """Return what `config` asks for, or None when all that happens to single images is off."""
    assert spec.fixed_size is not None
    changes = _changes(config, spec)
    if config.crop_scale == 1 and not config.horizontal_flip and not changes:
        return None
    change = torch.nn.Sequential(*changes) if changes else None
    crops = (
        CropReader(config.crop_scale, config.horizontal_flip, spec.fixed_size) if is_native and config.crop_scale < 1 else None
    )
    return Augmentation(spec.fixed_size, config.crop_scale, change, config.horizontal_flip, crops)


def _changes(config: AugmentConfig, spec: PreprocessSpec) -> list[torch.nn.Module]:
    from torchvision.transforms import InterpolationMode, v2

    changes: list[torch.nn.Module] = []
    fill = neutral_colour(spec)
    if config.rotate_degrees or config.translate or config.scale:
        changes.append(
            v2.RandomAffine(
                degrees=config.rotate_degrees,
                translate=(config.translate, config.translate),
                scale=(1 - config.scale, 1 + config.scale),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    if config.policy == "randaugment":
        changes.append(v2.RandAugment(interpolation=InterpolationMode.BILINEAR, fill=fill))
    elif config.policy == "trivialaugment":
        changes.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=fill))
    if config.brightness or config.contrast or config.saturation or config.hue:
        changes.append(v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue))
    if config.erase:
        changes.append(v2.RandomErasing(config.erase, value=fill))
    return changes


def neutral_colour(spec: PreprocessSpec) -> list[int]:
    """The colour, 0..255, that the normalisation turns into about 0."""
    return [round(255 * mean) for mean in spec.mean]


def draw(key: int, place: int) -> float:
    """Number `place`, in [0, 1), of the stream that `key` begins: splitmix64 (Steele et al., 2014). Number 0 is the flip's."""
    value = (key + (place + 1) * 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return float((value ^ value >> 31) >> 11) * 2.0**-53


def random_box(key: int, height: int, width: int, smallest: float) -> Box:
    """A crop of `smallest` to all of the area and an aspect ratio between 3/4 and 4/3, drawn as torchvision draws it.

    Where ten draws do not fit, the largest central crop of an allowed ratio. `random_box` of native/module.c is the same.
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for attempt in range(CROP_ATTEMPTS):
        of_area, of_ratio, of_top, of_left = (draw(key, 4 * attempt + place) for place in range(1, 5))
        area = height * width * (smallest + of_area * (1 - smallest))
        ratio = math.exp(low + of_ratio * (high - low))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(of_top * (height - box_height + 1)), int(of_left * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    ratio = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
    box_width, box_height = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Let torch's default generator be a function of `key` for a block."""
    generator = torch.default_generator
    # With num_workers=0 the model's own random state lives in the same generator.
    state = generator.get_state()
    generator.manual_seed(key)
    try:
        yield
    finally:
        generator.set_state(state)
