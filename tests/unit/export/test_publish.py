import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.config import Config
from pipeline.data.dataset import ShardDataset
from pipeline.errors import ConfigError, GateError, ModelError, RunError
from pipeline.export import precision, proto, publish
from pipeline.export.graph import as_text
from pipeline.export.latency import Latency
from pipeline.export.parity import Parity
from pipeline.export.targets import make_targets
from pipeline.files import sha256_of, write_json
from pipeline.golden import GoldenVectors
from pipeline.manifest import DatasetManifest
from pipeline.predictor import Predictor, verify_model
from pipeline.preprocess import PreprocessSpec
from pipeline.run import BEST, RunRecord
from pipeline.training.evaluate import RESULT
from tests.unit.export import sabotage
from tests.unit.export.given import Images
from tests.unit.export.sabotage import Change

METADATA = {
    *("format_version", "class_names", "task", "preprocess", "preprocess_hash", "data_digest", "job_id", "mlflow_run_id"),
    *("checkpoint_sha256", "git_commit", "versions", "metrics", "license", "precision"),
}


class Tracker:
    """Stands where MLflow would be told."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.models: list[dict[str, Any]] = []

    def log_model(self, entry: dict[str, Any]) -> None:
        self.models.append(json.loads(json.dumps(entry)))

    def log_file(self, path: Path, folder: str = "") -> None:
        self.files.append(f"{folder}/{path.name}")

    def finish(self, status: str) -> None:
        pass


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    found = Tracker()
    monkeypatch.setattr(publish, "open_tracker", lambda config, record, status: found)
    return found


@pytest.fixture
def record(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, tiny_network: nn.Sequential
) -> RunRecord:
    """A finished training whose best checkpoint holds `tiny_network`."""
    identity = (tiny_config.identity(), tiny_dataset.digest, tiny_spec.hash())
    record = RunRecord("tiny", "a" * 32, *identity, git={"commit": None}, folder=tiny_config.run_dir)
    facts = dict(zip(("config_digest", "data_digest", "preprocess_hash"), identity, strict=True))
    weights = {f"network.{name}": tensor for name, tensor in tiny_network.state_dict().items()}
    path = tiny_config.run_dir / BEST
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": weights, "shardline": {"format_version": 1, **facts}}, path)
    record.outcome = "done"
    record.best = {"path": str(BEST), "sha256": sha256_of(path), "monitor": "val/accuracy", "value": 1.0}
    return record


Export = Callable[..., Parity]


@pytest.fixture
def export(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, record: RunRecord, tracker: Tracker
) -> Export:
    """Publishes the run, with another configuration where one is given."""

    def run(config: Config = tiny_config) -> Parity:
        return publish.export(config, tiny_dataset, tiny_spec, record)

    return run


Exporter = Callable[..., onnx.ModelProto]


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch, exported_model: onnx.ModelProto) -> Exporter:
    """The model that was exported once, in place of an export of 3 seconds."""

    def build(*arguments: Any) -> onnx.ModelProto:
        model = copy.deepcopy(exported_model)
        onnx.helper.set_model_props(model, {f"shardline.{key}": as_text(value) for key, value in arguments[-1].items()})
        return model

    monkeypatch.setattr(publish, "export_graph", build)
    return build


def damaged(true_export: Exporter, change: Change) -> Exporter:
    """An exporter that makes this mistake."""

    def build(*arguments: Any) -> onnx.ModelProto:
        model = true_export(*arguments)
        change(model)
        return model

    return build


def exports(config: Config) -> list[str]:
    folder = config.run_dir / "export"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_a_proved_model_is_published_and_tracked(
    export: Export,
    tiny_config: Config,
    tiny_dataset: DatasetManifest,
    tiny_spec: PreprocessSpec,
    record: RunRecord,
    tracker: Tracker,
) -> None:
    export()
    assert exports(tiny_config) == ["example.npy", "golden.npz", "model.onnx", "parity.json"]
    parity = json.loads((tiny_config.run_dir / publish.PARITY).read_text())
    assert parity["passed"]
    assert parity["sha256"] == sha256_of(tiny_config.run_dir / publish.MODEL)
    assert tracker.files == ["export/golden.npz", "export/parity.json", "/report.html", "/model_card.md"]
    inputs = record.inputs_of("export", tiny_config, "test")
    assert record.stage_is_done("export", inputs)
    assert record.best is not None
    metadata = proto.metadata(onnx.load(tiny_config.run_dir / publish.MODEL))
    assert set(metadata) == {f"shardline.{name}" for name in METADATA}
    assert metadata["shardline.checkpoint_sha256"] == record.best["sha256"]
    assert metadata["shardline.data_digest"] == tiny_dataset.digest
    assert metadata["shardline.job_id"] == record.job_id
    assert json.loads(metadata["shardline.preprocess"])["mean"] == tiny_spec.mean
    assert metadata["shardline.precision"] == "fp32"
    assert metadata["shardline.license"] == ""
    assert metadata["shardline.metrics"] == "{}"
    assert parity["golden_sha256"] == sha256_of(tiny_config.run_dir / publish.GOLDEN_PATH)
    assert parity["checkpoint_sha256"] == record.best["sha256"]
    assert (parity["data_digest"], parity["preprocess_hash"]) == (tiny_dataset.digest, tiny_spec.hash())


@pytest.mark.usefixtures("quick_export")
def test_verify_replays_the_golden_vectors_of_the_trained_network(export: Export, tiny_config: Config) -> None:
    export()
    model, golden = tiny_config.run_dir / publish.MODEL, tiny_config.run_dir / publish.GOLDEN_PATH
    assert verify_model(model)["replayed"].startswith("11 images of awkward kinds: the same pixels, probabilities within ")
    with golden.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match=r"golden\.npz: is not the file that was exported with the model"):
        verify_model(model)
    wrong = GoldenVectors(["plain"], [b""], np.zeros((1, 8, 8, 3), dtype=np.uint8), np.zeros((1, 3), dtype=np.float32))
    golden.write_bytes(wrong.to_bytes())
    (tiny_config.run_dir / publish.PARITY).unlink()
    with pytest.raises(ModelError, match=r"golden\.npz: belongs to another model"):
        verify_model(model)


@pytest.mark.usefixtures("quick_export")
def test_the_model_is_registered_with_where_it_came_from_and_how_good_it_is(
    export: Export, tiny_config: Config, tiny_dataset: DatasetManifest, record: RunRecord, tracker: Tracker
) -> None:
    assert record.best is not None
    result = {"split": "test", "num_samples": 12, "accuracy": 0.0, "checkpoint_sha256": record.best["sha256"], "recall": {}}
    write_json(tiny_config.run_dir / RESULT, result)
    licensed = dataclasses.replace(tiny_config, export=dataclasses.replace(tiny_config.export, license="CC-BY-4.0"))
    export(licensed)
    metadata = proto.metadata(onnx.load(tiny_config.run_dir / publish.MODEL))
    assert json.loads(metadata["shardline.metrics"]) == {"split": "test", "num_samples": 12, "accuracy": 0.0}
    assert metadata["shardline.license"] == "CC-BY-4.0"
    facts = verify_model(tiny_config.run_dir / publish.MODEL)
    assert (facts["accuracy"], facts["licence"], facts["precision"]) == ("0.0000 on 12 images of test", "CC-BY-4.0", "fp32")
    (entry,) = tracker.models
    assert entry["name"] == "tiny"
    assert entry["metrics"]["onnx/top1_agreement"] == 1.0
    assert entry["description"].startswith("test accuracy 0.0000 on 12 images; ")
    assert entry["tags"] == {
        "onnx_sha256": sha256_of(tiny_config.run_dir / publish.MODEL),
        "checkpoint_sha256": record.best["sha256"],
        "data_digest": tiny_dataset.digest,
        "job_id": record.job_id,
        "run_name": "tiny",
        "git_commit": "",
        "accuracy": "0.0",
    }
    example = np.load(tiny_config.run_dir / entry["example"])
    assert (example.shape, example.dtype) == ((1, 3, 16, 16), np.uint8)
    assert example.std() > 5  # a picture, not an empty one

    write_json(tiny_config.run_dir / RESULT, {**result, "checkpoint_sha256": "0" * 64})
    export()
    assert tracker.models[1]["description"].startswith("not evaluated before its export; ")
    assert "accuracy" not in tracker.models[1]["tags"]


SABOTAGE: list[tuple[Change, str]] = [
    (sabotage.add_training_dropout, r"node noise \(Dropout\) belongs to training"),
    (sabotage.turn_the_channels, "its channels are swapped: it takes blue for red"),
    (sabotage.turn_the_weights, "its channels are swapped: it takes blue for red"),
    (sabotage.move_the_mean, "its normalisation is not that of its preprocessing: level "),
    (sabotage.freeze_the_batch, "the batch axis of `image` is frozen at 2"),
    (sabotage.freeze_the_batch_inside, "it cannot take a batch of 1, as where a size is frozen"),
    (sabotage.transpose_the_classes, "its classes are in another order: its output 0 is the network's 1"),
    (sabotage.rename_the_classes, "of its 3 classes number 0 is 'green', that of the data set is 'blue'"),
    (sabotage.overflow, "it gives answers that are no numbers: an overflow, as in float16"),
    (sabotage.keep_a_constant_elsewhere, "it keeps weights in another file"),
    (sabotage.leak_in_a_note, "it holds the path .* of the machine that built it"),
    (sabotage.draw_noise, r"node noise \(RandomNormalLike\) draws random numbers"),
    (sabotage.use_a_rare_operator, "it uses Det, which are not among the operators that every runtime"),
    (sabotage.change_a_weight, "its answers differ by "),
]


@pytest.mark.parametrize(("change", "reason"), SABOTAGE, ids=[change.__name__ for change, _ in SABOTAGE])
def test_each_mistake_is_refused_for_its_own_reason_and_costs_no_earlier_model(
    export: Export,
    tiny_config: Config,
    record: RunRecord,
    tracker: Tracker,
    monkeypatch: pytest.MonkeyPatch,
    quick_export: Exporter,
    change: Change,
    reason: str,
) -> None:
    export()
    earlier = (tiny_config.run_dir / publish.MODEL).read_bytes()
    tracker.models.clear()
    monkeypatch.setattr(publish, "export_graph", damaged(quick_export, change))
    with pytest.raises(GateError, match=rf"{reason}.* Nothing was published; see .*parity-refused\.json") as refusal:
        export()
    assert refusal.value.exit_code == 3
    assert sum(bool(re.search(other, str(refusal.value))) for other in {other for _, other in SABOTAGE}) == 1, "one reason"
    assert exports(tiny_config) == ["parity-refused.json"]
    refused = json.loads((tiny_config.run_dir / publish.REFUSED).read_text())
    assert refused["passed"] is False
    assert re.search(reason, refused["reason"])
    assert tracker.models == []
    assert not record.stage_is_done("export", record.inputs_of("export", tiny_config, "test"))
    assert "The last export was refused" in (tiny_config.run_dir / "report.html").read_text()
    (aside,) = tiny_config.run_dir.glob("export.*")
    assert (aside / "model.onnx").read_bytes() == earlier
    assert verify_model(aside / "model.onnx")["proof"].startswith("top-1 agreement 1.0000"), "its proof went with it"


@pytest.mark.parametrize("change", [sabotage.draw_noise, sabotage.add_training_dropout])
def test_noise_that_got_past_the_lint_is_refused_by_asking_twice(
    export: Export,
    tiny_config: Config,
    record: RunRecord,
    tracker: Tracker,
    monkeypatch: pytest.MonkeyPatch,
    quick_export: Exporter,
    change: Change,
) -> None:
    monkeypatch.setattr(publish, "export_graph", damaged(quick_export, change))
    monkeypatch.setattr(publish, "require_clean", lambda *arguments: None)
    with pytest.raises(GateError, match="it answers the same images otherwise each time: something in it is random"):
        export()
    assert (exports(tiny_config), tracker.models) == (["parity-refused.json"], [])


# ---- what the file and the torch network are wrong about alike ----


def save_best(record: RunRecord, weights: dict[str, torch.Tensor]) -> None:
    """Put other weights into the best checkpoint, with everything that belongs to them."""
    path = record.folder / BEST
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "state_dict": {f"network.{name}": tensor for name, tensor in weights.items()}}, path)
    assert record.best is not None
    record.best["sha256"] = sha256_of(path)


def test_a_network_that_was_given_another_mean_is_refused(
    export: Export, tiny_config: Config, record: RunRecord, tracker: Tracker, tiny_network: nn.Sequential
) -> None:
    save_best(record, {**tiny_network.state_dict(), "normalize.mean": torch.full((1, 3, 1, 1), 0.7)})
    with pytest.raises(GateError, match="its normalisation is not that of its preprocessing: level "):
        export()
    assert (exports(tiny_config), tracker.models) == (["parity-refused.json"], [])


@pytest.mark.usefixtures("quick_export")
def test_a_network_that_is_not_as_good_as_its_evaluation_says_is_refused(
    export: Export, tiny_config: Config, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export().accuracy["torch"]
    assert record.best is not None
    result = {"split": "test", "num_samples": 12, "accuracy": right, "checkpoint_sha256": record.best["sha256"]}
    write_json(tiny_config.run_dir / RESULT, result)
    parity = export()
    assert parity.evaluation == {"accuracy": right, "allowed_difference": 1 / 12}

    # The images reach network and file alike as other ones than in the evaluation: here nearly all black.
    image = ShardDataset.image
    monkeypatch.setattr(ShardDataset, "image", lambda dataset, index: image(dataset, index) // 64)
    with pytest.raises(GateError, match=r"^the trained network is right on .* of the images here, but its evaluation says"):
        export()
    write_json(tiny_config.run_dir / RESULT, {**result, "checkpoint_sha256": "0" * 64})
    assert export().evaluation == {}, "it is of another checkpoint"


@pytest.mark.usefixtures("quick_export")
def test_a_graph_that_fails_its_lint_is_not_published(export: Export, tiny_config: Config) -> None:
    other: Any = dataclasses.replace(tiny_config, export=dataclasses.replace(tiny_config.export, opset=21))
    with pytest.raises(GateError, match="its opset is 20, not 21"):
        export(other)
    assert exports(tiny_config) == ["parity-refused.json"]


@pytest.mark.usefixtures("quick_export")
def test_an_export_that_breaks_down_leaves_the_earlier_model_aside_and_none_in_its_place(
    export: Export, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    earlier = (tiny_config.run_dir / publish.MODEL).read_bytes()

    def break_down(*arguments: object) -> onnx.ModelProto:
        raise RuntimeError("the exporter broke down")

    monkeypatch.setattr(publish, "export_graph", break_down)
    with pytest.raises(RuntimeError, match="broke down"):
        export()
    assert exports(tiny_config) == []
    (aside,) = tiny_config.run_dir.glob("export.*")
    assert (aside / "model.onnx").read_bytes() == earlier
    assert verify_model(aside / "model.onnx")["proof"].startswith("top-1 agreement 1.0000"), "its proof went with it"


@pytest.mark.usefixtures("quick_export")
def test_a_checkpoint_that_is_not_what_training_left_costs_no_published_model(export: Export, tiny_config: Config) -> None:
    export()
    before = exports(tiny_config)
    with (tiny_config.run_dir / BEST).open("ab") as file:
        file.write(b"more")
    with pytest.raises(RunError, match=r"best\.ckpt: is not the file that training left"):
        export()
    assert exports(tiny_config) == before
    assert {"model.onnx", "parity.json"} <= set(before)


# ---- smaller forms ----


@pytest.fixture
def with_forms(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Both forms are asked for; no network of 16 x 16 pixels is faster on integers, so their time is given."""

    def measured(contents: dict[str, bytes], images: Images) -> dict[str, list[Latency]]:
        return {name: [Latency(1, 1, 1.0, 2.0, 1.0 if name == "fp32" else 0.5)] for name in contents}

    monkeypatch.setattr(precision, "measure_latency", measured)
    export = dataclasses.replace(tiny_config.export, precisions=["fp16", "int8"], max_drop=0.1)
    return dataclasses.replace(tiny_config, export=export)


@pytest.mark.usefixtures("quick_export")
def test_smaller_forms_have_folders_of_their_own_that_verify_and_predict_take(
    export: Export, with_forms: Config, tiny_dataset: DatasetManifest, record: RunRecord, tracker: Tracker, tiny_source: Path
) -> None:
    export(with_forms)
    folder = with_forms.run_dir / publish.FOLDER
    assert exports(with_forms) == ["example.npy", "fp16", "golden.npz", "int8", "model.onnx", "parity.json", "precisions.json"]
    for name in ("fp16", "int8"):
        path = folder / name / "model.onnx"
        facts = verify_model(path)
        assert facts["precision"] == name
        assert facts["replayed"].startswith("11 images of awkward kinds: the same pixels, probabilities within 0e+00")
        assert Predictor(path).predict(tiny_source / "red" / "00.png").label in tiny_dataset.class_names
    table = json.loads((folder / "precisions.json").read_text())
    assert [(row["precision"], row["published"]) for row in table] == [("fp32", True), ("fp16", True), ("int8", True)]
    assert [row["sha256"] for row in table[1:]] == [sha256_of(folder / name / "model.onnx") for name in ("fp16", "int8")]
    assert {"export/precisions.json", "export/int8/model.onnx", "export/fp16/parity.json"} <= set(tracker.files)
    assert len(tracker.models) == 1, "the run has one model"
    inputs = record.inputs_of("export", with_forms, "test")
    assert record.stage_is_done("export", inputs)
    (folder / "int8" / "model.onnx").write_bytes(b"another")
    assert not record.stage_is_done("export", inputs)


@pytest.mark.usefixtures("quick_export")
def test_a_refused_form_is_in_the_table_alone_and_the_model_stays_published(
    export: Export, with_forms: Config, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    black = [np.zeros((8, 3, 16, 16), np.uint8)]
    monkeypatch.setattr(publish, "calibration_batches", lambda *arguments: iter(black))
    export(with_forms)
    assert exports(with_forms) == ["example.npy", "fp16", "golden.npz", "model.onnx", "parity.json", "precisions.json"]
    table = json.loads((with_forms.run_dir / publish.PRECISIONS).read_text())
    assert [row["published"] for row in table] == [True, True, False]
    assert table[2]["why"].startswith("it was calibrated on images unlike these")
    assert verify_model(with_forms.run_dir / publish.MODEL)["precision"] == "fp32"
    assert record.stage_is_done("export", record.inputs_of("export", with_forms, "test"))


@pytest.mark.usefixtures("quick_export")
def test_forms_that_are_no_longer_asked_for_do_not_stay(export: Export, with_forms: Config, tiny_config: Config) -> None:
    export(with_forms)
    export()
    assert exports(tiny_config) == ["example.npy", "golden.npz", "model.onnx", "parity.json"]


@pytest.mark.usefixtures("quick_export")
def test_targets_go_aside_with_their_model_and_stay_where_nothing_can_be_exported(
    export: Export,
    with_forms: Config,
    tiny_config: Config,
    tiny_dataset: DatasetManifest,
    tiny_spec: PreprocessSpec,
    record: RunRecord,
) -> None:
    export()
    make_targets(tiny_config.run_dir, "tiny", ["triton"], max_batch_size=8)
    published = exports(tiny_config)
    assert "triton" in published
    streamed = dataclasses.replace(tiny_dataset, streams={"train": ["https://host/000.tar"]})
    with pytest.raises(ConfigError, match="but the training shards are streamed"):
        publish.export(with_forms, streamed, tiny_spec, record)
    assert exports(tiny_config) == published
    export()
    assert exports(tiny_config) == ["example.npy", "golden.npz", "model.onnx", "parity.json"]
    (aside,) = tiny_config.run_dir.glob("export.*")
    assert (aside / "triton/tiny/1/model.onnx").read_bytes() == (aside / "model.onnx").read_bytes()
