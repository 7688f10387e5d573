"""Pretrained weights: which file they are, what it holds, and how the images of the pretraining were prepared.

Weights are of use only behind the preprocessing that they were trained with, so it comes with them and becomes the model's
PreprocessSpec; a configuration that says otherwise is refused. torch is imported only where weights are asked for.
"""

import dataclasses
import functools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ModelConfig, PreprocessConfig
from pipeline.errors import ConfigError, ModelError, nearest
from pipeline.files import locked, sha256_of
from pipeline.manifest import DatasetManifest, ImageStats
from pipeline.preprocess import PRESETS, WHITE, PreprocessSpec, build_spec, normalization_numbers, spec_from_dict

if TYPE_CHECKING:
    import torch

TORCHVISION = "torchvision:"
# Networks of ours that have torchvision's layout, and so its weights.
OF_TORCHVISION = ("alexnet", "vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50")
# torchvision hands these images of ImageNet's normalisation, which they turn into Inception's inside (`transform_input`).
INSIDE = ("googlenet", "inception_v3")
FILE_SUFFIXES = (".pth", ".pt", ".ckpt")
HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")
DOWNLOAD_WAIT_SECONDS = 1800.0


# ---- the preprocessing ----


def spec_for(config: Config, manifest: DatasetManifest) -> PreprocessSpec:
    """The preprocessing of a run: that of its weights, or else what it asks for with the data set's statistics.

    Transparent images are laid on the data set's own background. Raises ConfigError where configuration and weights disagree.
    """
    red, green, blue = manifest.preparation.get("background", WHITE)
    brought = brought_spec(config.model)
    if brought is None:
        if config.model.weights is not None and config.preprocess.normalization is None:
            raise ConfigError(
                f"{config.model.weights}: does not say how its images were prepared. Say it: `preprocess.normalization` "
                "(imagenet for weights of torchvision), `preprocess.resize` and `preprocess.crop`."
            )
        spec = build_spec(config.preprocess, manifest.image_stats)
    else:
        _require_agreement(config.preprocess, brought, manifest.image_stats, str(config.model.weights))
        spec = brought
    return dataclasses.replace(spec, background=(red, green, blue))


def brought_spec(model: ModelConfig) -> PreprocessSpec | None:
    """The preprocessing that the weights bring, or None where there are no weights or they do not say."""
    if model.weights is None:
        return None
    if not is_file_name(model.weights):
        spec = _spec_of_transforms(_named_weights(model).transforms(), model.weights)
        if torchvision_name(model) in INSIDE:
            mean, std = PRESETS["inception"]
            return dataclasses.replace(spec, mean=list(mean), std=list(std))
        return spec
    facts = _facts_of(_existing(model.weights))
    if facts is None or "preprocess" not in facts:
        return None
    try:
        return spec_from_dict(facts["preprocess"])
    except ModelError as error:
        raise ConfigError(f"{model.weights}: {error}") from error


def _spec_of_transforms(transforms: Any, weights: str) -> PreprocessSpec:
    """What torchvision's `ImageClassification` preset does, as a PreprocessSpec."""
    if not isinstance(getattr(transforms, "crop_size", None), list):
        raise ConfigError(
            f"`model.weights` {weights}: torchvision prepares its images by {type(transforms).__name__}: no spec."
        )
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    return PreprocessSpec(
        resize=resize,
        crop=[crop, crop],
        interpolation=transforms.interpolation.value,
        antialias=transforms.antialias is not False,
        mean=list(transforms.mean),
        std=list(transforms.std),
        resize_mode="torchvision",
    )


def _require_agreement(config: PreprocessConfig, brought: PreprocessSpec, stats: ImageStats, weights: str) -> None:
    for key in ("resize", "crop", "interpolation", "antialias"):
        asked, own = getattr(config, key), getattr(brought, key)
        if asked is not None and asked != own:
            raise ConfigError(
                f"`preprocess.{key}` is {asked}, but the weights {weights} were trained with {own}. "
                f"Leave `preprocess.{key}` out, or train without `model.weights`."
            )
    if config.normalization is None:
        return
    mean, std = normalization_numbers(config.normalization, stats)
    if (mean, std) != (brought.mean, brought.std):
        raise ConfigError(
            f"`preprocess.normalization` is {config.normalization} (mean {_short(mean)}, std {_short(std)}), but the weights "
            f"{weights} were trained with mean {_short(brought.mean)}, std {_short(brought.std)}. "
            "Leave `preprocess.normalization` out, or train without `model.weights`."
        )


def _short(numbers: list[float]) -> str:
    return str([round(number, 4) for number in numbers])


# ---- the file ----


def is_file_name(weights: str) -> bool:
    """Whether `model.weights` names a file rather than an entry of torchvision's."""
    return "/" in weights or Path(weights).suffix in FILE_SUFFIXES or Path(weights).is_file()


def weights_file(model: ModelConfig) -> Path | None:
    """The file of the weights, or None without any; one that torchvision names is downloaded where it is not in its cache.

    Raises ConfigError, with the address and the place, where that is impossible.
    """
    if model.weights is None:
        return None
    if is_file_name(model.weights):
        return _existing(model.weights)
    import torch

    url = str(_named_weights(model).url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        _download(url, path, f"`model.weights` {model.weights} of {model.name}")
    return path


def weights_sha256(model: ModelConfig) -> str | None:
    """What identifies the weights, whatever their file is called. Raises ConfigError where torchvision's file is damaged."""
    path = weights_file(model)
    if path is None:
        return None
    sha256 = _sha256_of(path, _stamp(path))
    expected = HASH_IN_NAME.search(path.name)
    if not is_file_name(str(model.weights)) and expected and not sha256.startswith(expected[1]):
        raise ConfigError(f"{path}: is damaged: its sha256 is {sha256[:12]}, not {expected[1]}. Remove it, to fetch it again.")
    return sha256


def _existing(weights: str) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(f"`model.weights`: there is no file {path}.")
    return path


def _download(url: str, path: Path, what: str) -> None:
    import torch

    expected = HASH_IN_NAME.search(path.name)
    try:
        with locked(path, wait_seconds=DOWNLOAD_WAIT_SECONDS):
            if not path.is_file():  # another process of this machine may have brought it
                torch.hub.download_url_to_file(url, str(path), hash_prefix=expected[1] if expected else None, progress=False)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{what}: cannot be downloaded ({' '.join(str(error).split())[:150]}). "
            f"Fetch {url} where there is a network, and put it there as {path}."
        ) from error


def torchvision_name(model: ModelConfig) -> str | None:
    """What torchvision calls this network, or None where it does not have it."""
    if model.name.startswith(TORCHVISION):
        return model.name.removeprefix(TORCHVISION)
    if model.blocks or model.name not in OF_TORCHVISION:
        return None
    return f"{model.name}_bn" if model.name.startswith("vgg") and model.norm == "batch" else model.name


def torchvision_names() -> list[str]:
    """Every classification model of torchvision."""
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _named_weights(model: ModelConfig) -> Any:
    """The entry of torchvision's weights enum. Raises ConfigError for an unknown network or entry."""
    name = torchvision_name(model)
    if name is None:
        raise ConfigError(
            f"`model.weights` is {model.weights}, but torchvision has no weights of {model.name}. "
            f"Name a file ({', '.join(FILE_SUFFIXES)})."
        )
    if name not in torchvision_names():
        raise ConfigError(
            f"`model.name`: torchvision has no classification model '{name}'.{nearest(name, torchvision_names())}"
        )
    import torchvision

    entries = torchvision.models.get_model_weights(name)
    if model.weights not in entries.__members__:
        known = list(entries.__members__)
        suggestion = nearest(str(model.weights), known) or f" Known: {', '.join(known)}."
        raise ConfigError(f"`model.weights` is {model.weights}, which torchvision does not have for {name}.{suggestion}")
    return entries[model.weights]


# ---- the content ----


@dataclass(frozen=True)
class PretrainedWeights:
    """Tensors by name, and whose classes the last layer is for, where the file says so."""

    path: Path
    tensors: dict[str, "torch.Tensor"]
    metadata: dict[str, Any]  # versions of modules, as torch keeps them in a state_dict
    class_names: list[str] | None


def load_weights(model: ModelConfig) -> PretrainedWeights:
    """Read the weights, tensors and plain values only. Raises ConfigError for a file that cannot be read so."""
    path = weights_file(model)
    assert path is not None
    content = _read(path)
    facts = content.get("shardline")
    if facts is not None:
        prefix = "network."
        own = {key.removeprefix(prefix): value for key, value in content["state_dict"].items() if key.startswith(prefix)}
        return PretrainedWeights(path, own, {}, facts["class_names"])
    for key in ("state_dict", "model"):  # as reference scripts save them
        content = content[key] if isinstance(content.get(key), dict) else content
    if not content or not all(hasattr(value, "shape") for value in content.values()):
        raise ConfigError(f"{path}: holds no state_dict, that is no tensors by name.")
    return PretrainedWeights(path, dict(content), dict(getattr(content, "_metadata", {})), None)


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        # The file form of before 2020 cannot be mapped into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: cannot be read as weights, tensors and plain values only ({reason}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not a state_dict.")
    return content


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


# Several stages of a command ask for the same file, which can hold half a gigabyte.


@functools.lru_cache(maxsize=8)
def _sha256_of(path: Path, _size_and_time: tuple[int, int]) -> str:
    return sha256_of(path)


def _facts_of(path: Path) -> dict[str, Any] | None:
    return _facts_in(path, _stamp(path))


@functools.lru_cache(maxsize=8)
def _facts_in(path: Path, _size_and_time: tuple[int, int]) -> dict[str, Any] | None:
    """What a checkpoint of Shardline says of itself; None for any other file."""
    facts: dict[str, Any] | None = _read(path).get("shardline")
    return facts
