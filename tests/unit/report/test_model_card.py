import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.preprocess import PreprocessSpec, decode_image
from pipeline.report.model_card import render_card, snippet
from pipeline.report.run_files import RunFiles
from tests.unit.report.given import CHECKPOINT, ONNX

SPEC = PreprocessSpec(
    resize=[6, 8], crop=None, interpolation="bilinear", antialias=True, mean=[0.5] * 3, std=[0.2] * 3, resize_mode="exact"
)
SPECS = {
    "exact": SPEC,
    "kept": dataclasses.replace(SPEC, resize=None, crop=[6, 9]),
    "shortest": dataclasses.replace(SPEC, resize=9, crop=[7, 8], resize_mode="shortest", interpolation="bicubic"),
    "torchvision": dataclasses.replace(SPEC, resize=9, crop=[6, 7], resize_mode="torchvision"),
    "not filtered": dataclasses.replace(SPEC, antialias=False),
    "nearest": dataclasses.replace(SPEC, antialias=False, interpolation="nearest"),
}


def test_the_card_says_what_is_known(finished: RunFiles) -> None:
    card = render_card(finished)
    assert "names the one class of 3" in card
    assert "**Accuracy 0.9167 (95 % interval 0.6461 to 0.9851): 11 of 12 images of the test split.**" in card
    assert "| red | 0.7500 | 0.301 to 0.954 | 4 | 12 |" in card
    assert "Beats logistic regression on pixels" in card
    assert "| expected calibration error (15 bins) | 0.0200 |" in card
    for digest in (CHECKPOINT, ONNX, finished.manifest.digest, finished.record.job_id):
        assert f"`{digest}`" in card
    assert f"shardline predict {finished.config.run_dir}/export/model.onnx IMAGE..." in card
    assert "models:/tiny@champion" in card


def test_the_licence_is_named_where_it_is_stated_and_there_is_a_file_that_has_it(
    finished: RunFiles, untrained: RunFiles
) -> None:
    assert "Its licence" not in render_card(finished)
    for files, is_named in ((finished, True), (untrained, False)):
        export = dataclasses.replace(files.config.export, license="CC-BY-4.0")
        card = render_card(dataclasses.replace(files, config=dataclasses.replace(files.config, export=export)))
        assert ("Its licence is CC-BY-4.0." in card) == is_named
        assert ("Its licence" in card) == is_named


def test_the_limits_are_those_of_this_run(finished: RunFiles) -> None:
    limits = render_card(finished).partition("## Limits")[2].partition("##")[0]
    assert "Fewer than 30 test images, so that their recall is only roughly known: red, blue, green." in limits
    assert "Recall more than 0.1 below the mean of 0.917: red (0.75)." in limits
    assert "The check `leakage` was skipped: named in check.skip." in limits
    assert "`pretrained`" not in limits
    assert "2 images could not be decoded and were left out (2 of train: cut short)." in limits
    assert "flatters" not in limits
    assert "not frequencies" not in limits


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"split": "val"}, "measured on the images that chose its best checkpoint"),
        ({"ece": 0.2}, "the calibration error is 0.200"),
        ({"baselines": {"majority": 0.95, "beaten": False}}, "no better than what needs no network"),
        ({"recall": {"red": 1.0, "green": 1.0, "blue": None}}, "No image of the test split shows: blue."),
        ({"num_bad_samples": 3}, "3 images of the test split could not be decoded"),
    ],
)
def test_what_makes_a_result_worth_less_is_a_limit(finished: RunFiles, changes: dict[str, Any], limit: str) -> None:
    assert limit not in render_card(finished)
    finished.test.update(changes)
    assert limit in render_card(finished)


def test_the_interval_of_a_recall_counts_only_images_that_can_be_decoded(finished: RunFiles) -> None:
    finished.test["per_class"] = [{"class": "red", "support": 3}]
    finished.test["recall"]["red"] = 2 / 3
    assert "| red | 0.6667 | 0.208 to 0.939 | 3 | 12 |" in render_card(finished)


def test_a_run_that_was_not_evaluated_or_exported_claims_nothing(untrained: RunFiles) -> None:
    card = render_card(untrained)
    assert "It has not been evaluated yet." in card
    assert "It was measured" not in card
    assert "No checks ran before training." in card
    assert "## How to use it" not in card
    assert "## Results" not in card


def test_names_of_classes_are_no_markup(finished: RunFiles) -> None:
    manifest = dataclasses.replace(finished.manifest, class_names=["a|b", "<script> &lt;", "*c*\n# d"])
    card = render_card(dataclasses.replace(finished, manifest=manifest))
    assert r"3 classes: a\|b, \<script\> \&lt;, \*c\* \# d." in card


class Session:
    """Stands for onnxruntime's session: remembers what it is fed."""

    fed: np.ndarray[Any, Any]

    def __init__(self, path: str) -> None:
        assert path == "export/model.onnx"

    def get_modelmeta(self) -> Any:
        meta = type("Meta", (), {})()
        meta.custom_metadata_map = {"shardline.class_names": json.dumps(["no", "yes"])}
        return meta

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        assert names == ["probabilities"]
        Session.fed = feeds["image"]
        return [np.array([[0.25, 0.75]], np.float32)]


@pytest.mark.parametrize("name", SPECS)
def test_the_snippet_feeds_the_pixels_that_training_saw(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (14, 20, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.jpg")
    stand_in = ModuleType("onnxruntime")
    stand_in.InferenceSession = Session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    monkeypatch.chdir(tmp_path)
    exec(snippet(SPECS[name], is_multi=False), {})
    wanted = decode_image(Path("image.jpg").read_bytes(), SPECS[name])
    np.testing.assert_array_equal(Session.fed, wanted.transpose(2, 0, 1)[None])
    assert capsys.readouterr().out == "yes 0.7500\n"
    exec(snippet(SPECS[name], is_multi=True), {})
    assert capsys.readouterr().out == "['yes']\n"
