from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.config import AugmentConfig
from pipeline.data.augment import Augmentation, augment, build_augmentation

SIZE = (16, 20)
EVERYTHING = AugmentConfig(horizontal_flip=0.5, rotate_degrees=20.0, translate=0.1, scale=0.1, crop_scale=0.5)


@pytest.fixture
def image() -> torch.Tensor:
    """Noise, so that every change shows: uint8 (3, H, W)."""
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(config: AugmentConfig) -> Augmentation:
    augmentation = build_augmentation(config, SIZE)
    assert augmentation is not None
    return augmentation


def test_nothing_is_built_when_all_is_off() -> None:
    assert build_augmentation(AugmentConfig(), SIZE) is None


@pytest.mark.parametrize(
    "change",
    [{"horizontal_flip": 0.5}, {"rotate_degrees": 20.0}, {"translate": 0.2}, {"scale": 0.2}, {"crop_scale": 0.5}],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_changes_images_alone_and_keeps_their_size(change: dict[str, Any], image: torch.Tensor) -> None:
    augmentation = build(replace(AugmentConfig(), **change))
    before = image.clone()
    changed = [augment(image, augmentation, 0, 0, index) for index in range(20)]
    assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in changed)
    assert sum(not torch.equal(one, image) for one in changed) >= 4
    assert torch.equal(image, before)


def test_a_flip_mirrors_left_and_right(image: torch.Tensor) -> None:
    augmentation = build(AugmentConfig(horizontal_flip=0.999999))
    assert torch.equal(augment(image, augmentation, 1, 2, 3), image.flip(-1))


def test_an_augmentation_is_a_pure_function_of_seed_epoch_and_sample(image: torch.Tensor) -> None:
    augmentation = build(EVERYTHING)
    torch.manual_seed(1)
    first = augment(image, augmentation, seed=5, epoch=6, index=7)
    torch.manual_seed(2)
    torch.rand(100)
    augment(image, augmentation, seed=0, epoch=0, index=0)
    assert torch.equal(augment(image, build(EVERYTHING), seed=5, epoch=6, index=7), first)


def test_another_seed_epoch_or_sample_gets_another_augmentation(image: torch.Tensor) -> None:
    augmentation = build(EVERYTHING)
    numbers = [(5, 6, 7), (4, 6, 7), (5, 5, 7), (5, 6, 6), (7, 6, 5)]
    assert len({augment(image, augmentation, *one).numpy().tobytes() for one in numbers}) == len(numbers)


def test_the_randomness_of_the_model_is_not_disturbed(image: torch.Tensor) -> None:
    augmentation = build(EVERYTHING)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    augment(image, augmentation, 0, 0, 0)
    assert torch.equal(torch.rand(4), expected)


def test_the_randomness_of_the_model_is_not_disturbed_by_an_error_either(image: torch.Tensor) -> None:
    def fail(_image: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        raise ZeroDivisionError

    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        augment(image, fail, 0, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
