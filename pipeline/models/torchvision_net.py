"""Any classification model of torchvision as [normalize, features, classifier]: its body, then a last layer for our classes."""

from typing import Any

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, nearest
from pipeline.models.blocks import Parts
from pipeline.pretraining import torchvision_name, torchvision_names

# Their auxiliary outputs make them return tuples in training.
WITH_AUXILIARY = ("googlenet", "inception_v3")


def build_torchvision(config: ModelConfig, num_outputs: int, _size: tuple[int, int]) -> Parts:
    """The body without its last layer as `features`, a fresh last layer as `classifier`. Raises ConfigError."""
    import torchvision

    name = str(torchvision_name(config))
    if name not in torchvision_names():
        suggestion = nearest(name, torchvision_names())
        raise ConfigError(f"`model.name`: torchvision has no classification model '{name}'.{suggestion}")
    options: dict[str, Any] = {}
    if name in WITH_AUXILIARY:
        # The normalisation of their weights is Inception's (`pipeline.pretraining`), so nothing is left to transform.
        options = {"aux_logits": False, "init_weights": True, "transform_input": False}
    body = _without_weights(name, options)
    _set_dropout(body, config)
    _set_stochastic_depth(body, config)
    if isinstance(body, torchvision.models.SqueezeNet):
        return _squeezenet(body, num_outputs)
    head_name = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)][-1]
    head = body.get_submodule(head_name)
    assert isinstance(head, nn.Linear)
    body.set_submodule(head_name, nn.Identity())
    has_dropout = any(isinstance(module, nn.Dropout) for module in body.modules())
    classifier = nn.Sequential(
        nn.Dropout(0.0 if has_dropout else config.dropout or 0.0), nn.Linear(head.in_features, num_outputs)
    )

    def rename(parameter: str) -> str:
        if parameter.startswith(f"{head_name}."):
            return f"classifier.1.{parameter.removeprefix(f'{head_name}.')}"
        return f"features.{parameter}"

    return Parts(body, classifier, rename=rename, initialised=True)


def _without_weights(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    try:
        body: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    except NotImplementedError:
        # RegNet works its widths out with tensors, which the meta device cannot tell.
        with torch.device("cpu"):
            body = torchvision.models.get_model(name, weights=None, **options)
        return body.to(torch.get_default_device())
    return body


def _squeezenet(body: nn.Module, num_outputs: int) -> Parts:
    """Its last layer is a convolution, with an activation and the pooling behind it."""
    features, classifier = body.get_submodule("features"), body.get_submodule("classifier")
    assert isinstance(classifier, nn.Sequential)
    dropout, convolution, act, pool = classifier
    assert isinstance(convolution, nn.Conv2d)
    head = nn.Conv2d(convolution.in_channels, num_outputs, kernel_size=1)
    return Parts(features, nn.Sequential(dropout, head, act, pool, nn.Flatten()), initialised=True)


def _set_dropout(body: nn.Module, config: ModelConfig) -> None:
    for module in body.modules():
        if isinstance(module, nn.Dropout) and config.dropout is not None:
            module.p = config.dropout


def _set_stochastic_depth(body: nn.Module, config: ModelConfig) -> None:
    """Scale the falling probabilities of the body so that the last has the one that is asked for."""
    from torchvision.ops import StochasticDepth

    if config.stochastic_depth is None:
        return
    drops = [module for module in body.modules() if isinstance(module, StochasticDepth)]
    largest = max((drop.p for drop in drops), default=0.0)
    if config.stochastic_depth and not largest:
        raise ConfigError(f"`model.stochastic_depth`: {config.name} has no residual branches that can be dropped.")
    for drop in drops:
        drop.p *= config.stochastic_depth / largest if largest else 0.0
