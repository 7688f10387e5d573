import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient
from google.protobuf import text_format
from PIL import Image

from pipeline.config import Target
from pipeline.errors import ConfigError, GateError, ModelError
from pipeline.export import targets
from pipeline.export.targets import make_targets, require_targets, safe_name, triton_config
from pipeline.files import sha256_of
from pipeline.golden import GoldenVectors
from pipeline.predictor import Predictor
from pipeline.preprocess import PreprocessSpec
from tests.photos import encode
from tests.unit.conftest import COLOURS, SIDE
from tests.unit.export import sabotage


def parse(text: str) -> Any:
    """What Triton would read of a config.pbtxt; the parser refuses fields that it does not know."""
    # Of the client's package alone: that around this module wants gRPC.
    path = Path(tritonclient.__file__).with_name("grpc") / "model_config_pb2.py"
    specification = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return text_format.Parse(text, module.ModelConfig())


@pytest.fixture
def run_dir(tmp_path: Path, exported_model: onnx.ModelProto, tiny_spec: PreprocessSpec) -> Path:
    """A run whose model is published."""
    folder = tmp_path / "run"
    publish(folder / "export", exported_model)
    return folder


def publish(folder: Path, model: onnx.ModelProto) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    pixels = np.random.default_rng(3).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)  # (N, H, W, 3)
    answers = Predictor(folder / "model.onnx").probabilities([*pixels])  # (N, K)
    golden = GoldenVectors(["plain"], [encode(Image.fromarray(pixels[0]))], pixels, answers)
    (folder / "golden.npz").write_bytes(golden.to_bytes())
    proof = {"passed": True, "sha256": sha256_of(folder / "model.onnx"), "golden_sha256": sha256_of(folder / "golden.npz")}
    (folder / "parity.json").write_text(json.dumps(proof | {"top1_agreement": 1.0, "num_samples": 12}))


@pytest.fixture
def vendored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the page's own, with files that stand for those which `make web` fetches."""
    page = tmp_path / "page"
    (page / "vendor").mkdir(parents=True)
    for name in targets.PAGE_FILES:
        (page / name).write_bytes((targets.PAGE / name).read_bytes())
    for name in targets.VENDORED:
        (page / name).write_bytes(b"fetched")
    monkeypatch.setattr(targets, "PAGE", page)
    return page


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- Triton ----


def test_the_repository_holds_the_proved_file_and_what_triton_needs_beside_it(run_dir: Path) -> None:
    made = make_targets(run_dir, "tiny", ["triton"], max_batch_size=64)
    assert made == sorted((run_dir / "export/triton/tiny" / name) for name in files(run_dir / "export/triton/tiny"))
    folder = run_dir / "export/triton/tiny"
    assert files(folder) == ["1/model.onnx", "config.pbtxt", "labels.txt", "warmup/image"]
    assert (folder / "1/model.onnx").read_bytes() == (run_dir / "export/model.onnx").read_bytes()
    assert (folder / "labels.txt").read_text().splitlines() == list(COLOURS)
    photo = GoldenVectors.read(run_dir / "export/golden.npz").pixels[0]
    found = np.frombuffer((folder / "warmup/image").read_bytes(), dtype=np.uint8).reshape(3, SIDE, SIDE)
    assert np.array_equal(found, photo.transpose(2, 0, 1))


def test_the_configuration_says_of_the_tensors_what_the_onnx_file_does(run_dir: Path) -> None:
    make_targets(run_dir, "tiny", ["triton"], max_batch_size=64)
    folder = run_dir / "export/triton/tiny"
    config = parse((folder / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(str(folder / "1/model.onnx"), providers=["CPUExecutionProvider"])
    kinds = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
    type_name = config.DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type.values_by_number
    for stated, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        found = [(each.name, type_name[each.data_type].name, list(each.dims)) for each in stated]
        assert found == [(each.name, kinds[each.type], each.shape[1:]) for each in real]
    assert {each.name: each.label_filename for each in config.output} == {"logits": "", "probabilities": "labels.txt"}
    assert (config.name, config.platform, config.max_batch_size) == ("tiny", "onnxruntime_onnx", 64)


def test_requests_are_batched_and_the_model_is_warm_before_it_is_ready(run_dir: Path) -> None:
    make_targets(run_dir, "tiny", ["triton"], max_batch_size=6)
    config = parse((run_dir / "export/triton/tiny/config.pbtxt").read_text())
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 6]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 6]
    for warmup in config.model_warmup:
        (image,) = warmup.inputs.values()
        assert (list(warmup.inputs), list(image.dims), image.input_data_file) == (["image"], [3, SIDE, SIDE], "image")
    assert config.version_policy.latest.num_versions == 1
    (group,) = config.instance_group
    assert group.Kind.Name(group.kind) == "KIND_AUTO"


def test_a_batch_of_one_is_warmed_up_once(run_dir: Path) -> None:
    make_targets(run_dir, "tiny", ["triton"], max_batch_size=1)
    config = parse((run_dir / "export/triton/tiny/config.pbtxt").read_text())
    assert [warmup.batch_size for warmup in config.model_warmup] == [1]
    assert list(config.dynamic_batching.preferred_batch_size) == [1]


def test_lineage_and_preprocessing_travel_as_parameters(run_dir: Path, tiny_spec: PreprocessSpec) -> None:
    make_targets(run_dir, "tiny", ["triton"], max_batch_size=64)
    parameters = parse((run_dir / "export/triton/tiny/config.pbtxt").read_text()).parameters
    found = {key: value.string_value for key, value in parameters.items()}
    assert found["shardline.data_digest"] == "d" * 64
    assert found["shardline.job_id"] == "a" * 32
    assert json.loads(found["shardline.preprocess"]) == json.loads(json.dumps(dataclasses.asdict(tiny_spec)))
    assert found["shardline.onnx_sha256"] == sha256_of(run_dir / "export/model.onnx")


def test_text_that_could_end_a_string_does_not(exported_model: onnx.ModelProto) -> None:
    nasty = 'a "quoted" \\ back\nslash, a snowman \N{SNOWMAN} and \x01'
    metadata = {"class_names": "[]", "license": nasty}
    config = parse(triton_config('x" }', exported_model, metadata, 8))
    assert config.name == 'x" }'
    assert config.parameters["shardline.license"].string_value == nasty


def test_each_precision_is_a_model_of_its_own(run_dir: Path, model: onnx.ModelProto) -> None:
    sabotage.change_a_weight(model)
    publish(run_dir / "export/int8", model)
    make_targets(run_dir, "tiny", ["triton"], max_batch_size=64)
    repository = run_dir / "export/triton"
    assert sorted(path.name for path in repository.iterdir()) == ["tiny", "tiny_int8"]
    assert parse((repository / "tiny_int8/config.pbtxt").read_text()).name == "tiny_int8"
    assert (repository / "tiny_int8/1/model.onnx").read_bytes() == (run_dir / "export/int8/model.onnx").read_bytes()


def test_a_class_name_of_two_lines_keeps_the_labels_in_step(run_dir: Path, model: onnx.ModelProto) -> None:
    sabotage.set_metadata(model, "class_names", json.dumps(["one\nclass", "two", "three"]))
    publish(run_dir / "export", model)
    make_targets(run_dir, "tiny", ["triton"], max_batch_size=64)
    assert (run_dir / "export/triton/tiny/labels.txt").read_text().splitlines() == ["one class", "two", "three"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [("digits", "digits"), ("my run: 1/2", "my_run_1_2"), ("v1.2-b", "v1.2-b"), ("..x", "x"), ("é", "_")],
)
def test_a_name_is_made_fit_for_folders_and_urls(name: str, safe: str) -> None:
    assert safe_name(name) == safe


# ---- the page ----


def test_the_page_is_complete_and_bears_the_models_name(run_dir: Path, vendored: Path) -> None:
    made = make_targets(run_dir, "<cats> & dogs", ["web"], max_batch_size=64)
    folder = run_dir / "export/web"
    assert [str(path.relative_to(folder)) for path in made] == files(folder)
    assert {"LICENSE.onnxruntime", "index.html", "model.onnx", *targets.VENDORED} <= set(files(folder))
    assert (folder / "model.onnx").read_bytes() == (run_dir / "export/model.onnx").read_bytes()
    page = (folder / "index.html").read_text()
    assert "<title>&lt;cats&gt; &amp; dogs</title>" in page
    assert "{{" not in page


def test_everything_that_the_page_asks_for_is_there() -> None:
    asked = {
        name
        for file in targets.PAGE_FILES
        for name in re.findall(r'"(?:\./)?([\w./-]+\.(?:js|css|wasm|onnx))"', (targets.PAGE / file).read_text())
    }
    shipped = {*targets.PAGE_FILES, *targets.VENDORED, "model.onnx"}
    assert asked == shipped - {"index.html", "LICENSE.onnxruntime"}
    assert {path.name for path in targets.PAGE.iterdir()} - {"vendor"} == set(targets.PAGE_FILES)


def test_without_the_fetched_files_one_line_says_how_to_get_them(vendored: Path) -> None:
    require_targets(["web"])
    (vendored / targets.VENDORED[1]).unlink()
    require_targets(["triton"])
    with pytest.raises(ConfigError, match=r"`export.targets` has `web`, but .*simd-threaded\.wasm is missing: run `make web`"):
        require_targets(["triton", "web"])


# ---- both ----


def test_a_target_takes_the_place_of_the_earlier_one_whole(run_dir: Path) -> None:
    make_targets(run_dir, "tiny", ["triton"], max_batch_size=64)
    make_targets(run_dir, "renamed", ["triton"], max_batch_size=64)
    assert [path.name for path in (run_dir / "export/triton").iterdir()] == ["renamed"]


def test_a_target_that_breaks_down_leaves_the_earlier_one_as_it_was(run_dir: Path) -> None:
    make_targets(run_dir, "tiny", ["triton"], max_batch_size=64)
    (run_dir / "export/golden.npz").unlink()
    before = files(run_dir)
    with pytest.raises(ModelError, match=r"golden\.npz: cannot be read"):
        make_targets(run_dir, "other", ["triton"], max_batch_size=64)
    assert files(run_dir) == before


@pytest.mark.parametrize("target", targets.FOLDERS)
def test_a_model_that_no_export_publishes_is_not_put_there(
    target: Target, run_dir: Path, vendored: Path, model: onnx.ModelProto
) -> None:
    sabotage.use_a_rare_operator(model)
    onnx.save(model, run_dir / "export/model.onnx")
    before = files(run_dir)
    with pytest.raises(GateError, match=r"model\.onnx: was not published by `shardline export`: it uses Det, ") as refusal:
        make_targets(run_dir, "tiny", [target], max_batch_size=64)
    assert refusal.value.exit_code == 3
    assert files(run_dir) == before


@pytest.mark.parametrize("damage", ["no proof", "another's proof", "other answers"])
def test_a_model_that_was_not_proved_is_not_put_there(run_dir: Path, model: onnx.ModelProto, damage: str) -> None:
    form = run_dir / "export/int8"
    publish(form, model)
    if damage == "no proof":
        (form / "parity.json").unlink()
        reason = "no parity.json beside it"
    else:
        sabotage.change_a_weight(model)
        onnx.save(model, form / "model.onnx")
        reason = "is not the file that"
    if damage == "other answers":
        proof = json.loads((form / "parity.json").read_text()) | {"sha256": sha256_of(form / "model.onnx")}
        (form / "parity.json").write_text(json.dumps(proof))
        reason = "answers otherwise on this machine"
    before = files(run_dir)
    with pytest.raises(GateError, match=rf"int8/model\.onnx: was not published by `shardline export`: .*{reason}"):
        make_targets(run_dir, "tiny", ["triton"], max_batch_size=64)
    assert files(run_dir) == before
