import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.nn import functional

from pipeline import accelerator
from pipeline.config import Config, LossConfig
from pipeline.data.dataset import ShardDataset
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec
from pipeline.training.optim import build_optimizer
from pipeline.training.preflight import require_consistent, require_trainable
from tests.unit.training.conftest import change

OPTIMIZERS = sorted(
    name
    for name, item in vars(torch.optim).items()
    if isinstance(item, type) and issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer
)


def test_a_sound_run_passes(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    for world_size in (1, 2, 4, 8):
        require_trainable(tiny_config, tiny_dataset, world_size)


@pytest.mark.parametrize(("interval", "batch"), [("epoch", 8), ("step", 36)])
def test_a_training_of_a_single_move_of_its_scheduler_passes(
    tiny_config: Config, tiny_dataset: DatasetManifest, interval: str, batch: int
) -> None:
    config = change(change(tiny_config, "trainer", max_epochs=1), "data", global_batch_size=batch)
    config = change(config, "scheduler", name="OneCycleLR", interval=interval, args={"max_lr": 0.1})
    require_trainable(config, tiny_dataset, 1)


@pytest.mark.parametrize(
    ("batch", "processes", "choices"), [(8, 3, "6 or 9"), (10, 4, "8 or 12"), (2, 3, "3"), (33, 32, "32 or 64")]
)
def test_a_batch_that_processes_cannot_share_is_refused_naming_the_two_nearest(
    tiny_config: Config, tiny_dataset: DatasetManifest, batch: int, processes: int, choices: str
) -> None:
    message = f"is {batch}, which {processes} processes cannot share equally. Set it to {choices}, or"
    with pytest.raises(ConfigError, match=message):
        require_trainable(change(tiny_config, "data", global_batch_size=batch), tiny_dataset, processes)


def test_a_split_without_samples_is_refused(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    empty = dataclasses.replace(tiny_dataset.split("val"), shards=[], class_counts=[0, 0, 0])
    manifest = dataclasses.replace(tiny_dataset, splits=tiny_dataset.splits | {"val": empty})
    with pytest.raises(DataError, match=r"its `val` split has no sample"):
        require_trainable(tiny_config, manifest, 1)


def test_a_batch_larger_than_the_split_is_refused_unless_it_may_be_padded(
    tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    require_trainable(change(tiny_config, "data", global_batch_size=36), tiny_dataset, 1)
    too_large = change(tiny_config, "data", global_batch_size=37)
    with pytest.raises(DataError, match=r"train split has 36 samples, fewer than `data.global_batch_size` \(37\)"):
        require_trainable(too_large, tiny_dataset, 1)
    require_trainable(change(too_large, "data", drop_last=False), tiny_dataset, 1)


def test_half_precision_needs_a_gpu(
    tiny_config: Config, tiny_dataset: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = change(tiny_config, "trainer", precision="16-mixed")
    monkeypatch.setattr(accelerator, "num_gpus", lambda: 0)
    with pytest.raises(ConfigError, match=r"16-mixed needs a GPU\. Use 32-true"):
        require_trainable(half, tiny_dataset, 1)
    require_trainable(change(tiny_config, "trainer", precision="bf16-mixed"), tiny_dataset, 1)
    monkeypatch.setattr(accelerator, "num_gpus", lambda: 1)
    accelerator.require_possible(half.trainer)


def test_settings_that_do_not_go_together_are_refused(tiny_config: Config, tiny_network: nn.Sequential) -> None:
    synchronised = change(tiny_config, "trainer", sync_batchnorm=True)
    require_consistent(synchronised, tiny_network)
    with pytest.raises(ConfigError, match=r"`trainer\.sync_batchnorm` has no BatchNorm to synchronise in this network"):
        require_consistent(synchronised, nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(8, 8)))
    fused = change(tiny_config, "optimizer", args={"fused": True})
    require_consistent(change(fused, "trainer", precision="bf16-mixed"), tiny_network)
    with pytest.raises(
        ConfigError, match=r"`optimizer\.args\.fused` hides the true gradients of `trainer\.precision` 16-mixed"
    ):
        require_consistent(change(fused, "trainer", precision="16-mixed"), tiny_network)


def test_a_compiler_that_is_not_there_is_named_in_one_line(
    tiny_config: Config, tiny_dataset: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/such/compiler"))
    with pytest.raises(ConfigError, match=r"`trainer\.compile` does not work on this machine: .*/no/such/compiler") as refusal:
        require_trainable(change(tiny_config, "trainer", compile=True), tiny_dataset, 1)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"channels": [8] * 5}, "Use at most 4 stages"),
        ("model", {"channels": [12], "norm": "group"}, "`model.norm: group` cannot share"),
        (
            "model",
            {"unfreeze": {"features": 10}},
            "lets features train from epoch 10 on, counted from 0, but there are 10 epochs",
        ),
        ("model", {"freeze": ["features", "classifier"]}, "leave nothing to train in epoch 0"),
        ("model", {"freeze": ["classifier"], "unfreeze": {"features": 1}}, "leave nothing to train in epoch 0"),
        ("optimizer", {"lr_factors": {"feature": 0.1}}, "Did you mean 'features'"),
        ("preprocess", {"resize": 16}, "leaves images of different sizes"),
        ("optimizer", {"name": "SDG"}, "Did you mean 'SGD'"),
        ("optimizer", {"args": {"momentun": 1}}, "Did you mean 'momentum'"),
        ("scheduler", {"name": "StepRL"}, "Did you mean 'StepLR'"),
        ("scheduler", {"name": "StepLR"}, "step_size"),
        # 4 steps in each of 10 epochs are 40.
        ("scheduler", {"name": "OneCycleLR", "args": {"max_lr": 0.1, "total_steps": 7}}, "`scheduler`"),
        ("scheduler", {"name": "StepLR", "args": {"step_size": 0}}, "`scheduler`"),
        ("optimizer", {"name": "Adam", "args": {"capturable": True}}, "`optimizer`"),  # for GPUs alone
    ],
)
def test_what_would_fail_on_a_rank_is_refused_before_one_starts(
    tiny_config: Config, tiny_dataset: DatasetManifest, section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        require_trainable(change(tiny_config, section, **values), tiny_dataset, 1)


def test_several_labels_an_image_can_be_trained_if_their_rows_are_there(
    tiny_config: Config, multi_dataset: DatasetManifest, tmp_path: Path
) -> None:
    require_trainable(tiny_config, multi_dataset, 1)
    copy = load_dataset(shutil.copytree(multi_dataset.folder, tmp_path / "copy"))
    path = copy.folder / "val.labels.npy"
    rows = np.load(path)
    rows[2, 1] = 7
    np.save(path, rows)
    with pytest.raises(DataError, match=r"val\.labels\.npy: the labels of sample 2 are not 0 and 1"):
        require_trainable(tiny_config, copy, 1)
    path.unlink()
    with pytest.raises(DataError, match=r"val\.labels\.npy: not a file of label rows"):
        require_trainable(tiny_config, copy, 1)


def test_a_loss_or_monitor_that_the_data_set_cannot_have_is_refused(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    with pytest.raises(ConfigError, match="one label of 3 classes"):
        require_trainable(dataclasses.replace(tiny_config, loss=LossConfig(name="bce")), tiny_dataset, 1)
    with pytest.raises(ConfigError, match="val/top5, which needs more than 5 classes"):
        require_trainable(change(tiny_config, "trainer", monitor="val/top5"), tiny_dataset, 1)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_that_will_be_read_is_opened(tiny_config: Config, copied_dataset: DatasetManifest, split: str) -> None:
    path = copied_dataset.folder / f"{split}.index.npy"
    rows = np.load(path)
    rows["label"][3] = 3
    np.save(path, rows)
    with pytest.raises(DataError, match=f"{split}.index.npy: sample 3 has label 3, outside the 3 classes"):
        require_trainable(tiny_config, copied_dataset, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_is_refused_or_takes_a_step(
    tiny_config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, name: str
) -> None:
    config = change(tiny_config, "optimizer", name=name)
    try:
        require_trainable(config, tiny_dataset, 1)
    except ConfigError:
        assert name in ("LBFGS", "Muon", "SparseAdam"), "it works on dense gradients of any shape"
        return
    torch.manual_seed(0)
    network = build_network(config.model, 3, spec)
    optimizer = build_optimizer(network, config.optimizer)
    dataset = ShardDataset(tiny_dataset, "train", spec)
    images = torch.stack([dataset[index][0] for index in range(8)])  # (N, 3, H, W)
    labels = torch.tensor([dataset[index][1] for index in range(8)])  # (N,)

    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images), labels)
        torch.autograd.backward(loss)
        return float(loss.detach())

    before = [parameter.clone() for parameter in network.parameters()]
    optimizer.step(closure)
    after = list(network.parameters())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_data_set_without_a_validation_split_is_refused(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    splits = {name: split for name, split in tiny_dataset.splits.items() if name != "val"}
    with pytest.raises(DataError, match=r"has no `val` split, .* Shard again with `dataset.val_fraction` above 0"):
        require_trainable(tiny_config, dataclasses.replace(tiny_dataset, splits=splits), 1)
