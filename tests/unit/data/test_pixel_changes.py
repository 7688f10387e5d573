"""Beside torchvision's transforms of single images, which mean the same and know nothing of a batch."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as single

from pipeline.config import AugmentConfig, PreprocessConfig
from pipeline.data import pixel_changes
from pipeline.data.augment import draw, draws, neutral_colour
from pipeline.data.order import mix
from pipeline.data.pixel_changes import PixelChanges, build_pixel_changes
from pipeline.manifest import ImageStats
from pipeline.preprocess import build_spec
from tests.unit.data.images import gradient, noise

Policy = Literal["randaugment", "trivialaugment"]
NUMBER, HEIGHT, WIDTH = 12, 40, 56
SPEC = build_spec(PreprocessConfig(resize=[HEIGHT, WIDTH]), ImageStats("train", [0.2, 0.4, 0.6], [0.5] * 3))
FILL = [51, 102, 153]
EACH: list[dict[str, Any]] = [
    {"rotate_degrees": 20.0},
    {"translate": 0.2},
    {"scale": 0.2},
    {"brightness": 0.5},
    {"contrast": 0.5},
    {"saturation": 0.5},
    {"hue": 0.5},
    {"policy": "randaugment"},
    {"policy": "trivialaugment"},
    {"erase": 0.5},
]
EVERYTHING = AugmentConfig(
    rotate_degrees=20.0, translate=0.1, scale=0.1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
    policy="randaugment", erase=0.5,
)  # fmt: skip


def as_batch(*images: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture
def images() -> torch.Tensor:
    """Uint8 (n, 3, H, W), their channels together in memory as the loader gives them: noise, and a photograph's soft edges."""
    soft = gradient(HEIGHT, WIDTH)
    return as_batch(*[noise(HEIGHT, WIDTH, seed=number) if number % 2 else np.roll(soft, number) for number in range(NUMBER)])


def seeds_of(number: int, epoch: int = 0) -> pixel_changes.Seeds:
    return np.array([mix(1, epoch, index) for index in range(number)], np.uint64)


def changed(config: AugmentConfig, images: torch.Tensor, epoch: int = 0) -> torch.Tensor:
    changes = build_pixel_changes(config, SPEC)
    assert changes is not None
    return changes(images, seeds_of(len(images), epoch))


# ---- what holds for all of them ----


def test_nothing_is_built_when_all_is_off() -> None:
    assert build_pixel_changes(AugmentConfig(crop_scale=0.5, horizontal_flip=0.5, mixup=0.2, cutmix=1.0), SPEC) is None


@pytest.mark.parametrize("setting", EACH, ids=lambda setting: "-".join(f"{name}-{value}" for name, value in setting.items()))
def test_each_setting_changes_images_alone_and_keeps_what_they_are(setting: dict[str, Any], images: torch.Tensor) -> None:
    before = images.clone()
    made = changed(replace(AugmentConfig(), **setting), images)
    assert torch.equal(images, before), "the loader's memory was written into"
    assert made.shape == images.shape and made.dtype == torch.uint8
    assert made.is_contiguous(memory_format=torch.channels_last)
    differs = (made != images).flatten(1).any(dim=1)
    assert int(differs.sum()) >= 3
    assert not torch.equal(made, changed(replace(AugmentConfig(), **setting), images, epoch=1))


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_an_image_becomes_the_same_in_any_batch_and_any_layout(
    policy: Policy, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = PixelChanges(replace(EVERYTHING, policy=policy), SPEC)
    seeds = seeds_of(NUMBER)
    whole = changes(images, seeds)
    order = np.random.default_rng(0).permutation(NUMBER)
    assert torch.equal(changes(images[order], seeds[order]), whole[order])
    assert torch.equal(changes(images.contiguous(), seeds), whole)
    for size in (1, 2, 5):
        parts = [changes(images[first : first + size], seeds[first : first + size]) for first in range(0, NUMBER, size)]
        assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(pixel_changes, "PIXELS_IN_CACHE", 3 * HEIGHT * WIDTH)
    assert torch.equal(changes(images, seeds), whole), "as many at once as a GPU takes"


def test_torch_draws_nothing(images: torch.Tensor) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    changed(EVERYTHING, images)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pixel_is_an_image_too() -> None:
    spec = build_spec(PreprocessConfig(resize=[1, 1]), ImageStats("train", [0.2, 0.4, 0.6], [0.5] * 3))
    policies: tuple[Policy, ...] = ("randaugment", "trivialaugment")
    for policy in policies:
        changes = PixelChanges(replace(EVERYTHING, policy=policy), spec)
        assert changes(torch.full((50, 3, 1, 1), 9, dtype=torch.uint8), seeds_of(50)).shape == (50, 3, 1, 1)


def test_the_numbers_of_many_keys_are_those_of_each() -> None:
    keys = seeds_of(50)
    for first in (0, 1, 40, 110):
        drawn = draws(keys, first, 3)
        assert drawn.T.tolist() == [draw(int(key), first, 3) for key in keys]
        assert drawn[1:].tolist() == draws(keys, first + 1, 2).tolist()
        assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(float(draws(np.arange(10_000, dtype=np.uint64), 3, 1).mean()) - 0.5) < 0.02


# ---- one by one, beside torchvision ----


def near(one: torch.Tensor, other: torch.Tensor, share: float = 0.0, levels: int = 1) -> bool:
    """Within so many grey levels, but for a share of the pixels: torchvision cuts off what it computes, we round it."""
    return float(((one.int() - other.int()).abs() > levels).double().mean()) <= share


# Where an image ends torchvision lets `fill` shine through twice, so the seam between both differs.
SEAM = 0.06
BILINEAR = InterpolationMode.BILINEAR


def of_torchvision(place: int, images: torch.Tensor, amount: float) -> torch.Tensor:
    """The change at a place of the table, done by torchvision."""
    degrees = math.degrees(math.atan(amount))
    rest: dict[str, Any] = {"interpolation": BILINEAR, "fill": FILL}
    still: dict[str, Any] = {"angle": 0.0, "scale": 1.0} | rest
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: images,
        lambda: single.affine(images, translate=[0, 0], shear=[degrees, 0.0], center=[0, 0], **still),
        lambda: single.affine(images, translate=[0, 0], shear=[0.0, degrees], center=[0, 0], **still),
        lambda: single.affine(images, translate=[round(amount), 0], shear=[0.0, 0.0], **still),
        lambda: single.affine(images, translate=[0, round(amount)], shear=[0.0, 0.0], **still),
        lambda: single.rotate(images, angle=-amount, **rest),
        lambda: single.adjust_brightness(images, 1 + amount),
        lambda: single.adjust_saturation(images, 1 + amount),
        lambda: single.adjust_contrast(images, 1 + amount),
        lambda: single.adjust_sharpness(images, 1 + amount),
        lambda: single.posterize(images, 8 - round(amount)),
        lambda: single.solarize(images, 255 - amount),
        lambda: single.autocontrast(images),
        lambda: single.equalize(images),
    ]
    return changes[place]()


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
@pytest.mark.parametrize("place", range(14))
def test_a_change_of_a_policy_is_torchvisions(policy: str, place: int, images: torch.Tensor) -> None:
    table = pixel_changes._policy(policy, (HEIGHT, WIDTH), FILL)
    assert len(table) == 14
    change = table[place]
    for share in (0.3, 1.0) + ((-0.3, -1.0) if change.is_signed else ()):
        amount = share * change.largest
        if place in (3, 4):
            amount = float(round(amount))  # torchvision shifts by whole pixels
        made = change.apply(images, np.full(NUMBER, amount))
        # A contrast or colour is cut off and rounded twice there.
        assert near(made, of_torchvision(place, images, amount), SEAM if 1 <= place <= 5 else 0.0, 2 if place in (7, 8) else 1)
        assert place == 0 or amount == 0 or not torch.equal(made, images)


def test_the_size_of_a_change_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of RandAugment 9 of 30 parts in all, of TrivialAugment any number of them."""
    seen: dict[Policy, list[float]] = {"randaugment": [], "trivialaugment": []}
    images = torch.zeros((400, 3, 8, 8), dtype=torch.uint8)
    for policy, amounts in seen.items():
        changes = PixelChanges(replace(AugmentConfig(), policy=policy), SPEC)

        def note(some: torch.Tensor, drawn: Any, amounts: list[float] = amounts) -> torch.Tensor:
            amounts.extend(drawn)
            return some

        changes.policy = [pixel_changes.Change(note, largest=30.0, is_signed=True)]
        changes(images, seeds_of(400))
    assert set(seen["randaugment"]) == {-9.0, 9.0} and len(seen["randaugment"]) == 800
    assert set(seen["trivialaugment"]) == set(range(-30, 31)) and len(seen["trivialaugment"]) == 400
    assert 330 < seen["randaugment"].count(9.0) < 470


def test_affine_changes_are_torchvisions(images: torch.Tensor) -> None:
    angle, shift, scale = (
        np.array([17.0, -170.0, 0.0]),
        np.array([[5.0, -3.0], [0.0, 11.0], [-4.0, 4.0]]),
        np.array([1.2, 0.7, 1.0]),
    )
    made = pixel_changes.warp(images[:3], pixel_changes._inverse(np.radians(angle), shift, scale), FILL)
    for row in range(3):
        moved = {"translate": shift[row].tolist(), "scale": float(scale[row]), "shear": [0.0, 0.0]}
        one = single.affine(images[row], angle=float(angle[row]), interpolation=BILINEAR, fill=FILL, **moved)
        assert near(made[row], one, SEAM)
    assert torch.equal(made[2, :, 4:, :-4], images[2, :, :-4, 4:]), "a shift by whole pixels is one"


def test_colours_change_one_after_the_other_as_torchvisions_do() -> None:
    """Of colours that nothing cuts off; the hue is turned in another way."""
    images = as_batch(*[96 + noise(HEIGHT, WIDTH, seed=number) // 4 for number in range(2)])
    factors = np.array([1.2, 0.8]), np.array([0.7, 1.3]), np.array([0.5, 1.5])
    made = pixel_changes.recolour(images, *factors, hue=np.zeros(2))
    for row in range(2):
        one = single.adjust_brightness(images[row], float(factors[0][row]))
        one = single.adjust_contrast(one, float(factors[1][row]))
        assert near(made[row], single.adjust_saturation(one, float(factors[2][row])), levels=3)  # cut off three times there


def test_a_hue_keeps_greys_and_brightness_and_comes_round() -> None:
    ones = np.ones(3)
    grey = torch.full((3, 3, 4, 4), 77, dtype=torch.uint8)
    turn = np.array([0.1, 0.25, -0.5])
    assert torch.equal(pixel_changes.recolour(grey, ones, ones, ones, turn), grey)
    images = as_batch(*[112 + noise(8, 8, seed=number) // 8 for number in range(3)])
    turned = pixel_changes.recolour(images, ones, ones, ones, turn)
    assert not near(turned, images, share=0.5)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close((turned * luma).sum(dim=1), (images * luma).sum(dim=1), rtol=0, atol=0.6)  # rounded pixels
    assert torch.equal(pixel_changes.recolour(images, ones, ones, ones, np.ones(3)), images)


def test_what_is_erased_is_a_rectangle_of_the_colour_that_normalisation_makes_nothing_of(images: torch.Tensor) -> None:
    assert neutral_colour(SPEC) == FILL
    many = images.repeat(40, 1, 1, 1)
    for probability in (1.0, 0.25):
        erased = (changed(AugmentConfig(erase=probability), many) == torch.tensor(FILL)[:, None, None]).all(dim=1)  # (n, H, W)
        areas = []
        for one in erased[erased.flatten(1).sum(dim=1) > 4]:
            rows, columns = one.any(dim=1), one.any(dim=0)
            areas.append(int(rows.sum()) * int(columns.sum()) / (HEIGHT * WIDTH))
            assert int(one.sum()) == int(rows.sum()) * int(columns.sum())
        assert abs(len(areas) / len(many) - probability) < 0.08
        assert 0.015 < min(areas) < 0.06 and 0.25 < max(areas) < 0.35


def test_a_factor_never_falls_below_nothing(images: torch.Tensor) -> None:
    dark = changed(AugmentConfig(brightness=5.0), images.repeat(10, 1, 1, 1))
    assert float(dark.float().mean()) > 10, "a factor below 0 would be black"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_makes_the_same_of_colours_and_nearly_the_same_of_places(images: torch.Tensor) -> None:
    changes, seeds = PixelChanges(EVERYTHING, SPEC), seeds_of(NUMBER)
    assert near(changes(images.cuda(), seeds).cpu(), changes(images, seeds))
    colours = PixelChanges(AugmentConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, erase=0.5), SPEC)
    assert torch.equal(colours(images.cuda(), seeds).cpu(), colours(images, seeds))
