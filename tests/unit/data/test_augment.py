import pytest
import torch

from pipeline.config import AugmentConfig, PreprocessConfig
from pipeline.data.augment import Augmentation, build_augmentation, plain_image, random_box
from pipeline.data.order import mix
from pipeline.manifest import ImageStats
from pipeline.preprocess import build_spec
from tests.unit.data.images import as_png, noise

SIZE = (16, 20)
SPEC = build_spec(PreprocessConfig(resize=list(SIZE)), ImageStats("train", [0.2, 0.4, 0.6], [0.5] * 3))
BOTH = AugmentConfig(horizontal_flip=0.5, crop_scale=0.5)


@pytest.fixture
def encoded() -> bytes:
    """Noise, so that every change shows: a PNG of 16 x 20 pixels."""
    return as_png(noise(*SIZE))


def build(config: AugmentConfig) -> Augmentation:
    augmentation = build_augmentation(config, SPEC)
    assert augmentation is not None
    return augmentation


def augmented(encoded: bytes, augmentation: Augmentation, seed: int = 0, epoch: int = 0, index: int = 0) -> torch.Tensor:
    return augmentation.image(encoded, SPEC, mix(seed, epoch, index))


def test_nothing_is_built_when_all_is_off() -> None:
    assert build_augmentation(AugmentConfig(), SPEC) is None
    assert build_augmentation(AugmentConfig(mixup=0.2, cutmix=1.0, hue=0.1, erase=0.5), SPEC) is None  # those change batches


@pytest.mark.parametrize("config", [AugmentConfig(horizontal_flip=0.5), AugmentConfig(crop_scale=0.5)], ids=["flip", "crop"])
def test_each_setting_changes_images_alone_and_keeps_their_size(config: AugmentConfig, encoded: bytes) -> None:
    augmentation = build(config)
    image = plain_image(encoded, SPEC)
    changed = [augmented(encoded, augmentation, index=index) for index in range(20)]
    assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in changed)
    assert sum(not torch.equal(one, image) for one in changed) >= 4


def test_a_flip_mirrors_left_and_right(encoded: bytes) -> None:
    augmentation = build(AugmentConfig(horizontal_flip=1.0))
    assert torch.equal(augmented(encoded, augmentation), plain_image(encoded, SPEC).flip(-1))


def test_an_augmentation_is_a_pure_function_of_seed_epoch_and_sample(encoded: bytes) -> None:
    augmentation = build(BOTH)
    torch.manual_seed(1)
    first = augmented(encoded, augmentation, seed=5, epoch=6, index=7)
    torch.manual_seed(2)
    torch.rand(100)
    augmented(encoded, augmentation)
    assert torch.equal(augmented(encoded, build(BOTH), seed=5, epoch=6, index=7), first)


def test_another_seed_epoch_or_sample_gets_another_augmentation(encoded: bytes) -> None:
    augmentation = build(BOTH)
    numbers = [(5, 6, 7), (4, 6, 7), (5, 5, 7), (5, 6, 6), (7, 6, 5)]
    assert len({augmented(encoded, augmentation, *one).numpy().tobytes() for one in numbers}) == len(numbers)


# ---- the random crop ----


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (8, 8), (1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("smallest", [0.08, 0.5, 0.99])
def test_a_random_box_lies_in_the_image(height: int, width: int, smallest: float) -> None:
    for key in range(100):
        box = random_box(key, height, width, smallest)
        assert min(box.height, box.width) >= 1
        assert min(box.top, box.left) >= 0
        assert box.top + box.height <= height
        assert box.left + box.width <= width


def test_random_boxes_cover_the_stated_areas_ratios_and_places() -> None:
    boxes = [random_box(mix(0, 0, index), 400, 400, 0.25) for index in range(2000)]
    areas = torch.tensor([box.height * box.width / 400**2 for box in boxes])
    ratios = torch.tensor([box.width / box.height for box in boxes])
    # Uniform on 0.25 to 1, less the large ones that do not fit; the bounds leave room for rounding to whole pixels.
    assert 0.245 < float(areas.min()) < 0.26 and 0.9 < float(areas.max()) <= 1
    assert 0.74 < float(ratios.min()) < 0.78 and 1.29 < float(ratios.max()) < 1.35
    assert len({(box.top, box.left) for box in boxes}) > 1000
    assert abs(sum(box.top + box.height / 2 for box in boxes) / len(boxes) - 200) < 10


def test_an_image_too_long_for_any_box_gives_its_middle() -> None:
    assert random_box(0, 30, 3000, 0.99) == (0, 1480, 30, 40)
    assert random_box(0, 3000, 30, 0.99) == (1480, 0, 40, 30)
