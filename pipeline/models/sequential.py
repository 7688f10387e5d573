"""One nn.Sequential from the uint8 image to the logits: normalize, features, pool (where there is one), classifier."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from pipeline.config import Config, ModelConfig
from pipeline.manifest import DatasetManifest
from pipeline.models.freezing import require_known_prefixes
from pipeline.models.initialise import head_of, initialise, initialise_head, set_prior_bias, start_as_identity
from pipeline.models.named import family_of, require_options, with_defaults
from pipeline.models.normalize import Normalize
from pipeline.models.pretrained import load_pretrained
from pipeline.models.shapes import describe_network, network_table
from pipeline.preprocess import PreprocessSpec
from pipeline.task import task_of


def network_for(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, *, pretrained: bool = True) -> nn.Sequential:
    """The network of a run; `pretrained=False` where all of its weights come from a checkpoint anyway."""
    task = task_of(manifest, config)
    return build_network(
        config.model,
        task.num_outputs,
        spec,
        task.prior[-task.num_outputs :],
        independent=task.kind != "single",
        pretrained=pretrained,
        class_names=manifest.class_names,
    )


def summarise(config: Config, manifest: DatasetManifest, spec: PreprocessSpec) -> list[list[str]]:
    """The rows of the network's table, without drawing a single weight."""
    with torch.device("meta"):
        network = network_for(config, manifest, spec, pretrained=False)
    return network_table(describe_network(network, spec))


def build_network(
    config: ModelConfig,
    num_outputs: int,
    spec: PreprocessSpec,
    prior: Sequence[float] | None = None,
    *,
    independent: bool = False,
    pretrained: bool = True,
    class_names: Sequence[str] | None = None,
) -> nn.Sequential:
    """Return a network from uint8 images (N, 3, H, W) to logits (N, K), its weights drawn from torch's default generator.

    `prior` are the class shares for `model.prior_bias`, `independent` says that each output is a yes or no of its own.
    Raises ConfigError for settings that the network does not have, and for the first layer that cannot take its input.
    """
    assert spec.fixed_size is not None
    require_options(config)
    parts = family_of(config).build(with_defaults(config), num_outputs, spec.fixed_size)
    children = OrderedDict(normalize=Normalize(spec), features=parts.features, pool=parts.pool, classifier=parts.classifier)
    network = nn.Sequential(OrderedDict((name, child) for name, child in children.items() if child is not None))
    head = head_of(network)[1]
    if parts.initialised:
        initialise_head(head)
    else:
        initialise(network, head)
    if config.zero_init_residual:
        start_as_identity(network)
    if config.prior_bias and prior is not None:
        set_prior_bias(head, prior, independent=independent)
    if config.weights is not None and pretrained:
        load_pretrained(network, config, parts.rename, class_names)
    require_known_prefixes(network, config)
    return network


def count_parameters(network: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def require_forward(network: nn.Sequential, spec: PreprocessSpec) -> None:
    """Let every layer say what it makes of an image, so that a shape error is found, by name, before any rank starts."""
    describe_network(network, spec)
