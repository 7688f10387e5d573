import numpy as np
import pytest
import torch

from pipeline.config import AugmentConfig
from pipeline.data.mixing import mix_batch, require_mixable
from pipeline.errors import ConfigError

NUMBER = 8
IMAGES = torch.randint(0, 256, (NUMBER, 3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(NUMBER)
WEIGHTS = torch.ones(NUMBER)
MIXUP, CUTMIX = AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0)


def test_nothing_is_mixed_unless_asked_for() -> None:
    assert mix_batch(IMAGES, LABELS, WEIGHTS, AugmentConfig(crop_scale=0.5), seed=1, step=2) == (IMAGES, None)


def test_rows_of_several_labels_follow_their_images() -> None:
    rows = torch.eye(NUMBER, dtype=torch.uint8)
    _, mixed = mix_batch(IMAGES, rows, WEIGHTS, MIXUP, seed=1, step=0)
    assert mixed is not None
    assert torch.equal(mixed.other_label, rows[[1, 0, 3, 2, 5, 4, 7, 6]])


def test_mixup_blends_each_image_with_its_neighbour_and_shares_the_loss_alike() -> None:
    shares = set()
    for step in range(20):
        image, mixed = mix_batch(IMAGES, LABELS, WEIGHTS, MIXUP, seed=1, step=step)
        assert mixed is not None
        assert mixed.other_label.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
        share = float(mixed.share[0])
        assert mixed.share.tolist() == [share] * NUMBER
        expected = share * IMAGES.double() + (1 - share) * IMAGES[mixed.other_label].double()
        # Rounded to whole numbers.
        torch.testing.assert_close(image.double(), expected, rtol=0, atol=0.5)
        shares.add(share)
    assert len(shares) > 15


def test_cutmix_pastes_a_rectangle_and_shares_the_loss_by_its_area() -> None:
    shares = []
    for step in range(50):
        image, mixed = mix_batch(IMAGES, LABELS, WEIGHTS, CUTMIX, seed=1, step=step)
        assert mixed is not None
        pasted = (image == IMAGES[mixed.other_label]).all(dim=1) & (image != IMAGES).any(dim=1)  # (n, H, W)
        assert ((image == IMAGES).all(dim=1) | pasted).all()
        rows, columns = pasted[0].any(dim=1), pasted[0].any(dim=0)
        assert int(pasted[0].sum()) == int(rows.sum()) * int(columns.sum())
        share = float(mixed.share[0])
        assert share == pytest.approx(1 - int(pasted[0].sum()) / (12 * 16), abs=1e-6)  # float32
        shares.append(share)
    # Beta(1, 1) is uniform; a rectangle that hangs over the border is smaller than drawn.
    assert 0.45 < np.mean(shares) < 0.85
    assert min(shares) < 0.35


def test_a_coin_decides_where_both_are_on() -> None:
    both = AugmentConfig(mixup=0.4, cutmix=1.0)
    kinds = []
    for step in range(40):
        image, mixed = mix_batch(IMAGES, LABELS, WEIGHTS, both, seed=1, step=step)
        assert mixed is not None
        kinds.append(bool((image[0] == IMAGES[0]).all(dim=0).any() or (image[0] == IMAGES[1]).all(dim=0).any()))
    assert 8 < sum(kinds) < 32


@pytest.mark.parametrize("config", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_any_number_of_ranks_mixes_the_same_images_in_a_step(config: AugmentConfig) -> None:
    image, whole = mix_batch(IMAGES, LABELS, WEIGHTS, config, seed=5, step=6)
    halves = [mix_batch(IMAGES[part], LABELS[part], WEIGHTS[part], config, 5, 6) for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(image, torch.cat([half for half, _ in halves]))
    assert whole is not None
    for place in range(2):
        assert torch.equal(whole[place], torch.cat([mixed[place] for _, mixed in halves if mixed is not None]))
    assert not torch.equal(image, mix_batch(IMAGES, LABELS, WEIGHTS, config, seed=5, step=7)[0])


@pytest.mark.parametrize("config", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_a_pair_with_a_masked_row_stays_as_it_is(config: AugmentConfig) -> None:
    weights = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 0])
    image, mixed = mix_batch(IMAGES, LABELS, weights, config, seed=1, step=2)
    assert mixed is not None
    assert torch.equal(image[[2, 3, 6, 7]], IMAGES[[2, 3, 6, 7]])
    assert (mixed.share == 1).tolist() == [False, False, True, True, False, False, True, True]


def test_samples_that_cannot_be_paired_are_refused() -> None:
    require_mixable(MIXUP, 4)
    require_mixable(AugmentConfig(), 3)
    with pytest.raises(ConfigError, match=r"each has 3\. Set `data\.global_batch_size` to an even number for each process"):
        require_mixable(CUTMIX, 3)
