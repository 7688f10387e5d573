import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.config import Config
from pipeline.data.dataset import ShardDataset
from pipeline.errors import ConfigError, DataError
from pipeline.export import calibration
from pipeline.export.calibration import calibration_batches, choose, require_calibratable
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec


@pytest.fixture
def training(tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> ShardDataset:
    return ShardDataset(tiny_dataset, "train", tiny_spec)


def of(config: Config, number: int) -> Config:
    return dataclasses.replace(config, export=dataclasses.replace(config.export, calibration_images=number))


def test_classes_come_in_turn_and_no_image_twice(training: ShardDataset) -> None:
    chosen = choose(training, 9, seed=0)
    assert Counter(training.rows["label"][chosen].tolist()) == {0: 3, 1: 3, 2: 3}
    assert sorted(choose(training, 100, seed=0)) == list(range(36))
    assert len(set(chosen)) == 9


def test_a_rare_class_gives_what_it_has(training: ShardDataset) -> None:
    rows = training.rows.copy()
    rows["label"] = 0
    rows["label"][[7, 20]] = 2
    training.rows = rows
    assert Counter(rows["label"][choose(training, 10, seed=0)].tolist()) == {0: 8, 2: 2}


def test_the_choice_is_that_of_the_seed(training: ShardDataset) -> None:
    assert choose(training, 12, seed=1).tolist() == choose(training, 12, seed=1).tolist()
    assert choose(training, 12, seed=1).tolist() != choose(training, 12, seed=2).tolist()


def test_no_more_shards_are_opened_than_a_remote_data_set_can_bear(
    training: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_SHARDS", 2)
    assert len(set(training.rows["shard"][choose(training, 8, seed=0)])) == 2


def test_images_of_several_labels_are_drawn_alike(multi_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    dataset = ShardDataset(multi_dataset, "train", tiny_spec)
    assert len(set(choose(dataset, 10, seed=0))) == 10


def test_they_are_training_images_as_the_model_is_served_them(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, training: ShardDataset
) -> None:
    shown = np.concatenate([*calibration_batches(of(tiny_config, 20), tiny_dataset, tiny_spec)])
    assert (shown.shape, str(shown.dtype)) == ((20, 3, 16, 16), "uint8")
    known = {training.image(index).numpy().tobytes() for index in range(len(training))}
    assert {image.tobytes() for image in shown} <= known


def test_images_that_cannot_be_decoded_are_replaced_as_long_as_there_are_others(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ShardDataset.image

    def some(dataset: ShardDataset, index: int, epoch: int = 0) -> torch.Tensor:
        if index % 2:
            raise DataError("cut short")
        return image(dataset, index, epoch)

    monkeypatch.setattr(ShardDataset, "image", some)
    assert sum(map(len, calibration_batches(of(tiny_config, 18), tiny_dataset, tiny_spec))) == 18
    monkeypatch.setattr(ShardDataset, "image", lambda dataset, index, epoch=0: some(dataset, 1))
    with pytest.raises(DataError, match="no image of the training split can be decoded"):
        list(calibration_batches(of(tiny_config, 18), tiny_dataset, tiny_spec))


def test_streamed_training_shards_are_refused_for_int8_before_anything_is_made(
    tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    streamed = dataclasses.replace(tiny_dataset, streams={"train": ["https://host/000.tar"]})
    require_calibratable(tiny_config, streamed)
    half = dataclasses.replace(tiny_config, export=dataclasses.replace(tiny_config.export, precisions=["fp16"]))
    require_calibratable(half, streamed)
    wanted = dataclasses.replace(tiny_config, export=dataclasses.replace(tiny_config.export, precisions=["int8"]))
    require_calibratable(wanted, tiny_dataset)
    with pytest.raises(ConfigError, match="but the training shards are streamed"):
        require_calibratable(wanted, streamed)
