import dataclasses

import numpy as np
import pytest
import torch

from pipeline.config import PreprocessConfig
from pipeline.manifest import ImageStats
from pipeline.models.normalize import Normalize
from pipeline.preprocess import PreprocessSpec, build_spec


@pytest.fixture
def spec() -> PreprocessSpec:
    """Three channels that differ, so that a swap of axes or channels is seen."""
    return build_spec(PreprocessConfig(resize=[4, 5]), ImageStats("train", [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]))


def test_an_image_is_scaled_to_one_then_standardised_channel_by_channel(spec: PreprocessSpec) -> None:
    image = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(np.uint8) * 2  # (N, 3, H, W), 0 to 238
    expected = np.empty(image.shape)
    for channel in range(3):
        expected[:, channel] = (image[:, channel] / 255 - spec.mean[channel]) / spec.std[channel]
    found = Normalize(spec)(torch.from_numpy(image))
    assert found.dtype == torch.float32
    # Three float32 operations on numbers up to 5.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_its_numbers_are_saved_with_the_weights_but_never_trained(spec: PreprocessSpec) -> None:
    module = Normalize(spec)
    assert not list(module.parameters())
    assert set(module.state_dict()) == {"mean", "std"}
    other = Normalize(dataclasses.replace(spec, mean=[0.0] * 3, std=[1.0] * 3))
    other.load_state_dict(module.state_dict())
    image = torch.randint(0, 256, (1, 3, 4, 5), dtype=torch.uint8)
    assert torch.equal(other(image), module(image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_come_out_in_the_dtype_of_the_network(spec: PreprocessSpec, dtype: torch.dtype) -> None:
    assert Normalize(spec).to(dtype)(torch.zeros(1, 3, 4, 5, dtype=torch.uint8)).dtype == dtype
