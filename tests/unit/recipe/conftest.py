"""The run that the checks look at, and a way to give it another network."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.config import Config
from pipeline.manifest import DatasetManifest
from pipeline.models.sequential import network_for
from pipeline.preprocess import PreprocessSpec, build_spec
from pipeline.recipe import verdict
from pipeline.recipe.verdict import Subject

ChangeNetwork = Callable[[Callable[[nn.Sequential], None]], None]


@pytest.fixture
def subject(tiny_config: Config, tiny_dataset: DatasetManifest) -> Subject:
    """The tiny run on the CPU."""
    spec = build_spec(tiny_config.preprocess, tiny_dataset.image_stats)
    return Subject(tiny_config, tiny_dataset, spec, torch.device("cpu"))


@pytest.fixture
def change_network(monkeypatch: pytest.MonkeyPatch) -> ChangeNetwork:
    """A function that has every fresh network of a check changed."""

    def install(change: Callable[[nn.Sequential], None]) -> None:
        def build(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, *, pretrained: bool = True) -> nn.Sequential:
            network = network_for(config, manifest, spec, pretrained=pretrained)
            change(network)
            return network

        monkeypatch.setattr(verdict, "network_for", build)

    return install
