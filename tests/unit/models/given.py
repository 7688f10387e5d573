"""What the tests of networks start from."""

import torch
from torch import nn

from pipeline.config import ModelConfig, PreprocessConfig
from pipeline.manifest import ImageStats
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec, build_spec


def spec_of(height: int, width: int) -> PreprocessSpec:
    """The preprocessing of images of one size."""
    return build_spec(PreprocessConfig(resize=[height, width]), ImageStats("train", [0.4] * 3, [0.2] * 3))


def images_of(number: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """Noise, uint8 (N, 3, H, W)."""
    return torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def on_meta(config: ModelConfig, num_outputs: int = 1000, side: int = 224) -> nn.Sequential:
    """A network of any size without a single number in memory."""
    with torch.device("meta"):
        return build_network(config, num_outputs, spec_of(side, side))
