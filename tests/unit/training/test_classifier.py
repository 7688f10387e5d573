import math
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from pipeline.config import AugmentConfig, Config
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.dataset import Batch, ShardDataset
from pipeline.data.mixing import mix_batch
from pipeline.manifest import DatasetManifest
from pipeline.metrics import Metrics
from pipeline.preprocess import PreprocessSpec
from pipeline.training.classifier import Classifier, monitored, seed_torch
from tests.unit.training.conftest import Fit, change, make_trainer, weights_of

MakeClassifier = Callable[[Config], Classifier]


def split_of(manifest: DatasetManifest, spec: PreprocessSpec, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images (N, 3, H, W) and labels (N,) of a split."""
    dataset = ShardDataset(manifest, name, spec)
    pairs = [dataset[index] for index in range(len(dataset))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


# ---- what Lightning writes down at each hook ----


def test_attributes_are_those_of_a_module_whatever_takes_the_place_of_what(
    tiny_config: Config, make_classifier: MakeClassifier
) -> None:
    module = make_classifier(tiny_config)
    network, weight, ones = module.network, nn.Parameter(torch.ones(2)), torch.ones(1)
    module.note = "word"
    module.note = 3
    assert module.note == 3
    module.note = weight  # a number becomes a parameter
    assert dict(module.named_parameters())["note"] is weight
    with pytest.raises(TypeError, match="cannot assign"):
        module.note = 3
    module.note = None
    assert "note" not in module.__dict__ and module.note is None
    module.other = 1
    module.other = nn.Linear(1, 1)
    assert isinstance(dict(module.named_children())["other"], nn.Linear)
    module.register_buffer("mean", ones)
    with pytest.raises(TypeError, match="cannot assign"):
        module.mean = "word"
    module.network = None  # type: ignore[assignment]
    assert module.network is None and "network" not in module.__dict__
    module.network = network


# ---- the loss ----


def random_images(number: int) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batch_of(weights: list[float], images: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> Batch:
    number = len(weights)
    return Batch(
        image=random_images(number) if images is None else images,
        label=torch.arange(number) % 3 if labels is None else labels,
        weight=torch.tensor(weights),
        index=torch.arange(number),
        seed=np.arange(number, dtype=np.uint64),
        bad=[],
    )


@pytest.mark.parametrize("weights", [[1.0] * 4, [4 / 3] * 3 + [0.0]], ids=["whole", "padded"])
def test_the_loss_is_the_mean_over_the_real_samples(
    tiny_config: Config, make_classifier: MakeClassifier, weights: list[float]
) -> None:
    module = make_classifier(change(tiny_config, "model", dropout=0.0, norm="group"))
    batch = batch_of(weights)
    real = batch["weight"] > 0
    loss = module.training_step(batch, 0).detach()
    logits = module(batch["image"])[real].detach()
    expected = functional.cross_entropy(logits, batch["label"][real], reduction="none")
    # The same few float32 numbers, added in another order.
    assert float(loss) == pytest.approx(float(expected.mean()), rel=1e-6)
    summed, correct, weight = module.step_sums().tolist()
    assert summed / weight == pytest.approx(float(expected.mean()), rel=1e-6)
    right = (logits.argmax(dim=1) == batch["label"][real]).double().mean()
    assert correct / weight == pytest.approx(float(right), rel=1e-6)


def test_the_loss_of_a_mixed_batch_belongs_to_both_labels(tiny_config: Config, make_classifier: MakeClassifier) -> None:
    config = change(tiny_config, "model", dropout=0.0, norm="group")
    config = change(config, "data", augment=AugmentConfig(mixup=0.4))
    module = make_classifier(config)
    images, labels, weights = random_images(4), torch.tensor([0, 1, 2, 0]), torch.ones(4)
    loss = module.training_step(batch_of([1.0] * 4, images, labels), 0).detach()
    image, mixed = mix_batch(images, labels, weights, config.data.augment, config.seed, step=0)
    assert mixed is not None and 0 < float(mixed.share[0]) < 1
    logits = module(image).detach()
    own, other = (functional.cross_entropy(logits, each, reduction="none") for each in (labels, labels[[1, 0, 3, 2]]))
    expected = (mixed.share * own + (1 - mixed.share) * other).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)  # float32, added in another order


def test_class_weights_and_smoothing_are_in_the_loss_and_not_in_its_divisor(
    tiny_config: Config, make_classifier: MakeClassifier
) -> None:
    weights = [0.5, 2.0, 3.0]
    config = change(change(tiny_config, "model", dropout=0.0, norm="group"), "loss", class_weights=weights, label_smoothing=0.1)
    module, batch = make_classifier(config), batch_of([1.0] * 4)
    loss = float(module.training_step(batch, 0).detach())
    logits = module(batch["image"]).detach()
    losses = functional.cross_entropy(logits, batch["label"], torch.tensor(weights), label_smoothing=0.1, reduction="sum")
    assert loss == pytest.approx(float(losses) / 4, rel=1e-6)  # float32


# ---- several labels an image ----


def rows_of(manifest: DatasetManifest, spec: PreprocessSpec, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images (N, 3, H, W) and label rows (N, K) of a split."""
    dataset = ShardDataset(manifest, name, spec)
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images), torch.stack(labels)


def test_several_labels_are_learned_measured_and_kept_for_each_sample(
    tiny_config: Config, multi_dataset: DatasetManifest, spec: PreprocessSpec, fit: Fit
) -> None:
    config = change(change(tiny_config, "optimizer", name="Adam", lr=0.02), "trainer", max_epochs=6)
    module = fit(change(config, "model", norm="group"), manifest=multi_dataset)
    images, labels = rows_of(multi_dataset, spec, "val")
    with torch.no_grad():
        logits = module.network.eval()(images)
    assert module.metrics is not None
    assert module.metrics.accuracy == float(((logits >= 0) == labels).all(dim=1).double().mean())
    expected = functional.binary_cross_entropy_with_logits(logits, labels.float())
    assert module.metrics.loss == pytest.approx(float(expected), rel=1e-5)  # batches of other sizes, in float32
    assert module.metrics.auroc > 0.95

    data = ShardDataModule(multi_dataset, spec, config.data, config.seed)
    make_trainer(config).test(module, datamodule=data, verbose=False)
    (rows,) = module.predictions  # (N, 1 + K)
    images, _ = rows_of(multi_dataset, spec, "test")
    with torch.no_grad():
        shown = module.network.eval()(images).sigmoid()
    assert rows[:, 0].tolist() == list(range(len(images)))
    torch.testing.assert_close(rows[:, 1:].float(), shown, rtol=1e-5, atol=1e-6)  # as above


def test_mixed_images_have_the_labels_of_both_in_part(
    tiny_config: Config, multi_dataset: DatasetManifest, spec: PreprocessSpec, make_classifier: Callable[..., Classifier]
) -> None:
    config = change(change(tiny_config, "model", dropout=0.0, norm="group"), "data", augment=AugmentConfig(mixup=0.4))
    module = make_classifier(config, multi_dataset)
    images, labels = (part[:4] for part in rows_of(multi_dataset, spec, "train"))
    batch = batch_of([1.0] * 4, images, labels)
    loss = float(module.training_step(batch, 0).detach())
    image, mixed = mix_batch(images, labels, batch["weight"], config.data.augment, config.seed, step=0)
    assert mixed is not None
    share = mixed.share[:, None]
    targets = share * labels + (1 - share) * labels[[1, 0, 3, 2]]
    expected = functional.binary_cross_entropy_with_logits(module(image).detach(), targets)
    assert loss == pytest.approx(float(expected), rel=1e-6)  # float32


class Interfere(L.Callback):
    """Draws random numbers between steps, as any other callback may."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        torch.rand(3)


class RecordMasks(L.Callback):
    """Keeps which features dropout let through in each step."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        dropout = next(each for each in module.modules() if isinstance(each, nn.Dropout))
        dropout.register_forward_hook(lambda _, __, output: self.masks.append(output == 0))


def test_dropout_depends_on_the_step_and_not_on_what_ran_before(tiny_config: Config, fit: Fit) -> None:
    config = change(change(tiny_config, "model", dropout=0.5), "trainer", max_epochs=2)
    quiet, disturbed = RecordMasks(), RecordMasks()
    undisturbed_weights = weights_of(fit(config, quiet))
    disturbed_weights = weights_of(fit(config, disturbed, Interfere()))
    assert torch.equal(undisturbed_weights, disturbed_weights)
    training = [mask for mask in quiet.masks if mask.shape[0] == 8]
    assert not torch.equal(training[0], training[1]), "each step has a mask of its own"
    other_seed = fit(Config(**{**vars(config), "seed": 2000}))
    assert not torch.equal(weights_of(other_seed), undisturbed_weights)


# ---- evaluation ----


def test_validation_gives_the_figures_of_the_whole_split(
    tiny_config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, fit: Fit
) -> None:
    module = fit(change(tiny_config, "trainer", max_epochs=1))
    images, labels = split_of(tiny_dataset, spec, "val")
    module.network.eval()
    with torch.no_grad():
        logits = module.network(images)
    assert module.metrics is not None
    assert module.metrics.num_samples == 12  # a batch of 8 and one of 4 and 4 padding rows
    assert module.metrics.accuracy == float((logits.argmax(dim=1) == labels).double().mean())
    # Convolutions over another batch size differ in the last bits of float32.
    assert module.metrics.loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)


def test_a_test_keeps_the_prediction_of_each_sample_in_order(
    tiny_config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, make_classifier: MakeClassifier
) -> None:
    module = make_classifier(tiny_config)
    data = ShardDataModule(tiny_dataset, spec, tiny_config.data, tiny_config.seed)
    make_trainer(tiny_config).test(module, datamodule=data, verbose=False)
    images, _ = split_of(tiny_dataset, spec, "test")
    with torch.no_grad():
        confidence, predicted = module.network.eval()(images).softmax(dim=1).max(dim=1)
    (rows,) = module.predictions  # (N, 3)
    assert rows[:, 0].tolist() == list(range(12))
    assert torch.equal(rows[:, 1].long(), predicted)
    torch.testing.assert_close(rows[:, 2].float(), confidence, rtol=1e-5, atol=1e-6)  # as above


def test_the_monitor_may_be_any_figure(tiny_config: Config) -> None:
    metrics = Metrics(4, accuracy=0.75, loss=0.5, recall=[], auroc=0.875)
    assert monitored(change(tiny_config, "trainer", monitor="val/auroc"), metrics) == 0.875
    assert monitored(change(tiny_config, "trainer", monitor="val/accuracy"), metrics) == 0.75
    assert monitored(change(tiny_config, "trainer", monitor="val/loss"), metrics) == 0.5


# ---- optimizer and scheduler ----


@pytest.mark.parametrize(("interval", "length"), [("step", 4 * 5), ("epoch", 5)])
def test_a_schedule_is_as_long_as_the_training_in_its_own_unit(
    tiny_config: Config, make_classifier: MakeClassifier, interval: str, length: int
) -> None:
    config = change(change(tiny_config, "trainer", max_epochs=5), "scheduler", name="CosineAnnealingLR", interval=interval)
    built = make_classifier(config).configure_optimizers()
    scheduler = built["lr_scheduler"]["scheduler"]
    assert isinstance(scheduler, CosineAnnealingLR)
    assert scheduler.T_max == length
    assert built["lr_scheduler"]["interval"] == interval


def test_the_learning_rate_has_run_its_course_when_training_ends(tiny_config: Config, fit: Fit) -> None:
    config = change(change(tiny_config, "trainer", max_epochs=3), "scheduler", name="CosineAnnealingLR")
    seen: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            seen.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    fit(config, Rates())
    expected = [1e-3 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    assert seen == pytest.approx(expected, rel=1e-6, abs=1e-12)  # torch computes it by recursion


def test_a_plateau_lowers_the_rate_and_its_place_survives_a_restart(
    tiny_config: Config, make_classifier: MakeClassifier
) -> None:
    args = {"patience": 1, "factor": 0.1}
    config = change(change(tiny_config, "scheduler", name="ReduceLROnPlateau", args=args), "trainer", monitor="val/loss")
    first = make_classifier(config)
    optimizer = first.configure_optimizers()
    assert isinstance(first.plateau, ReduceLROnPlateau)
    for loss in (1.0, 2.0):  # one bad epoch, which patience forgives
        first.plateau.step(loss)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)

    resumed = make_classifier(config)
    resumed.on_load_checkpoint(checkpoint)
    optimizer = resumed.configure_optimizers()
    assert resumed.plateau is not None
    resumed.plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4, rel=1e-12)


def test_a_plateau_moves_once_a_validation(tiny_config: Config, fit: Fit) -> None:
    args = {"patience": 0, "factor": 0.5, "threshold": 1e9, "threshold_mode": "abs"}  # nothing is ever an improvement
    config = change(change(tiny_config, "scheduler", name="ReduceLROnPlateau", args=args), "trainer", max_epochs=3)
    module = fit(config)
    optimizer = module.optimizers()
    assert not isinstance(optimizer, list)
    # The first epoch is measured against infinity, so the second and the third count.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**2, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_two_steps_on_a_gpu_give_equal_weights_twice(
    tiny_config: Config, make_classifier: MakeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def weights() -> torch.Tensor:
        module = make_classifier(change(tiny_config, "model", dropout=0.5)).cuda()
        optimizer = module.configure_optimizers()
        batch = batch_of([1.0] * 8)
        on_gpu = Batch(
            image=batch["image"].cuda(),
            label=batch["label"].cuda(),
            weight=batch["weight"].cuda(),
            index=batch["index"],
            seed=batch["seed"],
            bad=[],
        )
        for number in range(2):
            module.on_train_batch_start(on_gpu, number)
            optimizer.zero_grad()
            torch.autograd.backward(module.training_step(on_gpu, number))
            optimizer.step()
        return weights_of(module).cpu()

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(weights(), weights())
    finally:
        torch.use_deterministic_algorithms(False)


def test_seeding_one_device_is_torch_s_own_seeding() -> None:
    drawn = []
    for seed in (torch.manual_seed, lambda number: seed_torch(number, torch.device("cpu"))):
        seed(2**62 + 7)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
