"""Random changes of training images, each a pure function of (seed, epoch, sample).

torchvision's transforms draw from torch's default generator; seeding that for each sample (1.4 us) is what makes a resumed run
see the very tensors of the undisturbed one.
"""

from collections.abc import Callable

import torch

from pipeline.config import AugmentConfig
from pipeline.data.order import mix

Augmentation = Callable[[torch.Tensor], torch.Tensor]


def build_augmentation(config: AugmentConfig, size: tuple[int, int]) -> Augmentation | None:
    """Return a transform of uint8 (3, H, W) images that keeps their size (H, W), or None when all is off."""
    if config == AugmentConfig():
        return None
    from torchvision.transforms import InterpolationMode, v2

    steps: list[torch.nn.Module] = []
    if config.crop_scale < 1:
        steps.append(v2.RandomResizedCrop(list(size), scale=(config.crop_scale, 1.0), antialias=True))
    if config.rotate_degrees or config.translate or config.scale:
        steps.append(
            v2.RandomAffine(
                degrees=config.rotate_degrees,
                translate=(config.translate, config.translate),
                scale=(1 - config.scale, 1 + config.scale),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
    augmentation: Augmentation = v2.Compose(steps)
    return augmentation


def augment(image: torch.Tensor, augmentation: Augmentation, seed: int, epoch: int, index: int) -> torch.Tensor:
    """Apply `augmentation` to one image (3, H, W) with randomness of (seed, epoch, index) alone."""
    generator = torch.default_generator
    # With num_workers=0 the model's own random state lives in the same generator.
    state = generator.get_state()
    generator.manual_seed(mix(seed, epoch, index))
    try:
        return augmentation(image)
    finally:
        generator.set_state(state)
