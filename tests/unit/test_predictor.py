import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.errors import DataError, ModelError
from pipeline.files import sha256_of
from pipeline.predictor import Predictor, verify_model
from pipeline.preprocess import PreprocessSpec, decode_image

Edit = Callable[[dict[str, str]], object]


@pytest.fixture
def model_path(exported_model: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported_model.SerializeToString())
    return path


def edited(model: onnx.ModelProto, path: Path, edit: Edit) -> Path:
    """A copy of `model` at `path` whose metadata went through `edit`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    metadata = {entry.key: entry.value for entry in copy.metadata_props}
    edit(metadata)
    onnx.helper.set_model_props(copy, metadata)
    path.write_bytes(copy.SerializeToString())
    return path


def test_the_answers_are_those_of_the_trained_network(
    model_path: Path, tiny_network: nn.Sequential, tiny_spec: PreprocessSpec, tiny_source: Path
) -> None:
    predictor = Predictor(model_path)
    for path in sorted(tiny_source.glob("*/0*.png")):
        pixels = torch.from_numpy(decode_image(path.read_bytes(), tiny_spec).copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
        with torch.no_grad():
            wanted = tiny_network(pixels).softmax(dim=1)[0].numpy()  # (K,)
        answer = predictor.predict(path)
        # float32 arithmetic of two runtimes.
        np.testing.assert_allclose(list(answer.probabilities.values()), wanted, rtol=0, atol=1e-5)
        assert answer.label == ("blue", "green", "red")[int(wanted.argmax())]
        assert answer.probability == max(answer.probabilities.values())


@pytest.mark.parametrize(("name", "mode"), [("large.jpg", "RGB"), ("clear.png", "RGBA"), ("grey.webp", "L")])
def test_any_kind_of_image_is_answered_as_the_trained_network_would(
    model_path: Path, tiny_network: nn.Sequential, tiny_spec: PreprocessSpec, tmp_path: Path, name: str, mode: str
) -> None:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, bands), dtype=np.uint8).squeeze()  # (H, W, C) or (H, W)
    Image.fromarray(noise, mode).save(tmp_path / name)
    pixels = decode_image((tmp_path / name).read_bytes(), tiny_spec).copy()
    with torch.no_grad():
        wanted = tiny_network(torch.from_numpy(pixels).permute(2, 0, 1)[None]).softmax(dim=1)[0].numpy()  # (K,)
    answer = Predictor(model_path).predict(tmp_path / name)
    np.testing.assert_allclose(list(answer.probabilities.values()), wanted, rtol=0, atol=1e-5)  # as above


def test_an_image_that_was_cut_short_is_refused(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"cut\.jpg: cannot be decoded"):
        Predictor(model_path).predict(path)


def test_what_is_no_image_is_refused_by_name(model_path: Path, tmp_path: Path) -> None:
    predictor = Predictor(model_path)
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"text.jpg: cannot be decoded"):
        predictor.predict(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"nowhere.jpg: no such image"):
        predictor.predict(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match="is a folder; name image files"):
        predictor.predict(tmp_path)


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match=r"model.onnx: no such model file"):
        Predictor(path)
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"model.onnx: cannot be loaded as an ONNX model"):
        Predictor(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda metadata: metadata.clear(), "is not a Shardline model"),
        (lambda metadata: metadata.pop("shardline.class_names"), "is not a Shardline model"),
        (lambda metadata: metadata.update({"shardline.class_names": "blue"}), "is not a Shardline model"),
        (lambda metadata: metadata.update({"shardline.format_version": "2"}), "format_version 2 is newer than 1"),
        (
            lambda metadata: [metadata.pop("shardline.versions"), metadata.update({"shardline.format_version": "2"})],
            "format_version 2 is newer than 1",
        ),
        (lambda metadata: metadata.update({"shardline.preprocess": "{}"}), "needs another Shardline"),
    ],
)
def test_a_model_of_somebody_else_is_refused(exported_model: onnx.ModelProto, tmp_path: Path, edit: Edit, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Predictor(edited(exported_model, tmp_path / "model.onnx", edit))


def rename_the_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "x"
    for node in model.graph.node:
        node.input[:] = ["x" if name == "image" else name for name in node.input]


def rename_an_output(model: onnx.ModelProto) -> None:
    model.graph.output[1].name = "p"
    for node in model.graph.node:
        node.output[:] = ["p" if name == "probabilities" else name for name in node.output]


def add_a_class(model: onnx.ModelProto) -> None:
    (entry,) = [entry for entry in model.metadata_props if entry.key == "shardline.class_names"]
    entry.value = '["blue", "green", "red", "white"]'


@pytest.mark.parametrize("change", [rename_the_input, rename_an_output, add_a_class])
def test_a_model_that_does_not_keep_its_promise_is_refused_by_name(
    exported_model: onnx.ModelProto, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(exported_model)
    change(copy)
    (tmp_path / "model.onnx").write_bytes(copy.SerializeToString())
    with pytest.raises(ModelError, match=r"model\.onnx: "):
        verify_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("report", ["not JSON", "{}", "[]"])
def test_verify_refuses_a_parity_report_that_says_nothing(model_path: Path, report: str) -> None:
    model_path.with_name("parity.json").write_text(report)
    with pytest.raises(ModelError, match=r"parity\.json"):
        verify_model(model_path)


def test_verify_refuses_a_model_whose_parity_failed(model_path: Path) -> None:
    parity = {"passed": False, "sha256": sha256_of(model_path), "top1_agreement": 0.25, "num_samples": 12}
    model_path.with_name("parity.json").write_text(json.dumps(parity))
    with pytest.raises(ModelError, match=r"parity\.json"):
        verify_model(model_path)


def test_verify_passes_the_file_that_parity_proved_and_no_other(model_path: Path) -> None:
    parity = {"passed": True, "sha256": sha256_of(model_path), "top1_agreement": 1.0, "num_samples": 12}
    model_path.with_name("parity.json").write_text(json.dumps(parity))
    assert verify_model(model_path)["proof"] == "top-1 agreement 1.0000 on 12 images"
    model_path.with_name("parity.json").write_text(json.dumps({**parity, "sha256": "0" * 64}))
    with pytest.raises(ModelError, match=r"is not the file that .*parity.json proved"):
        verify_model(model_path)


def test_verify_refuses_edited_preprocessing(exported_model: onnx.ModelProto, tmp_path: Path) -> None:
    def edit(metadata: dict[str, str]) -> None:
        values = json.loads(metadata["shardline.preprocess"])
        metadata["shardline.preprocess"] = json.dumps({**values, "interpolation": "nearest"})

    with pytest.raises(ModelError, match="its preprocessing was changed after export"):
        verify_model(edited(exported_model, tmp_path / "model.onnx", edit))


def test_serving_imports_no_torch() -> None:
    script = "import sys, pipeline.cli, pipeline.predictor; print({'torch', 'lightning', 'mlflow'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60).strip() == "set()"


def test_verify_says_what_the_file_says_of_itself_and_an_older_one_says_less(
    exported_model: onnx.ModelProto, tmp_path: Path
) -> None:
    metrics = json.dumps({"split": "test", "num_samples": 1200, "accuracy": 0.75})
    told = {"shardline.precision": "int8", "shardline.license": "CC-BY-4.0", "shardline.metrics": metrics}
    facts = verify_model(edited(exported_model, tmp_path / "new.onnx", lambda metadata: metadata.update(told)))
    assert (facts["precision"], facts["licence"]) == ("int8", "CC-BY-4.0")
    assert facts["accuracy"] == "0.7500 on 1,200 images of test (of the trained network)", "nobody measured this file's"
    told["shardline.precision"] = "fp32"
    plain = verify_model(edited(exported_model, tmp_path / "plain.onnx", lambda metadata: metadata.update(told)))
    assert plain["accuracy"] == "0.7500 on 1,200 images of test"
    older = verify_model(edited(exported_model, tmp_path / "old.onnx", lambda metadata: None))
    assert (older["precision"], older["licence"]) == ("fp32", "not stated")
    assert "accuracy" not in older


@pytest.mark.parametrize("metrics", ["[]", '{"accuracy": "high"}', "0.75"])
def test_metrics_that_are_none_are_refused_by_name(exported_model: onnx.ModelProto, tmp_path: Path, metrics: str) -> None:
    told = {"shardline.metrics": metrics}
    with pytest.raises(ModelError, match=r"model\.onnx: its metrics cannot be read"):
        verify_model(edited(exported_model, tmp_path / "model.onnx", lambda metadata: metadata.update(told)))


# ---- several labels an image ----


def test_every_label_of_one_half_or_more_is_an_answer_the_most_probable_first(
    multi_model: onnx.ModelProto, tiny_network: nn.Sequential, tiny_spec: PreprocessSpec, tiny_source: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(multi_model.SerializeToString())
    predictor, found = Predictor(tmp_path / "model.onnx"), set[tuple[str, ...]]()
    names = ("blue", "green", "red")
    for path in sorted(tiny_source.glob("*/0*.png")):
        pixels = torch.from_numpy(decode_image(path.read_bytes(), tiny_spec).copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
        with torch.no_grad():
            wanted = tiny_network(pixels).sigmoid()[0]  # (K,)
        answer = predictor.predict(path)
        expected = [names[number] for number in wanted.argsort(descending=True).tolist() if wanted[number] >= 0.5]
        assert answer.labels == expected
        np.testing.assert_allclose(list(answer.probabilities.values()), wanted, rtol=0, atol=1e-5)  # as above
        found.add(tuple(answer.labels))
    assert len(found) > 1


def test_verify_takes_probabilities_that_do_not_sum_to_1_only_where_an_image_has_several_labels(
    multi_model: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(multi_model.SerializeToString())
    assert verify_model(path)["labels an image"] == "several"
    edited(multi_model, path, lambda metadata: metadata.update({"shardline.task": "single"}))
    with pytest.raises(ModelError, match="does not answer with one probability for each of its classes"):
        verify_model(path)
