"""`shardline serve` as a process: the answers of `predict`, to clients of every kind, through reloads, deaths and stops."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from pipeline.files import sha256_of, write_bytes, write_json
from pipeline.preprocess import decode_image, spec_from_dict
from tests import browser as parts
from tests.browser import Browser, browser
from tests.processes import children_of, shardline, wait_until
from tests.serving import Served, serving

EXPORT = Path("runs/digits/export")


@pytest.fixture(scope="module")
def photos(workspace: Path) -> dict[str, bytes]:
    """Images of the test shard, and one photo of another size."""
    with tarfile.open(workspace / "data/digits/test-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:12]
        found = {member.name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    content = io.BytesIO()
    Image.effect_noise((300, 200), 60).convert("RGB").save(content, "WEBP")
    return {**found, "noise.webp": content.getvalue()}


@pytest.fixture(scope="module")
def predicted(workspace: Path, chain: dict[str, str], photos: dict[str, bytes], tmp_path_factory: Any) -> dict[str, Any]:
    """What `shardline predict` says of each photo."""
    folder = tmp_path_factory.mktemp("photos")
    for name, content in photos.items():
        (folder / name).write_bytes(content)
    paths = [str(folder / name) for name in photos]
    done = shardline("predict", str(EXPORT / "model.onnx"), *paths, "--json", cwd=workspace)
    assert done.returncode == 0, done.stderr
    return {Path(row["image"]).name: row for row in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def server(workspace: Path, chain: dict[str, str], tmp_path_factory: Any) -> Iterator[Served]:
    """The digits' model, served."""
    with serving("runs/digits", cwd=workspace, log=tmp_path_factory.mktemp("serve") / "log") as served:
        yield served


@pytest.fixture
def model_dir(workspace: Path, chain: dict[str, str], tmp_path: Path) -> Path:
    """A copy of the export that a test may change."""
    return shutil.copytree(workspace / EXPORT, tmp_path / "runs/digits/export")


def other_model(model_dir: Path) -> tuple[bytes, str]:
    """Another file that gives the same answers, and its sha256."""
    model = onnx.load(model_dir / "model.onnx")
    model.producer_version += "+"
    path = model_dir / "other"
    path.write_bytes(model.SerializeToString())
    return path.read_bytes(), sha256_of(path)


def replace_model(model_dir: Path, content: bytes, sha256: str) -> None:
    """As an export does: the proof, then the model, each at once."""
    parity = json.loads((model_dir / "parity.json").read_text())
    write_json(model_dir / "parity.json", parity | {"sha256": sha256})
    write_bytes(model_dir / "model.onnx", content)


# ---- answers ----


def test_every_photo_gets_the_answer_of_predict(server: Served, photos: dict[str, bytes], predicted: dict[str, Any]) -> None:
    assert server.name == "digits"
    for name, content in photos.items():
        status, answer = server.post("/predict?probabilities=1", content)
        assert status == 200
        (found,) = answer["predictions"]
        assert found["label"] == predicted[name]["label"]
        # The same session and the same decoder; only the batch may differ.
        assert found["probabilities"] == pytest.approx(predicted[name]["probabilities"], rel=0, abs=1e-5)


def test_a_client_of_the_open_inference_protocol_gets_it_too(
    server: Served, workspace: Path, photos: dict[str, bytes], predicted: dict[str, Any]
) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    client = InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", server.version)
    assert not client.is_model_ready("cats")
    metadata = client.get_model_metadata("digits")
    assert (metadata["inputs"][0]["name"], metadata["inputs"][0]["datatype"]) == ("image", "UINT8")
    spec = spec_from_dict(server.get("/model")[1]["preprocess"])
    pixels = np.stack([decode_image(content, spec).transpose(2, 0, 1) for content in photos.values()])  # (N, 3, H, W)
    wanted = [list(predicted[name]["probabilities"].values()) for name in photos]
    for as_binary in (True, False):
        image = InferInput("image", list(pixels.shape), "UINT8")
        image.set_data_from_numpy(pixels, binary_data=as_binary)
        outputs = [InferRequestedOutput("probabilities", binary_data=as_binary)]
        answer = client.infer("digits", [image], outputs=outputs, request_id="seven")
        np.testing.assert_allclose(answer.as_numpy("probabilities"), wanted, rtol=0, atol=1e-5)  # as above
        assert answer.get_response()["id"] == "seven"
    assert client.infer("digits", [image]).as_numpy("logits").shape == (len(photos), 10)


def test_one_client_on_one_connection_waits_for_the_model_alone(server: Served, photos: dict[str, bytes]) -> None:
    """A server whose answers come in two packets makes each wait for a delayed acknowledgement: 40 ms."""
    content = next(iter(photos.values()))
    request = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(content)
    seconds = []
    with server.connect() as client:
        for _ in range(100):
            begun = time.perf_counter()
            client.sendall(request)  # in two parts, as many clients do
            client.sendall(content)
            assert client.recv(10_000).startswith(b"HTTP/1.1 200")
            seconds.append(time.perf_counter() - begun)
    assert np.median(seconds) < 0.02


# ---- hostile input ----


def test_nothing_that_a_client_sends_stops_the_server(server: Served, photos: dict[str, bytes]) -> None:
    photo = next(iter(photos.values()))
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG", optimize=True)
    statuses = {
        "bomb": server.post("/predict", bomb.getvalue())[0],
        "truncated": server.post("/predict", photo[: len(photo) // 2])[0],
        "pickle": server.post("/predict", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os")[0],
        "html": server.post("/predict", b"<html>", "text/html")[0],
        "empty": server.post("/predict", b"")[0],
        "json": server.post("/v2/models/digits/infer", b"[" * 100_000)[0],
    }
    assert statuses == {"bomb": 413, "truncated": 422, "pickle": 422, "html": 415, "empty": 400, "json": 400}
    with server.connect() as client:  # a body without end
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                client.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 4")
    for cut in (b"POST /pre", b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc"):
        with server.connect() as client:  # gone in the middle
            client.sendall(cut)
    with server.connect() as client:  # gone while waiting
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(photo) + photo)
    assert server.post("/predict", photo)[0] == 200
    figures = urllib.request.urlopen(f"{server.url}/metrics", timeout=60).read().decode()
    assert not re.search(r'status="5\d\d"', figures)
    assert "Traceback" not in server.log.read_text()


def test_a_slow_client_is_let_go(workspace: Path, chain: dict[str, str], tmp_path: Path) -> None:
    with serving("--timeout-seconds=0.5", cwd=workspace, log=tmp_path / "log") as server:
        for begun in (
            b"GET /hea",
            b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\nabc",
        ):
            with server.connect() as client:
                client.sendall(begun)
                assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
                while client.recv(1000):
                    pass


# ---- reloads ----


@contextlib.contextmanager
def asking(server: Served, photo: bytes) -> Iterator[list[tuple[int, str]]]:
    """Four clients that ask without a pause, and the status and version of every answer."""
    found, is_over = list[tuple[int, str]](), threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            status, answer = server.post("/predict", photo)
            found.append((status, answer["model"]["sha256"] if status == 200 else answer["error"]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_a_file_that_is_replaced_is_taken_without_losing_a_request(
    model_dir: Path, tmp_path: Path, photos: dict[str, bytes]
) -> None:
    photo = next(iter(photos.values()))
    old = sha256_of(model_dir / "model.onnx")
    content, new = other_model(model_dir)
    with serving("runs/digits", "--poll-seconds=0.1", cwd=tmp_path, log=tmp_path / "log") as server:
        with asking(server, photo) as found:
            wait_until(lambda: len(found) > 50, "answers")
            write_bytes(model_dir / "model.onnx", content)  # which the parity report does not prove
            wait_until(lambda: server.said("the new model is refused"), "the refusal")
            replace_model(model_dir, content, new)
            wait_until(lambda: server.said("has taken the place"), "the new model")
            so_far = len(found)
            wait_until(lambda: len(found) > so_far + 50, "answers")
        assert {status for status, _ in found} == {200}
        assert {sha256 for _, sha256 in found} == {old, new}
        assert found[0][1] == old
        assert found[-1][1] == new
        assert server.log.read_text().count("refused") == 1


def test_an_alias_that_moves_is_followed(model_dir: Path, workspace: Path, tmp_path: Path, photos: dict[str, bytes]) -> None:
    from mlflow import MlflowClient

    assert shardline("sync", "runs/digits", cwd=workspace).returncode == 0
    shutil.copyfile(workspace / "runs/mlflow.db", tmp_path / "runs/mlflow.db")
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db", f"sqlite:///{tmp_path}/runs/mlflow.db")
    first = client.get_model_version_by_alias("digits", "candidate")
    client.set_registered_model_alias("digits", "champion", first.version)
    with serving("models:/digits@champion", "--poll-seconds=0.5", cwd=tmp_path, log=tmp_path / "log") as server:
        assert (server.name, server.version) == ("digits", str(first.version))
        assert server.get("/model")[1]["proof"].startswith("top-1 agreement 1.0")
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "site-packages/torch/" not in maps
        assert "site-packages/pandas/" not in maps  # which MLflow brings
        folder = str(model_dir / "second")
        content, new = other_model(model_dir)
        Path(folder).mkdir()
        (Path(folder) / "model.onnx").write_bytes(content)
        proof = {"passed": True, "sha256": new, "top1_agreement": 1.0, "num_samples": 12}
        (Path(folder) / "parity.json").write_text(json.dumps(proof))
        with asking(server, next(iter(photos.values()))) as found:
            second = client.create_model_version("digits", folder, tags={"onnx_sha256": new})
            client.set_registered_model_alias("digits", "champion", second.version)
            wait_until(lambda: server.said(f"digits {second.version} has taken the place"), "the new version")
        assert {status for status, _ in found} == {200}
        assert server.get("/model")[1]["sha256"] == new
        liar = client.create_model_version("digits", folder, tags={"onnx_sha256": "0" * 64})
        client.set_registered_model_alias("digits", "champion", liar.version)
        wait_until(lambda: server.said("of the sha256 that it names"), "the refusal")
        assert server.get("/model")[1]["version"] == str(second.version)
        child = children_of(server.process.pid)
        assert server.stop() == 0
    assert not [pid for pid in child if Path(f"/proc/{pid}").exists()]


# ---- stops, workers ----


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_answers_what_was_sent_and_takes_nothing_more(
    workspace: Path, chain: dict[str, str], tmp_path: Path, photos: dict[str, bytes], workers: int
) -> None:
    photo = next(iter(photos.values()))
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(photo)
    with serving(f"--workers={workers}", cwd=workspace, log=tmp_path / "log") as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(20)]
        for client in clients[:10]:
            client.sendall(head + photo[:100])  # the rest comes after the signal
        for client in clients[10:]:
            client.sendall(head + photo)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        for client in clients[:10]:
            client.sendall(photo[100:])
        for client in clients:
            answer = b""
            while part := client.recv(10_000):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b'"label"' in answer
        assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_it_at_once(workspace: Path, chain: dict[str, str], tmp_path: Path, workers: int) -> None:
    settings = (f"--workers={workers}", "--timeout-seconds=60")
    with serving(*settings, cwd=workspace, log=tmp_path / "log") as server, server.connect() as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert server.process.poll() is None, "it should still wait for the body"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 1


def test_workers_that_die_are_replaced_and_end_with_the_server(
    workspace: Path, chain: dict[str, str], tmp_path: Path, photos: dict[str, bytes]
) -> None:
    photo = next(iter(photos.values()))

    def figure(server: Served, name: str) -> float:
        text = urllib.request.urlopen(f"{server.url}/metrics", timeout=60).read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    with serving("--workers=2", cwd=workspace, log=tmp_path / "log") as server:
        first, second = children_of(server.process.pid)
        for _ in range(40):
            assert server.post("/predict", photo)[0] == 200
        assert figure(server, 'shardline_requests_total{route="predict",status="200"}') == 40
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: server.said("another takes its place"), "a replacement")
        wait_until(lambda: figure(server, "shardline_ready_workers") == 2, "its readiness")
        assert figure(server, 'shardline_requests_total{route="predict",status="200"}') == 40
        assert server.post("/predict", photo)[0] == 200
        children = children_of(server.process.pid)
        assert second in children
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(_is_alive(pid) for pid in children), "the end of the workers", seconds=30)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_a_bad_model_or_a_taken_port_is_one_line_and_exit_2(
    workspace: Path, chain: dict[str, str], server: Served, model_dir: Path, tmp_path: Path
) -> None:
    port = server.url.rsplit(":", 1)[1]
    taken = shardline("serve", f"--port={port}", cwd=workspace)
    (model_dir / "model.onnx").write_bytes(b"no model")
    for workers in (1, 2):
        done = shardline("serve", str(model_dir), "--port=0", f"--workers={workers}", cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "cannot be loaded as an ONNX model" in done.stderr
    assert (taken.returncode, len(taken.stderr.splitlines())) == (2, 1)
    assert f"cannot listen on 127.0.0.1:{port}" in taken.stderr


def test_serving_needs_neither_torch_nor_mlflow() -> None:
    script = "import sys, pipeline.serving.supervisor; print({'torch', 'lightning', 'mlflow', 'onnx'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60).strip() == "set()"


# ---- pages ----


@pytest.fixture(scope="module")
def opened(server: Served, tmp_path_factory: Any) -> Iterator[Browser]:
    """A browser; no page may ask for anything outside this machine, or fail."""
    if parts.missing_parts():
        pytest.skip(f"a browser test needs {parts.missing_parts()}")
    with browser(tmp_path_factory.mktemp("screenshots")) as started:
        yield started
        assert started.outside == []
        assert started.errors == []


def test_a_person_drops_photos_and_sees_the_answers(
    opened: Browser, server: Served, photos: dict[str, bytes], predicted: dict[str, Any], tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    page = opened.open(f"{server.url}/")
    expect(page.get_by_text("tells 10 classes apart: 0, 1, 2")).to_be_visible()
    names = list(photos)[:3]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    files: list[Any] = [{"name": name, "mimeType": "image/jpeg", "buffer": photos[name]} for name in names]
    page.set_input_files("#files", [*files, {"name": "<b>notes</b>.txt", "mimeType": "text/plain", "buffer": b"no photo"}])
    for name in names:
        answer = page.locator(".answer", has_text=name)
        expect(answer.get_by_role("heading")).to_have_text(predicted[name]["label"])
        expect(answer.locator(".row")).to_have_count(5)
        expect(answer.locator("img")).not_to_have_js_property("naturalWidth", 0)
    failed = page.locator(".failed")
    expect(failed.get_by_role("heading")).to_have_text("This file cannot be decoded (cannot identify image file).")
    expect(failed.locator(".file")).to_have_text("<b>notes</b>.txt")
    opened.keep("upload")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    opened.keep("upload-phone")
    page.set_viewport_size({"width": 1500, "height": 950})


def test_the_description_can_be_read_without_a_network(opened: Browser, server: Served) -> None:
    from playwright.sync_api import expect

    page = opened.open(f"{server.url}/docs")
    routes = page.locator("details")
    expect(routes).to_have_count(sum(map(len, server.get("/openapi.json")[1]["paths"].values())))
    routes.first.locator("summary").click()
    expect(routes.first.get_by_text(f"curl -F a=@first.jpg -F b=@second.png {server.url}/predict")).to_be_visible()
    opened.keep("docs")


def test_a_page_may_load_nothing_from_elsewhere(opened: Browser, server: Served) -> None:
    page = opened.open(f"{server.url}/")
    asked: Callable[[str], Any] = page.evaluate
    assert asked("fetch('http://127.0.0.1:9/').then(() => 'loaded', error => 'refused')") == "refused"
    violations = asked(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', event => done(event.violatedDirective));"
        " const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; })"
    )
    assert violations == "img-src"
