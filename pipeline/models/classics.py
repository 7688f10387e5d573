"""AlexNet and VGG in torchvision's layout, so that its weights load: features, average pooling to 6 x 6 or 7 x 7, classifier.

AlexNet is the one of "One weird trick" (Krizhevsky 2014, arXiv 1404.5997); VGG is Simonyan and Zisserman 2014, arXiv 1409.1556.
"""

from torch import nn

from pipeline.config import ModelConfig
from pipeline.models.blocks import AdaptiveAveragePool, Parts, activation, norm, scaled
from pipeline.models.shapes import feature_map, leaves, output_of

POOL = 0  # in the tables below
# (channels, kernel, stride, padding) of each convolution.
ALEXNET = ((64, 11, 4, 2), POOL, (192, 5, 1, 2), POOL, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), POOL)
# Channels of the convolutions of each stage, and how many each stage has.
VGG_CHANNELS = (64, 128, 256, 512, 512)
VGG_DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
HIDDEN = 4096


def build_alexnet(config: ModelConfig, num_outputs: int, size: tuple[int, int]) -> Parts:
    """The 11/5/3/3/3 features. Raises ConfigError for an image that is too small, naming the layer."""
    features: list[nn.Module] = []
    before = 3
    for row in ALEXNET:
        if isinstance(row, int):
            features.append(nn.MaxPool2d(kernel_size=3, stride=2))
            continue
        channels = scaled(row[0], config)
        features += [nn.Conv2d(before, channels, *row[1:]), *norm(config, channels), activation(config)]
        before = channels
    hidden = scaled(HIDDEN, config)
    pool = _pool(features, size, (6, 6))
    classifier = nn.Sequential(
        nn.Dropout(config.dropout or 0.0),
        nn.Linear(before * 6 * 6, hidden),
        activation(config),
        nn.Dropout(config.dropout or 0.0),
        nn.Linear(hidden, hidden),
        activation(config),
        nn.Linear(hidden, num_outputs),
    )
    return Parts(nn.Sequential(*features), classifier, pool)


def build_vgg(config: ModelConfig, num_outputs: int, size: tuple[int, int]) -> Parts:
    """3 x 3 convolutions in five stages. Raises ConfigError for an image that is too small, naming the layer."""
    features: list[nn.Module] = []
    before = 3
    for channels, depth in zip((scaled(number, config) for number in VGG_CHANNELS), VGG_DEPTHS[config.name], strict=True):
        for _ in range(depth):
            # torchvision's have a bias even before a normalisation.
            features += [nn.Conv2d(before, channels, 3, padding=1), *norm(config, channels), activation(config)]
            before = channels
        features.append(nn.MaxPool2d(kernel_size=2, stride=2))
    hidden = scaled(HIDDEN, config)
    pool = _pool(features, size, (7, 7))
    classifier = nn.Sequential(
        nn.Linear(before * 7 * 7, hidden),
        activation(config),
        nn.Dropout(config.dropout or 0.0),
        nn.Linear(hidden, hidden),
        activation(config),
        nn.Dropout(config.dropout or 0.0),
        nn.Linear(hidden, num_outputs),
    )
    return Parts(nn.Sequential(*features), classifier, pool)


def _pool(features: list[nn.Module], size: tuple[int, int], after: tuple[int, int]) -> nn.Sequential:
    values = feature_map(3, *size)
    for name, layer in leaves(nn.Sequential(*features), "features."):
        values = output_of(layer, values, f"`model`: {name} ({type(layer).__name__})")
    return nn.Sequential(AdaptiveAveragePool((values.shape[2], values.shape[3]), after), nn.Flatten())
