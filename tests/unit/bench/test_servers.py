import io
import json
import os
from email.parser import BytesParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from pipeline.bench import servers
from pipeline.bench.servers import FASTAPI, MLFLOW, OURS, SERVERS, command_of, pinned, request_for, serving, top_of
from pipeline.predictor import Predictor
from tests.hostile import encoded
from tests.processes import wait_until

CLASSES = ["cat", "dog", "owl"]
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
JPEG = encoded(PHOTO, "JPEG")


@pytest.fixture
def predictor(exported_model: onnx.ModelProto, tmp_path: Path) -> Predictor:
    """A model that takes 16 x 16 pixels."""
    onnx.save(exported_model, tmp_path / "model.onnx")
    return Predictor(tmp_path / "model.onnx")


def body_of(request: bytes) -> tuple[str, bytes]:
    """Head and body, which must be as long as the head says."""
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return head.decode(), body


def test_a_photo_is_sent_as_it_is(predictor: Predictor) -> None:
    head, body = body_of(request_for(SERVERS[OURS], "raw", JPEG, predictor))
    assert head.startswith("POST /predict HTTP/1.1\r\n") and "Content-Type: image/jpeg" in head
    assert body == JPEG


def test_a_form_has_the_photo_as_its_only_file(predictor: Predictor) -> None:
    head, body = body_of(request_for(SERVERS[FASTAPI], "multipart", JPEG, predictor))
    form = BytesParser().parsebytes(head.partition("\r\n")[2].encode() + b"\r\n\r\n" + body)
    _, part = form.walk()  # the form itself comes first
    assert part.get_payload(decode=True) == JPEG
    assert part.get_param("name", header="content-disposition") == "file"


def test_a_tensor_has_the_pixels_that_the_model_takes(predictor: Predictor, tmp_path: Path) -> None:
    head, body = body_of(request_for(SERVERS[MLFLOW], "json", JPEG, predictor))
    assert head.startswith("POST /invocations ")
    with Image.open(io.BytesIO(JPEG)) as image:
        pixels = np.asarray(image).transpose(2, 0, 1)[None]
    assert np.array_equal(json.loads(body)["inputs"], pixels)
    head, body = body_of(request_for(SERVERS[OURS], "json", JPEG, predictor))
    assert head.startswith(f"POST /v2/models/{tmp_path.name}/infer ")
    (tensor,) = json.loads(body)["inputs"]
    assert np.array_equal(np.reshape(tensor["data"], tensor["shape"]), pixels)


@pytest.mark.parametrize(
    "answer",
    [
        {"top_k": [{"label": "owl", "probability": 0.7}, {"label": "cat", "probability": 0.2}]},
        {"predictions": {"logits": [[0.1, 0.2, 3.0]], "probabilities": [[0.2, 0.1, 0.7]]}},
        {
            "outputs": [
                {"name": "logits", "data": [0, 0, 3]},
                {"name": "probabilities", "shape": [1, 3], "data": [0.2, 0.1, 0.7]},
            ]
        },
        {"predictions": [{"label": "owl", "top_k": [{"label": "owl", "probability": 0.7}]}]},
    ],
)
def test_the_answer_is_found_in_each_contenders_own_words(answer: dict[str, object]) -> None:
    assert top_of(json.dumps(answer).encode(), CLASSES) == ("owl", 0.7)


def test_every_contender_is_started_with_the_model_and_the_port() -> None:
    for name in SERVERS:
        command = command_of(name, Path("/a folder/model.onnx"), 8123)
        assert "/a folder/model.onnx" in command and "8123" in command
        assert not {"MODEL", "PORT"} & set(command)


def test_a_core_is_taken_for_a_while() -> None:
    before = os.sched_getaffinity(0)
    with pinned(min(before)):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    missing = serving(FASTAPI, tmp_path / "model.onnx", 0, b"", tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"does not answer: .*model\.onnx"), missing:
        pass


LEAKY = """
import http.server, os, pathlib, subprocess, sys, time

pid_file = pathlib.Path(sys.argv[1])
deaf = "import os, pathlib, signal, sys, time; signal.signal(15, signal.SIG_IGN); "
deaf += "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(99)"
subprocess.Popen([sys.executable, "-c", deaf, str(pid_file)])
while not pid_file.exists() or not pid_file.read_text():
    time.sleep(0.01)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


def test_all_processes_of_a_server_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A parent that ends at SIGTERM and leaves a child behind, as LitServe does.
    program = tmp_path / "server.py"
    program.write_text(LEAKY)
    leaky = servers.Server("json", f"{program} MODEL PORT", {"raw": "/"})
    monkeypatch.setitem(SERVERS, "leaky", leaky)
    with serving("leaky", tmp_path / "pid", 0, b"GET / HTTP/1.1\r\n\r\n", tmp_path / "log") as server:
        child = int((tmp_path / "pid").read_text())
        # Two Pythons have started.
        assert 0.02 < server.cpu_seconds() < 10
        assert Path(f"/proc/{child}").exists()
    wait_until(lambda: has_ended(child), "the child's end", seconds=10)


def has_ended(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
