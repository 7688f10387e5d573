import dataclasses

import pytest
import torch

from pipeline.config import AugmentConfig
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.pixel_changes import PixelChanges
from pipeline.recipe.verdict import Subject


def resized(subject: Subject, global_batch_size: int) -> Subject:
    data = dataclasses.replace(subject.config.data, global_batch_size=global_batch_size)
    return dataclasses.replace(subject, config=dataclasses.replace(subject.config, data=data))


def test_a_check_looks_at_the_very_tensors_that_training_sees_first(subject: Subject) -> None:
    data = dataclasses.replace(subject.config.data, augment=AugmentConfig(rotate_degrees=20))
    subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, data=data))
    module = ShardDataModule(subject.manifest, subject.spec, data, subject.config.seed)
    trained_on = next(iter(module.train_dataloader()))
    seen = subject.first_batch(augmented=True)
    assert torch.equal(seen["image"], PixelChanges(data.augment, subject.spec)(trained_on["image"], trained_on["seed"]))
    assert torch.equal(seen["label"], trained_on["label"])
    assert not torch.equal(seen["image"], subject.first_batch(augmented=False)["image"])


@pytest.mark.parametrize(
    ("global_batch_size", "size", "expected"),
    [(8, None, 8), (8, 5, 5), (8, 32, 8), (100, None, 36)],
    ids=["a global batch", "fewer", "never more", "a split that is smaller, without its padding"],
)
def test_the_first_batch_has_the_size_asked_for(
    subject: Subject, global_batch_size: int, size: int | None, expected: int
) -> None:
    batch = resized(subject, global_batch_size).first_batch(augmented=False, size=size)
    assert batch["image"].shape == (expected, 3, 16, 16)
    assert len(set(batch["index"].tolist())) == expected


def test_a_fresh_network_is_that_of_its_seed_and_trains(subject: Subject) -> None:
    first, again, other = (subject.build_network(seed).get_parameter("classifier.2.weight") for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert subject.build_network(1).training
