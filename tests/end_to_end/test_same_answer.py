"""One photo, one answer: every way to ask a model gives the same probabilities."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.bench.runtimes import openvino_core
from pipeline.config import load_config
from pipeline.manifest import load_dataset
from pipeline.models.sequential import network_for
from pipeline.predictor import Predictor
from pipeline.preprocess import decode_image
from pipeline.pretraining import spec_for
from pipeline.run import RunRecord
from pipeline.task import task_of
from pipeline.training.checkpoint import load_network_weights
from tests.mlflow_server import free_port
from tests.photos import golden_photos
from tests.processes import shardline, wait_until
from tests.serving import serving

REPOSITORY = Path(__file__).parents[2]
RUN = Path("runs/digits")
MODEL = RUN / "export/model.onnx"
# Float32 sums in another order.
TOLERANCE = 1e-5
Answers = npt.NDArray[np.float64]  # probabilities (N, K)
Ask = Callable[[Path, list[Path]], Answers]


@pytest.fixture(scope="module")
def photos(workspace: Path, chain: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return golden_photos(workspace / MODEL.with_name("golden.npz"), tmp_path_factory.mktemp("photos"))


def trained_network(workspace: Path, photos: list[Path]) -> Answers:
    """The best checkpoint in torch, as `evaluate` asks it."""
    config = load_config(workspace / RUN / "config.yaml")
    manifest = load_dataset(str(workspace / config.dataset_location), config.data.cache_folder)
    spec, record = spec_for(config, manifest), RunRecord.require(workspace / RUN)
    network = network_for(config, manifest, spec, pretrained=False).eval()
    network.load_state_dict(load_network_weights(record.best_checkpoint(), record))
    pixels = np.stack([decode_image(photo.read_bytes(), spec) for photo in photos])  # (N, H, W, 3)
    with torch.no_grad():
        logits = network(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return np.asarray(task_of(manifest, config).probabilities(logits).double().numpy())


def predict(workspace: Path, photos: list[Path]) -> Answers:
    """`shardline predict`."""
    done = shardline("predict", str(MODEL), *map(str, photos), "--json", cwd=workspace)
    assert done.returncode == 0, done.stderr
    return np.array([[*answer["probabilities"].values()] for answer in json.loads(done.stdout)])


def openvino(workspace: Path, photos: list[Path]) -> Answers:
    """The same file in a runtime that shares no code with onnxruntime."""
    pytest.importorskip("openvino")
    # Left to itself it calculates in bfloat16 where the processor can, and a probability may be 0.005 off.
    compiled = openvino_core().compile_model(str(workspace / MODEL), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    spec = Predictor(workspace / MODEL).spec
    images = [decode_image(photo.read_bytes(), spec).transpose(2, 0, 1) for photo in photos]  # (3, H, W)
    return np.array([compiled(image[None])["probabilities"][0] for image in images], dtype=np.float64)


def mlflow_serve(workspace: Path, photos: list[Path]) -> Answers:
    """`mlflow models serve` of the champion, asked as docs/serving.md tells."""
    serve, ask = re.findall(r"```bash\n(.*?)```", mlflow_section(), flags=re.DOTALL)
    port = free_port()
    answers = []
    with mlflow_answering(workspace, serve.replace("5001", str(port)), port):
        for photo in photos:
            script = ask.replace("5001", str(port)).replace("photo.jpg", str(photo))
            answer = json.loads(bash(script, workspace, OMP_NUM_THREADS="1"))
            answers += answer["predictions"]["probabilities"]
    return np.array(answers)


def mlflow_section() -> str:
    return (REPOSITORY / "docs/serving.md").read_text().split("## MLflow's server")[1].split("\n## ")[0]


def bash(script: str, folder: Path, **environment: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.check_output(command, cwd=folder, env=with_our_python(environment), text=True, timeout=60)


def with_our_python(environment: dict[str, str]) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", **environment}


@contextlib.contextmanager
def mlflow_answering(workspace: Path, script: str, port: int) -> Iterator[None]:
    """MLflow's server, started as a reader of the documentation would; nothing of it is left."""
    log = workspace / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script], cwd=workspace, env=with_our_python({}), stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-2000:]
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
            return True
        return False

    try:
        wait_until(answers, "mlflow models serve")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)


def serve(workspace: Path, photos: list[Path]) -> Answers:
    """`shardline serve`, asked for all photos at once by a form."""
    parts = [
        f'--B\r\nContent-Disposition: form-data; name="f"; filename="{photo.name}"\r\n\r\n'.encode() + photo.read_bytes()
        for photo in photos
    ]
    with serving(str(RUN), cwd=workspace, log=workspace / "serving.log") as server:
        body = b"\r\n".join([*parts, b"--B--\r\n"])
        status, answer = server.post("/predict?probabilities=1", body, "multipart/form-data; boundary=B")
    assert status == 200, answer
    return np.array([[*found["probabilities"].values()] for found in answer["predictions"]])


def serve_v2(workspace: Path, photos: list[Path]) -> Answers:
    """`shardline serve`, asked for pixels by a client of the Open Inference Protocol."""
    client = pytest.importorskip("tritonclient.http")
    spec = Predictor(workspace / MODEL).spec
    pixels = np.stack([decode_image(photo.read_bytes(), spec).transpose(2, 0, 1) for photo in photos])  # (N, 3, H, W)
    image = client.InferInput("image", list(pixels.shape), "UINT8")
    image.set_data_from_numpy(pixels)
    with serving(str(RUN), cwd=workspace, log=workspace / "serving.log") as server:
        found = client.InferenceServerClient(server.url.removeprefix("http://")).infer(server.name, [image])
    return np.asarray(found.as_numpy("probabilities"), dtype=np.float64)


# Each is held against what the file says to onnxruntime, and so against all others.
WAYS: dict[str, Ask] = {
    "torch": trained_network,
    "predict": predict,
    "serve": serve,
    "serve, V2": serve_v2,
    "openvino": openvino,
    "mlflow": mlflow_serve,
}


@pytest.fixture(scope="module")
def served(workspace: Path, chain: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits' run, whose model is champion there; its artifacts are those of the workspace."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("data/digits", "runs/digits"):
        shutil.copytree(workspace / name, folder / name)
    shutil.copy(workspace / "runs/mlflow.db", folder / "runs/mlflow.db")
    promoted = shardline("promote", cwd=folder)
    assert promoted.returncode == 0, promoted.stderr
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_gives_the_same_probabilities(way: str, served: Path, photos: list[Path]) -> None:
    model = Predictor(served / MODEL)
    wanted = model.probabilities([decode_image(photo.read_bytes(), model.spec) for photo in photos])  # (N, K)
    found = WAYS[way](served, photos)
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).all()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    assert len(set(wanted.argmax(axis=1))) > 1, "the photos do not tell classes apart"
