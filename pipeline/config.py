"""One YAML file is one whole run; these dataclasses are its sections, and every default is written here once.

Nothing here imports torch: `shard`, `verify` and every `--help` read their sections in a fraction of a second. Whether a
setting can change the trained weights is stated beside it (`identity`): a run whose identity changed is another run.
"""

import dataclasses
import math
import operator
import os
import re
import tempfile
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ConfigError, nearest
from pipeline.files import digest_of

if typing.TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from yaml import SafeLoader

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Monitor = Literal["val/accuracy", "val/loss", "val/top5", "val/macro_f1", "val/auroc", "val/average_precision", "val/ece"]
Normalization = Literal["dataset", "imagenet", "kinetics", "clip", "inception", "none"]
Norm = Literal["batch", "group", "none"]
Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu"]
Target = Literal["triton", "web"]
Precision = Literal["fp32", "fp16", "int8"]
Calibration = Literal["minmax", "entropy"]


def setting(default: Any, help: str, identity: bool = True) -> Any:
    """A configuration field with its help text; `identity=False` marks what cannot change the trained weights."""
    metadata = {"help": help, "identity": identity}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from and how they become shards."""

    source: str = setting(
        "digits",
        "`digits`, a folder of class folders, a table (.csv .jsonl .parquet), an archive (.tar .zip), or torchvision:NAME",
    )
    path: str = setting("", "folder or URL of the shards; default data/NAME", identity=False)
    merge: list[dict[str, Any]] = setting([], "data sets to train on together, each {path: ..., weight: 1.0}; replaces source")
    class_level: int | None = setting(
        None, "folder levels below the source that name a class; null: the topmost folders that hold images"
    )
    val_fraction: float = setting(0.2, "share of each class that goes to the validation split, where the source names none")
    test_fraction: float = setting(0.2, "share of each class that goes to the test split, where the source names none")
    split_seed: int = setting(0, "seed of the split and of the order inside the shards")
    samples_per_shard: int = setting(1000, "samples in each tar file")
    jpeg_quality: int = setting(95, "quality at which images that are not JPEG are encoded")
    keep_format: bool = setting(False, "keep PNG, WebP, ... as they are instead of encoding them as JPEG")
    max_side: int | None = setting(None, "shrink larger images to this many pixels on their longest side")
    restart: int | None = setting(
        None,
        "rewrite JPEGs without loss, with a restart marker every so many blocks (MCUs): random crops decode faster",
    )
    background: list[int] = setting([255, 255, 255], "RGB colour below transparent pixels, in shards and in serving")
    max_rejected: float = setting(0.01, "largest share of images that may be left out because they cannot be decoded")


@dataclass(frozen=True)
class PreprocessConfig:
    """From an encoded image to the uint8 (H, W, 3) that the network takes; becomes the model's PreprocessSpec."""

    resize: int | list[int] | None = setting(
        None, "shortest side in pixels, or [height, width]; null: as the weights' pretraining did, else the size is kept"
    )
    crop: list[int] | None = setting(None, "central crop [height, width] after the resize; null: as the weights', else none")
    interpolation: Interpolation | None = setting(None, "filter of the resize; null: as the weights', else bilinear")
    antialias: bool | None = setting(None, "filter before shrinking; null: as the weights', else true")
    normalization: Normalization | None = setting(
        None, "statistics of the training split, a preset's, or none; null: as the weights', else dataset"
    )


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images, seeded by (seed, epoch, sample); all off by default."""

    crop_scale: float = setting(1.0, "smallest share of the area kept by a random resized crop; 1 for none")
    horizontal_flip: float = setting(0.0, "probability of a mirror image")
    rotate_degrees: float = setting(0.0, "largest rotation to either side")
    translate: float = setting(0.0, "largest shift, as a share of the side")
    scale: float = setting(0.0, "largest relative change of size")
    brightness: float = setting(0.0, "largest relative change of brightness")
    contrast: float = setting(0.0, "largest relative change of contrast")
    saturation: float = setting(0.0, "largest relative change of saturation")
    hue: float = setting(0.0, "largest turn of the hue, 0.5 for half the circle")
    policy: Literal["none", "randaugment", "trivialaugment"] = setting("none", "a published set of random changes")
    erase: float = setting(0.0, "probability that a random rectangle is erased")
    mixup: float = setting(0.0, "MixUp's alpha: two images blended, on the training device; 0 for none")
    cutmix: float = setting(0.0, "CutMix's alpha: a rectangle from another image, on the training device; 0 for none")


@dataclass(frozen=True)
class DataConfig:
    """Batches and the DataLoader."""

    global_batch_size: int = setting(64, "samples an optimizer step sees, over all ranks")
    drop_last: bool = setting(True, "drop an epoch's tail; false pads it with masked samples")
    shuffle_shards: int = setting(8, "samples are shuffled within windows of this many shuffled shards")
    balance_classes: bool = setting(False, "an epoch draws each class equally often; its samples come in whole shuffled passes")
    accumulate: int = setting(1, "parts that each process works through, one after the other, for one step: less memory")
    steps_per_epoch: int | None = setting(None, "steps called an epoch; null: the whole split (streamed shards need a number)")
    limit_val_batches: int | None = setting(None, "validate on only so many global batches; null: the whole split")
    shuffle_buffer: int = setting(2000, "samples a loader process shuffles among where shards are streamed")
    decoder: Literal["native", "torchvision"] | None = setting(
        None, "what makes pixels of training's JPEGs; null: native where it is built", identity=False
    )
    num_workers: int = setting(0, "loader processes of each rank, or threads, where crops are native", identity=False)
    start_method: Literal["fork", "forkserver", "spawn"] = setting("forkserver", "how loader processes start", identity=False)
    pin_memory: bool | None = setting(None, "page-locked batches; null: where a GPU is used", identity=False)
    persistent_workers: bool = setting(True, "keep loader processes between epochs", identity=False)
    prefetch_factor: int = setting(2, "batches each loader process reads ahead", identity=False)
    timeout_seconds: float = setting(300.0, "longest wait for a batch; 0: no limit", identity=False)
    max_bad_share: float = setting(0.01, "stop when more than this share of an epoch no longer decodes", identity=False)
    max_bad_in_row: int = setting(100, "stop when this many samples in a row no longer decode", identity=False)
    cache_dir: str = setting("", "folder for shards of a remote data set; default ~/.cache/shardline", identity=False)
    cache_gigabytes: float = setting(100.0, "largest size of that folder", identity=False)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @property
    def micro_batch_size(self) -> int:
        """Samples that pass through the network at once, over all ranks."""
        return self.global_batch_size // self.accumulate

    @property
    def cache_folder(self) -> Path:
        """Folder of what was fetched of remote data sets."""
        try:
            if self.cache_dir:
                return Path(self.cache_dir).expanduser()
            return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shardline"
        except RuntimeError:  # a user without a home, as containers have them
            return Path(tempfile.gettempdir()) / "shardline"


@dataclass(frozen=True)
class ModelConfig:
    """A convolutional network as one nn.Sequential, by name or as a list of blocks. Null is the named network's own value."""

    name: str = setting(
        "small_cnn",
        "simple_net small_cnn plain_cnn alexnet vgg11 vgg13 vgg16 vgg19 resnet18 resnet34 resnet50, "
        "or torchvision:NAME for any classification model of torchvision",
    )
    blocks: list[dict[str, Any]] = setting(
        [], "a network of one's own instead of a name: [{conv: 32}, {pool: 2}, {residual: 64, stride: 2}, {dropout: 0.1}]"
    )
    channels: list[int] = setting([32, 64, 128], "small_cnn, plain_cnn: channels of each stage; every stage halves the image")
    convs_per_stage: int = setting(1, "small_cnn, plain_cnn: convolutions in each stage")
    hidden: list[int] = setting([84, 50], "simple_net: outputs of each hidden layer")
    width: float = setting(1.0, "factor on the channels of every layer")
    norm: Norm | None = setting(None, "normalisation after each convolution; null: batch, but none in alexnet and vgg")
    activation: Activation | None = setting(None, "after each layer; null: relu")
    dropout: float | None = setting(None, "dropout probability in the classifier; null: 0.2, but 0.5 in alexnet and vgg")
    feature_dropout: float = setting(0.0, "probability that a channel is dropped after a stage or block of the features")
    stochastic_depth: float | None = setting(
        None, "probability that the last residual block is left out for a sample, falling to 0 towards the first; null: 0"
    )
    zero_init_residual: bool = setting(True, "residual blocks start as the identity: their last normalisation scales by 0")
    prior_bias: bool = setting(False, "the last bias starts at the training split's class shares instead of 0")
    weights: str | None = setting(
        None, "pretrained weights: a state_dict (.pth, .pt), a checkpoint of Shardline, or torchvision's name, e.g. DEFAULT"
    )
    freeze: list[str] = setting([], "parts that do not train, by the beginning of their parameters' names: [features]")
    unfreeze: dict[str, int] = setting({}, "parts that train from an epoch on, counted from 0: {features.10: 3}")


@dataclass(frozen=True)
class LossConfig:
    """What training minimises; the weights multiply a sample's loss, which is then divided by the number of samples."""

    name: Literal["auto", "cross_entropy", "bce"] = setting(
        "auto",
        "auto: cross_entropy for one label an image, bce (binary cross-entropy with logits) for several or for yes and no",
    )
    label_smoothing: float = setting(
        0.0, "share of each target that goes to all classes alike; of bce, half of it to each answer"
    )
    class_weights: Literal["balanced"] | list[float] | None = setting(
        None, "weight of each class in cross_entropy; balanced: all samples / (classes * samples of the class)"
    )
    pos_weight: Literal["balanced"] | list[float] | None = setting(
        None, "weight of each output's positives in bce; balanced: negatives / positives"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """Any optimizer of torch.optim."""

    name: str = setting("SGD", "class in torch.optim")
    lr: float = setting(1e-3, "learning rate")
    args: dict[str, Any] = setting({}, "its other arguments; SGD has momentum 0.9 unless given")
    lr_factors: dict[str, float] = setting(
        {}, "learning rates of parts, as multiples of lr, by the beginning of their parameters' names: {features: 0.1}"
    )


@dataclass(frozen=True)
class SchedulerConfig:
    """Any learning rate scheduler of torch.optim.lr_scheduler, or WarmupCosine."""

    name: str | None = setting(None, "class in torch.optim.lr_scheduler, or WarmupCosine; null keeps the learning rate")
    interval: Literal["step", "epoch"] = setting("step", "how often it moves")
    args: dict[str, Any] = setting(
        {},
        "its arguments; total_steps and T_max are filled in when missing. WarmupCosine has warmup_steps or warmup_share, and "
        "start_share and final_share of the learning rate",
    )


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how precisely, and how often to save."""

    max_epochs: int = setting(10, "passes over the training split")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = setting("32-true", "Lightning's precision")
    deterministic: bool = setting(True, "bit-identical results, also on a GPU")
    channels_last: bool = setting(False, "weights and images with their channels together in memory: faster on most GPUs")
    compile: bool = setting(False, "torch.compile the network if it wins; needs a C++ compiler, on a GPU Triton")
    sync_batchnorm: bool = setting(False, "normalise over the batches of all GPUs, not of each alone")
    gradient_clip_norm: float | None = setting(None, "clip the global gradient norm at this value")
    ema_decay: float | None = setting(None, "evaluate and export a moving average of the weights with this decay, e.g. 0.999")
    non_finite: Literal["stop", "skip"] = setting(
        "stop", "a step whose loss or gradient is not finite ends the run, or is skipped"
    )
    validate_every_steps: int | None = setting(None, "steps between two validations; null: one at each epoch's end")
    monitor: Monitor = setting("val/accuracy", "what makes a checkpoint the best; of val/loss and val/ece the smallest")
    early_stopping: int | None = setting(None, "end after so many validations without a better one; null: never")
    checkpoint_every_steps: int | None = setting(None, "steps between two checkpoints; null: by minutes only", identity=False)
    checkpoint_every_minutes: float = setting(5.0, "longest time between two checkpoints", identity=False)
    keep_best: int = setting(1, "best checkpoints that are kept", identity=False)
    keep_last: int = setting(2, "newest checkpoints that are kept", identity=False)
    log_every_steps: int = setting(10, "steps between two points of the training curves", identity=False)
    timeout_seconds: float = setting(600.0, "longest wait of a process for another before all give up", identity=False)


@dataclass(frozen=True)
class CheckConfig:
    """Sanity checks before training."""

    skip: list[str] = setting(
        [],
        "checks to leave out, of seed, pixels, labels, leakage, gradients, init_loss, zero_input, overfit, pretrained; "
        "the skip is recorded",
        identity=False,
    )


@dataclass(frozen=True)
class ExportConfig:
    """The ONNX file and the gate before it."""

    opset: int = setting(20, "ONNX operator set, 18 to 23", identity=False)
    tolerance: float | None = setting(
        None, "largest difference of logits and probabilities; null: what rounding in float32 explains", identity=False
    )
    max_batch_size: int = setting(64, "largest batch in the parity test", identity=False)
    precisions: list[Literal["fp16", "int8"]] = setting(
        [], "smaller forms beside fp32, each published where it passes its own gate: [fp16, int8]", identity=False
    )
    max_drop: float = setting(0.005, "accuracy that such a form may at most lose against fp32", identity=False)
    calibration: Calibration = setting(
        "minmax", "range of int8 activations: the whole of it, or cut where most information is kept", identity=False
    )
    calibration_images: int = setting(256, "training images that show these ranges", identity=False)
    license: str = setting("", "SPDX identifier of the model's licence, e.g. MIT; it travels in the file", identity=False)
    targets: list[Target] = setting([], "also made: triton (a model repository), web (a page to run it in)", identity=False)


@dataclass(frozen=True)
class TrackingConfig:
    """The MLflow run."""

    uri: str = setting("", "tracking server; default that of the run, or a sqlite file in the runs folder", identity=False)
    experiment: str = setting("shardline", "experiment that holds the run", identity=False)
    model: str = setting("", "registered model; default the run's name", identity=False)
    max_drop: float = setting(0.005, "accuracy that a promoted model may at worst have lost", identity=False)


@dataclass(frozen=True)
class Config:
    """One whole run."""

    name: str = setting("digits", "name of the run; its folder is runs/NAME", identity=False)
    seed: int = setting(1999, "seed of weights, order, augmentation and dropout")
    runs_dir: str = setting("runs", "folder of all runs", identity=False)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def dataset_location(self) -> str:
        """Folder or URL of the shards."""
        return self.dataset.path or f"data/{self.name}"

    @property
    def dataset_dir(self) -> Path:
        """Folder of the shards. Raises ConfigError where they are remote: nothing is written there."""
        if "://" in self.dataset_location:
            raise ConfigError(
                f"{self.dataset_location}: shards are written to a local folder. Write them there (--dataset.path FOLDER), "
                "then upload the folder with your storage's own tool, for example `aws s3 cp --recursive`."
            )
        return Path(self.dataset_location)

    @property
    def run_dir(self) -> Path:
        """Folder of everything this run makes."""
        return Path(self.runs_dir) / self.name

    @property
    def registered_model(self) -> str:
        """Name under which exported models are registered; a run's own name may hold what MLflow's may not."""
        return self.tracking.model or self.name.replace(":", "_")

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain dicts, lists and scalars."""
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """Digest of every setting that can change the trained weights, given the data set's own digest."""
        return digest_of(_identity_of(self, leave_out=("dataset",)))


def changed_settings(path: Path, config: Config) -> list[str]:
    """Settings that can change the weights and differ from those in the file of an earlier run, `key: before -> now`."""
    before = read_yaml(path) if path.is_file() else {}
    changed = []
    for key, _, item in settings_of(Config):
        if not item.metadata["identity"] or key.startswith("dataset."):
            continue
        values: Any = before
        for name in key.split("."):
            values = values.get(name) if isinstance(values, dict) else None
        now = operator.attrgetter(key)(config)
        if values != now:
            changed.append(f"`{key}` {values} -> {now}")
    return changed


def _identity_of(section: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    values = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if item.name in leave_out:
            continue
        if dataclasses.is_dataclass(value):
            values[item.name] = _identity_of(value)
        elif item.metadata["identity"]:
            values[item.name] = value
    return values


# ---- from the command line and a YAML file to a Config ----


def settings_of(section: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yield (dotted key, type, field) of every setting below `section`."""
    types = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(types[item.name]):
            yield from settings_of(types[item.name], f"{key}.")
        else:
            yield key, types[item.name], item


def bundled_configs() -> dict[str, Path]:
    """The configurations that ship with Shardline, by name: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(path: str) -> Path:
    """Return the YAML file that `path` names: an existing file, or a bundled configuration (`digits`)."""
    if Path(path).is_file():
        return Path(path)
    bundled = bundled_configs()
    named = bundled.get(Path(path).stem) if path in (Path(path).stem, f"configs/{Path(path).name}") else None
    if named is None:
        raise ConfigError(f"{path}: no such configuration file.{nearest(path, bundled)} Bundled ones: {', '.join(bundled)}.")
    return named


def require_known_keys(values: Any, section: type, where: str, prefix: str = "") -> None:
    """Refuse the first key of `values` that `section` does not have, naming the nearest one that it has."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected `key: value` lines{f' below `{prefix[:-1]}`' if prefix else ''}.")
    types = typing.get_type_hints(section)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"{where}: unknown key `{prefix}{key}`.{_nearest_key(str(key), prefix, types)}")
        if dataclasses.is_dataclass(types[key]):
            require_known_keys(value, typing.cast(type, types[key]), where, f"{prefix}{key}.")


def _nearest_key(key: str, prefix: str, siblings: dict[str, Any]) -> str:
    if "." in key and key in (name for name, _, _ in settings_of(Config)):
        section, _, rest = key.partition(".")
        return f" In a file, write `{rest}` below `{section}:`."
    suggestion = nearest(key, siblings)
    if suggestion:
        return suggestion.replace("'", f"`{prefix}", 1).replace("'", "`")
    everywhere = {name.rsplit(".", 1)[-1]: name for name, _, _ in settings_of(Config)}
    suggestion = nearest(key, everywhere)
    if suggestion:
        return f" Did you mean `{everywhere[suggestion.split(chr(39))[1]]}`?"
    return f" Known keys here: {', '.join(siblings)}."


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file; an empty one is all defaults. Raises ConfigError with the line of a syntax error."""
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_unique_key_loader())  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return {} if values is None else typing.cast(dict[str, Any], values)


def _unique_key_loader() -> type["SafeLoader"]:
    """YAML's safe loader, except that a key given twice is an error: PyYAML would drop the first without a word."""
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"`{key_node.value}` is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    return UniqueKeyLoader


def add_settings(parser: "ArgumentParser") -> None:
    """Give `parser` the option --config and one option for every setting of a run."""
    parser.add_argument("--config", default="configs/digits.yaml", help="YAML file, or the name of a bundled configuration")
    for key, kind, item in settings_of(Config):
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        parser.add_argument(f"--{key}", type=kind, default=default, help=item.metadata["help"])


def parse_config(parser: "ArgumentParser", argv: list[str]) -> tuple[Config, "Namespace"]:
    """Parse a verb's arguments over its configuration file. Raises ConfigError, one line, for anything wrong."""
    from jsonargparse import Namespace

    require_known_options(parser, argv)
    first = parse_arguments(parser, argv)
    path = find_config(first.config)
    values = read_yaml(path)
    require_known_keys(values, Config, str(path))
    in_file = parse_object(parser, values, str(path))
    merged = parse_arguments(parser, argv, in_file)
    config = typing.cast(Config, _build(Config, merged))
    _require_sane(config)
    rest = Namespace(**{key: value for key, value in merged.items() if "." not in key and not hasattr(config, key)})  # type: ignore[no-untyped-call]
    return config, rest


def load_config(path: Path) -> Config:
    """Read a whole configuration from a file, for example the one that a run keeps. Raises ConfigError."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add_settings(parser)
    return parse_config(parser, ["--config", str(path)])[0]


def parse_object(parser: "ArgumentParser", values: dict[str, Any], where: str) -> "Namespace":
    """Check the values of a configuration file against their types."""
    try:
        return typing.cast("Namespace", parser.parse_object(values, defaults=True))
    except Exception as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error


def parse_arguments(parser: "ArgumentParser", argv: list[str], namespace: "Namespace | None" = None) -> "Namespace":
    """Parse `argv`; a mistake in it is a ConfigError of one line. `--help` prints and exits 0."""
    try:
        return parser.parse_args(argv, namespace=namespace)
    except SystemExit:
        raise
    except Exception as error:
        raise ConfigError(one_line(error)) from error


def one_line(error: Exception) -> str:
    """The gist of a parser's message, which can run over many lines."""
    text = " ".join(str(error).split()).removesuffix(".")
    text = re.sub(r'^Parser key "([^"]*)":', r"`\1`:", text)
    text = re.sub(r"Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: (.*)$", r"Expected \1. Got value: \2", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    return text.replace(", NoneType", " or null").replace("typing.Literal", "one of ")[:400] + ". See `shardline VERB --help`."


def require_known_options(parser: "ArgumentParser", argv: list[str]) -> None:
    """Refuse the first option that the verb does not have, naming the nearest one that it has."""
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for argument in argv:
        option = argument.split("=", 1)[0]
        if option == "--":
            return
        if not option.startswith("--") or option in known or any(option.startswith(f"{key}.") for key in known):
            continue
        raise ConfigError(f"unknown option `{option}`.{nearest(option, known).replace(chr(39), '`')}")


def _build(section: type, values: Any) -> Any:
    types = typing.get_type_hints(section)
    arguments = {}
    for item in dataclasses.fields(section):
        value = values[item.name]
        nested = types[item.name]
        arguments[item.name] = _build(typing.cast(type, nested), value) if dataclasses.is_dataclass(nested) else value
    return section(**arguments)


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have; `open_low` and `open_high` leave out the bound itself."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        words = f"greater than {self.low:g}" if self.open_low else f"{self.low:g} or more"
        if self.high < math.inf:
            words += f" and less than {self.high:.10g}" if self.open_high else f" and at most {self.high:.10g}"
        return words


COUNT = Range(1)
SHARE = Range(0, 1, open_high=True)
POSITIVE = Range(0, open_low=True)
RANGES = {
    "seed": Range(0, 2**32 - 1),  # numpy's seeds have 32 bits
    "dataset.val_fraction": SHARE,
    "dataset.test_fraction": SHARE,
    "dataset.samples_per_shard": COUNT,
    "dataset.jpeg_quality": Range(1, 100),
    "dataset.class_level": COUNT,
    "dataset.max_side": COUNT,
    "dataset.restart": Range(1, 65535),  # a JPEG counts them in 16 bits
    "dataset.max_rejected": Range(0, 1),
    "data.global_batch_size": COUNT,
    "data.shuffle_shards": COUNT,
    "data.num_workers": Range(0),
    "data.prefetch_factor": COUNT,
    "data.timeout_seconds": Range(0),
    "data.accumulate": COUNT,
    "data.steps_per_epoch": COUNT,
    "data.limit_val_batches": COUNT,
    "data.shuffle_buffer": COUNT,
    "data.max_bad_share": Range(0, 1),
    "data.max_bad_in_row": COUNT,
    "data.cache_gigabytes": POSITIVE,
    "data.augment.horizontal_flip": Range(0, 1),
    "data.augment.rotate_degrees": Range(0, 180),
    "data.augment.translate": Range(0, 1),
    "data.augment.scale": SHARE,
    "data.augment.crop_scale": Range(0, 1, open_low=True),
    "data.augment.brightness": Range(0),
    "data.augment.contrast": Range(0),
    "data.augment.saturation": Range(0),
    "data.augment.hue": Range(0, 0.5),
    "data.augment.erase": Range(0, 1),
    "data.augment.mixup": Range(0),
    "data.augment.cutmix": Range(0),
    "model.convs_per_stage": COUNT,
    "model.width": POSITIVE,
    "model.dropout": SHARE,
    "model.feature_dropout": SHARE,
    "model.stochastic_depth": SHARE,
    "loss.label_smoothing": SHARE,
    "optimizer.lr": POSITIVE,
    "trainer.max_epochs": COUNT,
    "trainer.gradient_clip_norm": POSITIVE,
    "trainer.ema_decay": Range(0, 1, open_low=True, open_high=True),
    "trainer.validate_every_steps": COUNT,
    "trainer.early_stopping": COUNT,
    "trainer.checkpoint_every_steps": COUNT,
    "trainer.checkpoint_every_minutes": POSITIVE,
    "trainer.keep_best": COUNT,
    "trainer.keep_last": COUNT,
    "trainer.log_every_steps": COUNT,
    "trainer.timeout_seconds": POSITIVE,
    "export.opset": Range(18, 23),  # torch's exporter writes none older; OpenVINO's table of operators ends with 23
    "export.tolerance": POSITIVE,
    "export.max_batch_size": COUNT,
    "export.max_drop": SHARE,
    "export.calibration_images": COUNT,
    "tracking.max_drop": SHARE,
}


SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
CREDENTIALS = re.compile(r"(\w+://)[^/\s]*@")
TRACKING_URI = re.compile(r"https?://[^/\s]\S*|sqlite:///.*[^/\s]|(postgresql|mysql|mssql)(\+\w+)?://\S+")


def require_tracking_uri(uri: str) -> None:
    """Refuse what cannot be the address of a tracking server, and one with a password. Empty is fine: no server is named."""
    if CREDENTIALS.search(uri):  # not repeated here: it would end up in a log
        raise ConfigError(
            "`tracking.uri` holds a name or a password, which would end up in files of the run. Leave them out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment."
        )
    if uri and not TRACKING_URI.fullmatch(uri):
        raise ConfigError(
            f"`tracking.uri` is '{uri}'; it must be the address of a tracking server (https://HOST) or of a database "
            "(sqlite:///FILE). Leave it out for a sqlite file in the runs folder."
        )


def _require_sane(config: Config) -> None:
    """Refuse values of the right type that cannot work, before anything is started."""
    for key, allowed in RANGES.items():
        value = operator.attrgetter(key)(config)
        if value is not None and value not in allowed:
            raise ConfigError(f"`{key}` is {value}; it must be {allowed}.")
    if config.data.global_batch_size % config.data.accumulate:
        raise ConfigError(
            f"`data.global_batch_size` is {config.data.global_batch_size}, which has no {config.data.accumulate} equal parts "
            "(`data.accumulate`)."
        )
    if config.dataset.val_fraction + config.dataset.test_fraction >= 1:
        raise ConfigError("`dataset.val_fraction` and `dataset.test_fraction` leave nothing to train on.")
    background = config.dataset.background
    if len(background) != 3 or any(not 0 <= level <= 255 for level in background):
        raise ConfigError(f"`dataset.background` is {background}; it must be three numbers from 0 to 255: [red, green, blue].")
    if not config.name or config.name != Path(config.name).name or config.name.startswith("."):
        raise ConfigError(f"`name` is '{config.name}'; it must be a plain folder name.")
    require_tracking_uri(config.tracking.uri)
    if config.export.license and not SPDX.fullmatch(config.export.license):
        raise ConfigError(
            f"`export.license` is '{config.export.license}'; it must be an SPDX identifier (https://spdx.org/licenses), for "
            "example Apache-2.0 or CC-BY-4.0, or LicenseRef-NAME for a licence of your own."
        )
    experiment = config.tracking.experiment
    if not experiment.strip() or len(experiment) > 500:
        raise ConfigError(f"`tracking.experiment` is '{experiment}'; it must be a name of at most 500 letters.")
    model = config.tracking.model
    if model and (not model.strip(" .") or {"/", ":"} & set(model) or len(model) > 256):
        raise ConfigError(f"`tracking.model` is '{model}'; it must be a name without / and :, of at most 256 letters.")
