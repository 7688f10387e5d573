"""Every configuration that ships takes a training step as it stands, on a few random images of its size."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from pipeline.config import Config, add_settings, bundled_configs, parse_config
from pipeline.data.augment import build_augmentation, plain_image
from pipeline.data.pixel_changes import build_pixel_changes
from pipeline.manifest import DatasetManifest
from pipeline.models.freezing import freeze_parameters, frozen, require_known_prefixes
from pipeline.models.sequential import build_network
from pipeline.pretraining import spec_for
from pipeline.task import task_of
from pipeline.training.optim import build_optimizer, build_scheduler, scheduler_length
from pipeline.training.preflight import require_consistent

CONFIGS = sorted(bundled_configs())
# Training samples of what each is made for; enough for its schedule to fit.
NUM_SAMPLES = {"imagenet-4x8": 1_281_167, "imagenet-8gpu": 1_281_167, "cifar10": 45_000}


def read(name: str) -> Config:
    parser = ArgumentParser(prog="shardline verb", exit_on_error=False)
    add_settings(parser)
    return parse_config(parser, ["--config", name])[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_bundled_configuration_takes_a_step(name: str, tiny_dataset: DatasetManifest) -> None:
    config = read(name)
    manifest = dataclasses.replace(tiny_dataset, task="multi") if name == "multilabel" else tiny_dataset
    spec = spec_for(config, manifest)
    assert spec.fixed_size is not None
    # Weights are downloaded; what is built from them has the same layers.
    model = dataclasses.replace(config.model, weights=None)
    task = task_of(manifest, config)
    torch.manual_seed(config.seed)
    network = build_network(model, task.num_outputs, spec, prior=task.prior, independent=task.kind == "multi")
    require_known_prefixes(network, model)
    require_consistent(config, network)

    freeze_parameters(network, frozen(model, config.trainer.max_epochs - 1))
    steps = NUM_SAMPLES.get(name, 1_000) // config.data.global_batch_size * config.trainer.max_epochs
    optimizer = build_optimizer(network, config.optimizer)
    length = scheduler_length(config.scheduler, steps, config.trainer.max_epochs)
    scheduler = build_scheduler(optimizer, config.scheduler, length, config.trainer.monitor)
    freeze_parameters(network, frozen(model, 0))
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}

    images = torch.randint(0, 256, (2, 3, *spec.fixed_size), dtype=torch.uint8)
    labels = torch.eye(3, dtype=torch.uint8)[:2] if task.kind == "multi" else torch.tensor([0, 2])
    torch.autograd.backward(task.sample_losses(network(images), labels).mean())
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    trains = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert moved and moved <= trains
    assert all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_images_of_every_bundled_configuration_are_augmented_to_its_size(
    name: str, tiny_source: Path, tiny_dataset: DatasetManifest
) -> None:
    config = read(name)
    spec = spec_for(config, tiny_dataset)
    assert spec.fixed_size is not None
    augmentation, changes = build_augmentation(config.data.augment, spec), build_pixel_changes(config.data.augment, spec)
    assert augmentation is not None or changes is not None
    encoded = next(tiny_source.rglob("*.png")).read_bytes()
    image = plain_image(encoded, spec) if augmentation is None else augmentation.image(encoded, spec, key=0)
    assert image.shape == (3, *spec.fixed_size)
    if changes is not None:
        assert changes(image[None], np.zeros(1, np.uint64)).shape == (1, 3, *spec.fixed_size)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_comment_says_what_to_expect_and_the_exact_command(name: str) -> None:
    lines = bundled_configs()[name].read_text().splitlines()
    comment = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    assert "expect" in comment or "accuracy" in comment
    assert "CPU" in comment or "GPU" in comment
    assert "#   make " in comment
    assert max(map(len, lines)) <= 128


@pytest.mark.parametrize(
    ("name", "batch", "rate", "steps_of_warm_up"), [("imagenet-8gpu", 256, 0.1, 0), ("imagenet-4x8", 2048, 0.8, 2500)]
)
def test_the_recipes_for_imagenet_follow_the_linear_rule(name: str, batch: int, rate: float, steps_of_warm_up: int) -> None:
    config = read(name)
    assert (config.data.global_batch_size, config.optimizer.lr) == (batch, rate)
    assert rate / batch == 0.1 / 256
    assert config.scheduler.args.get("warmup_steps", 0) == steps_of_warm_up
