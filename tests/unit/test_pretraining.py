import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from pipeline.config import Config, ModelConfig, PreprocessConfig
from pipeline.errors import ConfigError, RunError
from pipeline.manifest import DatasetManifest
from pipeline.models.sequential import build_network, network_for
from pipeline.preprocess import PreprocessSpec, build_spec, decode_image
from pipeline.pretraining import spec_for, weights_file, weights_sha256
from pipeline.run import open_run, require_run
from tests.unit.models.given import images_of, spec_of

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
SaveCheckpoint = Callable[..., Path]


def with_model(config: Config, preprocess: PreprocessConfig | None = None, **settings: Any) -> Config:
    return dataclasses.replace(config, model=ModelConfig(**settings), preprocess=preprocess or PreprocessConfig())


@pytest.fixture
def save_checkpoint(tmp_path: Path, tiny_spec: PreprocessSpec) -> SaveCheckpoint:
    """A function that saves what a checkpoint of a run with `tiny_spec` has of its network."""

    def save(class_names: list[str], spec: PreprocessSpec = tiny_spec, name: str = "best.ckpt") -> Path:
        torch.manual_seed(len(class_names))
        network = build_network(ModelConfig(channels=[8, 16]), len(class_names), spec)
        state = {f"network.{key}": value for key, value in network.state_dict().items()}
        facts = {"format_version": 1, "class_names": class_names, "preprocess": dataclasses.asdict(spec)}
        torch.save({"state_dict": state, "shardline": facts}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's cache, empty, on a machine without a network."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


# ---- the preprocessing that comes with the weights ----


@pytest.mark.parametrize(
    ("name", "weights"), [("alexnet", "IMAGENET1K_V1"), ("resnet50", "IMAGENET1K_V2"), ("torchvision:swin_t", "DEFAULT")]
)
def test_photos_become_the_very_pixels_that_torchvision_makes_of_them(
    name: str, weights: str, tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    from sklearn.datasets import load_sample_images

    spec = spec_for(with_model(tiny_config, name=name, weights=weights), tiny_dataset)
    normalize = build_network(ModelConfig(channels=[8]), 2, spec).get_submodule("normalize")
    transforms = torchvision.models.get_model_weights(name.removeprefix("torchvision:"))[weights].transforms()
    for photo in load_sample_images().images:  # 427 x 640, of which the resize to a shortest side leaves half a pixel over
        stream = io.BytesIO()
        Image.fromarray(photo).save(stream, "PNG")
        pixels = decode_image(stream.getvalue(), spec)  # (H, W, 3)
        expected = transforms(Image.fromarray(photo))  # (3, H, W), normalised
        ours = normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0]
        levels = torch.tensor(spec.std).view(3, 1, 1) * 255
        difference = float(((ours - expected).abs() * levels).max())
        # In levels of 0..255, where 0 was measured. A processor may round the division otherwise, but no pixel may differ.
        assert difference < 1e-3, difference


def test_weights_of_torchvision_bring_their_preprocessing(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    black = dataclasses.replace(tiny_dataset, preparation={**tiny_dataset.preparation, "background": [0, 0, 0]})
    spec = spec_for(with_model(tiny_config, name="alexnet", weights="DEFAULT"), black)
    expected = PreprocessSpec(
        resize=256,
        crop=[224, 224],
        interpolation="bilinear",
        antialias=True,
        resize_mode="torchvision",
        background=(0, 0, 0),  # transparent images are still laid on what the data set's were
        mean=MEAN,
        std=STD,
    )
    assert spec == expected


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (PreprocessConfig(resize=128), r"`preprocess\.resize` is 128, but the weights DEFAULT were trained with 256"),
        (PreprocessConfig(crop=[64, 64]), r"`preprocess\.crop` is \[64, 64\], but the weights DEFAULT .* with \[224, 224\]"),
        (PreprocessConfig(interpolation="bicubic"), r"is bicubic, but the weights DEFAULT were trained with bilinear"),
        (PreprocessConfig(antialias=False), r"`preprocess\.antialias` is False, but .* trained with True"),
        (
            PreprocessConfig(normalization="kinetics"),
            r"is kinetics \(mean \[0\.45, 0\.45, 0\.45\], std .*\), but the weights DEFAULT were trained with mean \[0\.485, ",
        ),
        (PreprocessConfig(normalization="dataset"), r"`preprocess\.normalization` is dataset \(mean .* trained with mean"),
    ],
)
def test_a_configuration_that_disagrees_with_the_weights_is_refused_with_both_values(
    preprocess: PreprocessConfig, message: str, tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_for(with_model(tiny_config, preprocess, name="alexnet", weights="DEFAULT"), tiny_dataset)


def test_a_configuration_that_says_what_the_weights_say_is_fine(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    same = PreprocessConfig(resize=256, crop=[224, 224], interpolation="bilinear", normalization="imagenet")
    config = with_model(tiny_config, same, name="alexnet", weights="DEFAULT")
    assert spec_for(config, tiny_dataset).mean == MEAN


def test_without_weights_the_data_set_decides(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    spec = spec_for(tiny_config, tiny_dataset)
    assert spec == build_spec(tiny_config.preprocess, tiny_dataset.image_stats)
    assert (spec.mean, spec.interpolation, spec.antialias) == (tiny_dataset.image_stats.mean, "bilinear", True)
    black = dataclasses.replace(tiny_dataset, preparation={**tiny_dataset.preparation, "background": [0, 0, 0]})
    assert spec_for(tiny_config, black).background == (0, 0, 0)
    assert spec_for(tiny_config, black).hash() != spec.hash()


def test_a_checkpoint_brings_the_preprocessing_of_its_run(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, save_checkpoint: SaveCheckpoint
) -> None:
    before = dataclasses.replace(tiny_spec, mean=[0.1, 0.2, 0.3])
    path = save_checkpoint(["a", "b"], before)
    config = with_model(tiny_config, channels=[8, 16], weights=str(path))
    assert spec_for(config, tiny_dataset) == before
    disagreeing = dataclasses.replace(config, preprocess=PreprocessConfig(normalization="dataset"))
    with pytest.raises(ConfigError, match=r"is dataset .* trained with mean \[0\.1, 0\.2, 0\.3\]"):
        spec_for(disagreeing, tiny_dataset)


def test_a_plain_file_needs_its_normalisation_said(tiny_config: Config, tiny_dataset: DatasetManifest, tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    size = PreprocessConfig(resize=[16, 16])
    with pytest.raises(ConfigError, match=r"plain\.pth: does not say how its images were prepared\. Say it: `preprocess\.norm"):
        spec_for(with_model(tiny_config, size, weights=str(path)), tiny_dataset)
    said = dataclasses.replace(size, normalization="imagenet")
    assert spec_for(with_model(tiny_config, said, weights=str(path)), tiny_dataset).mean == MEAN


# ---- which file ----


def test_without_a_network_it_says_which_file_to_put_where(empty_cache: Path) -> None:
    path = empty_cache / "alexnet-owt-7be5be79.pth"
    url = r"https://download\.pytorch\.org/models/alexnet-owt-7be5be79\.pth"
    message = rf"cannot be downloaded \(Name or .*\)\. Fetch {url} where there is a network, and put it there as {path}\."
    with pytest.raises(ConfigError, match=message):
        weights_file(ModelConfig(name="alexnet", weights="DEFAULT"))


def test_a_file_in_torchvisions_cache_is_used_if_it_is_whole(empty_cache: Path) -> None:
    model = ModelConfig(name="vgg11", norm="batch", weights="IMAGENET1K_V1")
    path = empty_cache / "vgg11_bn-6002323d.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half of it")
    assert weights_file(model) == path
    with pytest.raises(ConfigError, match=r"vgg11_bn-6002323d\.pth: is damaged: its sha256 is \w{12}, not 6002323d"):
        weights_sha256(model)


def test_a_download_is_proved_by_the_hash_in_its_name(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(url: str, path: str, hash_prefix: str | None, progress: bool) -> None:
        asked.append((url.rsplit("/", 1)[-1], hash_prefix))
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    model = ModelConfig(name="torchvision:resnet18", weights="IMAGENET1K_V1")
    assert weights_file(model) == weights_file(model) == empty_cache / "resnet18-f37072fd.pth"
    assert asked == [("resnet18-f37072fd.pth", "f37072fd")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "missing.pth"}, r"`model\.weights`: there is no file missing\.pth"),
        ({"weights": "DEFAULT"}, r"`model\.weights` is DEFAULT, but torchvision has no weights of small_cnn\. Name a file"),
        ({"name": "vgg11", "weights": "IMAGENET1K_V9"}, r"does not have for vgg11\. Did you mean 'IMAGENET1K_V1'\?"),
        ({"name": "torchvision:resnet19", "weights": "DEFAULT"}, r"no classification model 'resnet19'\. Did you mean"),
    ],
)
def test_weights_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weights_file(ModelConfig(**settings))


def test_another_file_is_another_run(
    tiny_config: Config, tiny_dataset: DatasetManifest, save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    config = with_model(tiny_config, channels=[8, 16], weights=str(save_checkpoint(["a", "b"])))
    record, _ = open_run(config, tiny_dataset)
    assert record.weights_sha256 == weights_sha256(config.model)
    assert require_run(config, tiny_dataset)[0].job_id == record.job_id
    checkpoint = config.run_dir / "checkpoints" / "step-00000001.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    save_checkpoint(["a", "b", "c"])  # the same name and preprocessing, other weights
    with pytest.raises(RunError, match="the configuration changed since this run was trained"):
        require_run(config, tiny_dataset)
    with pytest.raises(RunError, match=r"the configuration changed since it began: weights \w{12} -> \w{12}"):
        open_run(config, tiny_dataset)


# ---- into the network ----


def test_the_last_layer_is_kept_for_the_same_classes_only(save_checkpoint: SaveCheckpoint) -> None:
    path = save_checkpoint(["a", "b", "c"])
    state = {key.removeprefix("network."): value for key, value in torch.load(path)["state_dict"].items()}
    config, spec = ModelConfig(channels=[8, 16], weights=str(path)), spec_of(16, 16)

    def head(class_names: list[str]) -> torch.Tensor:
        network = build_network(config, len(class_names), spec, class_names=class_names)
        assert torch.equal(network.get_parameter("features.4.weight"), state["features.4.weight"])
        return network.get_parameter("classifier.2.weight")

    assert torch.equal(head(["a", "b", "c"]), state["classifier.2.weight"])
    assert not torch.equal(head(["d", "e", "f"]), state["classifier.2.weight"])
    assert head(["a", "b"]).shape == (2, 16)


def test_the_network_of_a_run_knows_its_classes(
    tiny_config: Config, tiny_dataset: DatasetManifest, save_checkpoint: SaveCheckpoint
) -> None:
    path = save_checkpoint(tiny_dataset.class_names)
    state = torch.load(path)["state_dict"]
    config = with_model(tiny_config, channels=[8, 16], weights=str(path), prior_bias=True)
    spec = spec_for(config, tiny_dataset)
    pretrained, fresh = network_for(config, tiny_dataset, spec), network_for(config, tiny_dataset, spec, pretrained=False)
    assert torch.equal(pretrained.get_parameter("classifier.2.weight"), state["network.classifier.2.weight"])
    assert not torch.equal(fresh.get_parameter("features.0.weight"), state["network.features.0.weight"])
    shares = fresh.get_parameter("classifier.2.bias").exp().tolist()
    assert shares == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("features.4.weight"), r"is for another network: it has no features\.4\.weight\.$"),
        (lambda state: state.update(extra=torch.zeros(2)), r"is for another network: its extra has no place\.$"),
        (
            lambda state: state.update({"features.0.weight": torch.zeros(4, 3, 3, 3)}),
            r"its features\.0\.weight is \(4, 3, 3, 3\), here it is \(8, 3, 3, 3\)",
        ),
        (lambda state: state.clear(), r"holds no state_dict"),
        (lambda state: state.update(note=3), r"holds no state_dict"),
    ],
)
def test_weights_of_another_network_are_refused(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    state = dict(build_network(ModelConfig(channels=[8, 16]), 3, spec_of(16, 16)).state_dict())
    change(state)
    torch.save(state, path)
    with pytest.raises(ConfigError, match=message):
        build_network(ModelConfig(channels=[8, 16], weights=str(path)), 3, spec_of(16, 16))


def test_a_file_with_code_in_it_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"features": print}, path)
    with pytest.raises(ConfigError, match=r"weights\.pth: cannot be read as weights, tensors and plain values only"):
        build_network(ModelConfig(channels=[8], weights=str(path)), 3, spec_of(16, 16))


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_file_of_a_training_script_is_opened_to_its_weights(key: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    before = build_network(ModelConfig(channels=[8]), 3, spec_of(16, 16)).eval()
    torch.save({key: before.state_dict(), "epoch": 3}, path)
    after = build_network(ModelConfig(channels=[8], weights=str(path)), 3, spec_of(16, 16)).eval()
    with torch.no_grad():
        assert torch.equal(after(images_of(2)), before(images_of(2)))


# ---- what it is good for ----

SMALL = ModelConfig(dropout=0.0)
DIGITS_SPEC = spec_of(16, 16)


def read_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits, uint8 (N, 3, 16, 16), and their labels (N,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.kron(digits.images * 15.9, np.ones((2, 2))).astype(np.uint8)  # (N, 16, 16)
    return torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(digits.target)


def train(config: ModelConfig, images: torch.Tensor, labels: torch.Tensor, steps: int, lr: float) -> nn.Sequential:
    """A network after so many steps of one-cycle SGD on batches of at most 50, for the classes 5 to 9 where pretrained."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = build_network(config, 5, DIGITS_SPEC, class_names=list("56789"))
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        rows = torch.randperm(len(labels), generator=generator)[:50]
        moved = torch.roll(images[rows], torch.randint(-2, 3, (2,), generator=generator).tolist(), (2, 3))
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(network(moved), labels[rows]))
        optimizer.step()
        schedule.step()
    return network.eval()


def test_five_digits_are_learned_from_few_samples_by_a_network_that_knows_the_other_five(tmp_path: Path) -> None:
    images, labels = read_digits()
    known, other = labels < 5, labels >= 5
    pretrained = train(SMALL, images[known], labels[known], steps=70, lr=0.03)
    state = {f"network.{key}": value for key, value in pretrained.state_dict().items()}
    facts = {"class_names": list("01234"), "preprocess": dataclasses.asdict(DIGITS_SPEC)}
    torch.save({"state_dict": state, "shardline": facts}, tmp_path / "digits.ckpt")
    others = torch.nonzero(other).flatten()
    few = torch.cat([others[labels[others] == digit][:5] for digit in range(5, 10)])  # 5 samples of each class
    rest = other.clone()
    rest[few] = False

    def best_accuracy(config: ModelConfig) -> float:
        """At the better learning rate of each, so that neither wins by it."""
        accuracies = []
        for lr in (0.01, 0.03, 0.1):
            network = train(config, images[few], labels[few] - 5, steps=8, lr=lr)
            with torch.no_grad():
                correct = network(images[rest]).argmax(dim=1) == labels[rest] - 5
            accuracies.append(float(correct.double().mean()))
        return max(accuracies)

    from_scratch = best_accuracy(SMALL)
    fine_tuned = best_accuracy(dataclasses.replace(SMALL, weights=str(tmp_path / "digits.ckpt")))
    assert fine_tuned > from_scratch + 0.1, (from_scratch, fine_tuned)
