import json
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image

from pipeline.config import Config
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.dataset import ShardDataset
from pipeline.manifest import DatasetManifest
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec
from pipeline.recipe.dynamics import Dynamics, commonest_share, read_samples, right_probability
from pipeline.task import task_of
from pipeline.training.classifier import Classifier
from tests.unit.training.conftest import Listener, change, make_trainer


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Three epochs of four steps."""
    return change(change(tiny_config, "trainer", max_epochs=3), "optimizer", lr=0.01)


def train(
    config: Config, manifest: DatasetManifest, spec: PreprocessSpec, *callbacks: L.Callback
) -> tuple[Classifier, dict[str, Any], Listener]:
    tracker = Listener()
    torch.manual_seed(0)
    module = Classifier(build_network(config.model, 3, spec), config, task_of(manifest, config), total_steps=12)
    data = ShardDataModule(manifest, spec, config.data, config.seed)
    trainer = make_trainer(config, Dynamics(config, manifest, spec, task_of(manifest, config), tracker), *callbacks)
    trainer.fit(module, datamodule=data)
    return module, json.loads((config.run_dir / "dynamics.json").read_text()), tracker


def test_the_same_images_are_looked_at_before_the_first_step_and_after_each_epoch(
    config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    module, found, tracker = train(config, tiny_dataset, tiny_spec)
    assert [(point["epoch"], point["step"]) for point in found["points"]] == [(0, 0), (1, 4), (2, 8), (3, 12)]
    val = ShardDataset(tiny_dataset, "val", tiny_spec)
    images = torch.stack([val[index][0] for index in found["watched"]["index"]])  # (N, 3, H, W)
    labels = torch.tensor(found["watched"]["label"])
    assert labels.tolist() == [val[index][1] for index in found["watched"]["index"]]
    answers = module.network.eval()(images).softmax(dim=1).detach()
    last = found["points"][-1]
    assert last["right_probability"] == pytest.approx(right_probability(answers, labels).tolist(), abs=1e-5)
    assert last["answer"] == answers.argmax(dim=1).tolist()
    assert [step for step, _ in tracker.curves] == [0, 4, 8, 12]
    assert set(tracker.curves[0][1]) < set(tracker.curves[1][1]), "before the first step there is no gradient"
    assert tracker.curves[1][1]["watch/update_median"] > 0
    assert len(tracker.curves[1][1]) == 11, "a few curves, however many layers"
    assert tracker.kept == ["dynamics.png", "dynamics.json"]
    with Image.open(config.run_dir / "dynamics.png") as picture:
        assert picture.format == "PNG"


def test_the_table_has_a_row_for_each_layer_of_the_last_step(
    config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    module, found, _ = train(config, tiny_dataset, tiny_spec)
    rows = {row["layer"]: row for row in found["layers"]}
    assert list(rows) == [name for name, each in module.network.named_modules() if not any(each.children())]
    assert rows["features.0"]["gradient"] > 0 and 0 < rows["features.0"]["update"] < 1
    assert rows["features.2"]["kind"] == "ReLU" and 0 <= rows["features.2"]["dead"] <= 1
    assert rows["normalize"]["gradient"] is None


def test_the_end_says_whether_training_and_validation_agree(
    config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    module, found, tracker = train(config, tiny_dataset, tiny_spec)
    expected = []
    for split in ("train", "val"):
        batch = read_samples(tiny_dataset, split, tiny_spec, config.data, 100)
        assert len(batch["label"]) == (36 if split == "train" else 12)
        expected.append(float((module.network.eval()(batch["image"]).argmax(dim=1) == batch["label"]).double().mean()))
    gap = found["gap"]
    assert [gap["train_accuracy"], gap["val_accuracy"]] == pytest.approx(expected, rel=1e-6)
    assert gap["commonest"] == pytest.approx(1 / 3)
    assert tracker.figures == {"watch/gap": gap["gap"]}
    assert gap["summary"] in capsys.readouterr().out


def test_looking_does_not_change_what_is_trained(
    config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    config = change(config, "model", dropout=0.5)
    watched, _, _ = train(config, tiny_dataset, tiny_spec)
    torch.manual_seed(0)
    alone = Classifier(build_network(config.model, 3, tiny_spec), config, task_of(tiny_dataset, config), total_steps=12)
    make_trainer(config).fit(alone, datamodule=ShardDataModule(tiny_dataset, tiny_spec, config.data, config.seed))
    for name, tensor in watched.network.state_dict().items():
        assert torch.equal(tensor, alone.network.state_dict()[name]), name


def test_an_answer_to_several_labels_is_right_in_the_mean() -> None:
    answers, labels = torch.tensor([[0.9, 0.2], [0.4, 0.6]]), torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)
    assert right_probability(answers, labels).tolist() == pytest.approx([0.85, 0.5], rel=1e-6)
    assert commonest_share(labels) == pytest.approx(0.75)
    assert commonest_share(torch.tensor([2, 0, 2, 1])) == 0.5
