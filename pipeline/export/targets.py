"""What a proved model is made into for others to run: a Triton model repository, and a page that runs it in a browser.

A target holds copies of files that have passed the gate; nothing is exported anew for it. It is made whole or not at all, and
goes aside with its model when that is exported anew.
"""

import contextlib
import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from pipeline.config import Target
from pipeline.errors import ConfigError, GateError, ModelError
from pipeline.export.graph import PREFIX
from pipeline.export.operators import operator_defects
from pipeline.export.proto import metadata
from pipeline.files import sha256_of, temporary_name
from pipeline.golden import GOLDEN, GoldenVectors
from pipeline.predictor import NO_PROOF, verify_model

MODEL_NAME = "model.onnx"
FOLDERS: dict[Target, Path] = {"triton": Path("export/triton"), "web": Path("export/web")}
# Beside the model that is always made lie those of other precisions, where there are any.
PRECISIONS = ("", "fp16", "int8")

PAGE = Path(__file__).with_name("web")
PAGE_FILES = (
    *("index.html", "style.css", "app.js", "worker.js", "decode.js", "metadata.js", "preprocess.js"),
    "LICENSE.onnxruntime",
)
# onnxruntime-web, which `make web` fetches: the plain build, which runs everywhere and is half as large as those for WebGPU.
VENDORED = ("vendor/ort.wasm.bundle.min.js", "vendor/ort-wasm-simd-threaded.wasm")

# How long Triton lets a request wait for others to share a batch with.
QUEUE_DELAY_MICROSECONDS = 2000
TRITON_TYPES: dict[int, str] = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.FLOAT: "TYPE_FP32"}
# Lineage that is of use to whoever runs the model; `preprocess` tells clients what to send.
PARAMETERS = (
    *("task", "precision", "preprocess", "preprocess_hash", "metrics", "license"),
    *("data_digest", "job_id", "mlflow_run_id", "checkpoint_sha256", "git_commit"),
)


def require_targets(targets: list[Target]) -> None:
    """Refuse what cannot be made here, before anything is exported. Raises ConfigError."""
    missing = [name for name in VENDORED if not (PAGE / name).is_file()]
    if "web" in targets and missing:
        raise ConfigError(
            f"`export.targets` has `web`, but {PAGE / missing[0]} is missing: run `make web` in a checkout (it needs npm), or "
            "install a wheel made by `make package`."
        )


def make_targets(run_dir: Path, name: str, targets: list[Target], max_batch_size: int) -> list[Path]:
    """Make RUN/export/TARGET of each target from the published model, and return the files. `name` is the model's.

    Raises GateError where a file holds what no published one does.
    """
    made: list[Path] = []
    for target, folder in FOLDERS.items():
        if target in targets:
            with _whole_folder(run_dir / folder) as temporary:
                if target == "triton":
                    _write_repository(temporary, run_dir / "export", name, max_batch_size)
                else:
                    _write_page(temporary, run_dir / "export" / MODEL_NAME, name)
            made += sorted(path for path in (run_dir / folder).rglob("*") if path.is_file())
    return made


def _load(path: Path) -> onnx.ModelProto:
    """A model that is to be copied. A form that somebody laid there is in no record of outputs, so nothing else looks at it."""
    model = onnx.load(path, load_external_data=False)
    defects = [*operator_defects(model)]
    try:
        if not defects and verify_model(path)["proof"] == NO_PROOF:
            defects = [NO_PROOF]
    except ModelError as error:
        defects = [str(error).rstrip(".")]
    if defects:
        raise GateError(f"{path}: was not published by `shardline export`: {'; '.join(defects)}. Remove it and export again.")
    return model


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when it is complete."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# ---- Triton ----


def safe_name(name: str) -> str:
    """A run's name as Triton can bear it in folders and URLs: ASCII letters, digits and `_.-`, no dot in front."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".")


def _write_repository(repository: Path, export_dir: Path, name: str, max_batch_size: int) -> None:
    """One folder for each precision (https://docs.nvidia.com/deeplearning/triton-inference-server, Model Repository)."""
    for precision in PRECISIONS:
        model_path = export_dir / precision / MODEL_NAME
        if not model_path.is_file():
            continue
        folder = repository / safe_name(f"{name}_{precision}" if precision else name)
        (folder / "1").mkdir(parents=True)
        shutil.copyfile(model_path, folder / "1" / MODEL_NAME)
        model = _load(model_path)
        described = {key.removeprefix(PREFIX): value for key, value in metadata(model).items() if key.startswith(PREFIX)}
        class_names = json.loads(described["class_names"])
        (folder / "labels.txt").write_text("".join(f"{' '.join(label.split())}\n" for label in class_names))
        (folder / "warmup").mkdir()
        photo = GoldenVectors.read(model_path.with_name(GOLDEN)).pixels[0]  # (H, W, 3)
        (folder / "warmup/image").write_bytes(np.ascontiguousarray(photo.transpose(2, 0, 1)).tobytes())
        described["onnx_sha256"] = sha256_of(model_path)
        (folder / "config.pbtxt").write_text(triton_config(folder.name, model, described, max_batch_size))


def triton_config(name: str, model: onnx.ModelProto, described: dict[str, str], max_batch_size: int) -> str:
    """config.pbtxt of `model`: text of the message ModelConfig (triton-inference-server/common, model_config.proto)."""
    (image,) = model.graph.input
    labels = {"probabilities": ' label_filename: "labels.txt"'}
    outputs = ",\n".join(f"  {{ {_tensor(value)}{labels.get(value.name, '')} }}" for value in model.graph.output)
    sizes = [size for size in (4, 8, 16, 32, 64, 128) if size < max_batch_size] + [max_batch_size]
    parameters = "\n".join(
        f"parameters {{ key: {_quoted(PREFIX + key)} value {{ string_value: {_quoted(described[key])} }} }}"
        for key in (*PARAMETERS, "onnx_sha256")
        if described.get(key)
    )
    warmups = ",\n".join(
        f"  {{ name: {_quoted(f'batch of {size}')} batch_size: {size} inputs {{ key: {_quoted(image.name)} "
        f'value {{ data_type: {_type(image)} dims: {_dims(image)} input_data_file: "image" }} }} }}'
        for size in sorted({1, max_batch_size})
    )
    return f"""\
name: {_quoted(name)}
platform: "onnxruntime_onnx"
max_batch_size: {max_batch_size}
input [
  {{ {_tensor(image)} }}
]
output [
{outputs}
]
version_policy {{ latest {{ num_versions: 1 }} }}
# A GPU where there is one, else the CPU, whose threads onnxruntime shares out by itself.
instance_group [ {{ kind: KIND_AUTO count: 1 }} ]
dynamic_batching {{ preferred_batch_size: {sizes} max_queue_delay_microseconds: {QUEUE_DELAY_MICROSECONDS} }}
# One real photo, alone and as a full batch, before the model is said to be ready.
model_warmup [
{warmups}
]
{parameters}
"""


def _tensor(value: onnx.ValueInfoProto) -> str:
    return f"name: {_quoted(value.name)} data_type: {_type(value)} dims: {_dims(value)}"


def _type(value: onnx.ValueInfoProto) -> str:
    return TRITON_TYPES[value.type.tensor_type.elem_type]


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """The shape without the batch, of which Triton knows by `max_batch_size`."""
    return [axis.dim_value for axis in value.type.tensor_type.shape.dim[1:]]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# ---- the page ----


def _write_page(folder: Path, model_path: Path, name: str) -> None:
    _load(model_path)
    for file in (*PAGE_FILES, *VENDORED):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(PAGE / file, folder / file)
    page = (folder / "index.html").read_text()
    (folder / "index.html").write_text(page.replace("{{name}}", html.escape(name)))
    notices = Path(onnxruntime.__file__).with_name("ThirdPartyNotices.txt")  # of the same project's libraries
    if notices.is_file():
        shutil.copyfile(notices, folder / "vendor" / notices.name)
    shutil.copyfile(model_path, folder / MODEL_NAME)
