"""Normalisation as the first module of a network, so that it runs on the device and travels inside the ONNX file."""

import torch
from torch import nn

from pipeline.preprocess import PreprocessSpec


class Normalize(nn.Module):
    """uint8 images (N, 3, H, W) -> float (N, 3, H, W): (image / scale - mean) / std, channel by channel."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: PreprocessSpec) -> None:
        super().__init__()
        self.scale = float(spec.scale)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return normalised images of the dtype of the network."""
        return (image.to(self.mean.dtype) / self.scale - self.mean) / self.std
