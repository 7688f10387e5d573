"""What the routes answer: the same as the trained model says, or why not."""

import json
import re
from typing import Any

import numpy as np
import pytest

import pipeline.serving.app as module
from pipeline.preprocess import decode_image
from pipeline.serving.pages import STATIC, page
from pipeline.serving.served import ServedModel
from tests.unit.serving.asking import answer_of, ask, feed, form_of, image_of, noise, request
from tests.unit.serving.conftest import SETTINGS, Server

FORM = "multipart/form-data; boundary=b0undary"


def probabilities_of(served: ServedModel, encoded: bytes) -> dict[str, float]:
    """What the model says of an image that is asked about alone."""
    pixels = decode_image(encoded, served.predictor.spec).transpose(2, 0, 1)[np.newaxis]  # (1, 3, H, W)
    row = served.answer(np.ascontiguousarray(pixels)).probabilities[0]
    return dict(zip(served.class_names, row.tolist(), strict=True))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_image_is_answered_as_the_model_alone_would(server: Server, served: ServedModel, form: str) -> None:
    status, answer = ask(server, request("/predict?top_k=2&probabilities=1", encoded := noise(3, form=form)))
    assert status == 200
    assert answer["model"] == {"name": "colours", "version": "7", "sha256": served.sha256}
    (found,) = answer["predictions"]
    wanted = probabilities_of(served, encoded)
    assert found["probabilities"] == pytest.approx(wanted, rel=0, abs=1e-6)
    ranked = sorted(wanted, key=lambda name: -wanted[name])
    assert [entry["label"] for entry in found["top_k"]] == ranked[:2]
    assert (found["label"], found["probability"]) == (ranked[0], found["top_k"][0]["probability"])
    assert "labels" not in found


def test_several_files_are_answered_in_their_order(server: Server, served: ServedModel) -> None:
    files = {f"{number}.png": noise(number) for number in range(5)}
    status, answer = ask(server, request("/predict?probabilities=true", form_of(files), kind=FORM))
    assert status == 200
    for found, encoded in zip(answer["predictions"], files.values(), strict=True):
        assert found["probabilities"] == pytest.approx(probabilities_of(served, encoded), rel=0, abs=1e-5)  # batches of 4 and 1


def test_one_bad_file_refuses_its_request_by_name_and_no_other(server: Server) -> None:
    connection, wire = server.connect()
    good, bad = {"good.png": image_of()}, {"good.png": image_of(), "bad.png": image_of()[:-30]}
    for files in (good, bad, good):
        feed(server, connection, request("/predict", form_of(files), kind=FORM))
    _, _, answer = answer_of(wire, 2)
    answer_of(wire, 3)
    assert wire.statuses == [200, 422, 200]
    assert answer["error"].startswith("bad.png: cannot be decoded (")


def test_pixels_are_answered_as_their_image(server: Server, served: ServedModel) -> None:
    encoded = [noise(number) for number in range(5)]
    pixels = np.stack([decode_image(each, served.predictor.spec).transpose(2, 0, 1) for each in encoded])  # (5, 3, H, W)
    content = request("/predict/tensor?probabilities=1", pixels.tobytes(), kind="application/octet-stream")
    status, answer = ask(server, content)
    assert status == 200
    for found, each in zip(answer["predictions"], encoded, strict=True):
        assert found["probabilities"] == pytest.approx(probabilities_of(served, each), rel=0, abs=1e-5)  # as above


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (request("/predict", b""), 400, "the body is empty"),
        (request("/predict", b"<html>", kind="text/html"), 415, "'text/html' is not taken"),
        (request("/predict", image_of(), kind=""), 415, "'' is not taken"),
        (request("/predict", b"<html></html>"), 422, "image: cannot be decoded"),
        (request("/predict", image_of()[:40]), 422, "image: cannot be decoded"),
        (request("/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 422, "cannot be decoded"),
        (request("/predict", image_of(size=(2000, 1001))), 413, "2000 x 1001 pixels are more than 2,000,000"),
        (request("/predict", image_of(), headers={"Content-Encoding": "gzip"}), 415, "Content-Encoding gzip"),
        (request("/predict", form_of({}), kind=FORM), 400, "the form"),
        (request("/predict", form_of(dict.fromkeys("abcdef", image_of())), kind=FORM), 413, "5 images"),
        (request("/predict?top_k=0", image_of()), 400, "`top_k` is '0'"),
        (request("/predict?top_k=x", image_of()), 400, "`top_k` is 'x'"),
        (request("/predict?top_k=99999999999", image_of()), 400, "`top_k`"),
        (request("/predict?probabilities=2", image_of()), 400, "`probabilities` is '2'"),
        (request("/predict?topk=2", image_of()), 400, "no parameter 'topk'. Did you mean 'top_k'?"),
        (request("/predict?" + "&".join(20 * ["top_k=1"]), image_of()), 400, "the query cannot be read"),
        (request("/predikt", b""), 404, "no route /predikt. Did you mean '/predict'?"),
        (request("/health", b""), 405, "/health takes GET"),
        (request("/predict", method="DELETE"), 405, "/predict takes POST"),
        (request("/predict/tensor", b"x" * 767, kind="application/octet-stream"), 400, "768 each"),
        (request("/predict/tensor", b"", kind="application/octet-stream"), 400, "768 each"),
        (request("/predict/tensor", b"x" * 768 * 6, kind="application/octet-stream"), 413, "5 images, not 6"),
        (request("/predict/tensor", b"x" * 768, kind="image/png"), 415, "send application/octet-stream"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(server: Server, content: bytes, status: int, words: str) -> None:
    found, answer = ask(server, content)
    assert (found, list(answer)) == (status, ["error"])
    assert words in answer["error"]
    assert "\n" not in answer["error"]


def test_top_k_is_the_settings_unless_the_request_says_otherwise(server: Server) -> None:
    for query, number in (("", SETTINGS.top_k), ("?top_k=1", 1), ("?top_k=1000", 3)):
        assert len(ask(server, request(f"/predict{query}", image_of()))[1]["predictions"][0]["top_k"]) == number


def test_before_the_model_is_loaded_and_while_draining_the_server_is_alive_but_not_ready(server: Server) -> None:
    model, server.batcher.model = server.batcher.model, None
    for path in ("/ready", "/v2/health/ready", "/v2/models/colours/ready"):
        assert ask(server, request(path, method="GET")) == (503, {"ready": False, "state": "loading"})
    assert ask(server, request("/health", method="GET"))[0] == 200
    assert ask(server, request("/predict", image_of())) == (503, {"error": "the model is not loaded yet."})
    assert ask(server, request("/metrics", method="GET"))[0] == 200
    server.batcher.model = model
    assert ask(server, request("/ready", method="GET")) == (200, {"ready": True, "state": "ready"})
    server.app.is_draining = True
    assert ask(server, request("/ready", method="GET")) == (503, {"ready": False, "state": "draining"})


def test_the_model_tells_where_it_comes_from(server: Server, served: ServedModel) -> None:
    _, answer = ask(server, request("/model", method="GET"))
    assert (answer["name"], answer["class_names"], answer["task"]) == ("colours", ["blue", "green", "red"], "single")
    assert answer["input"] == {"name": "image", "datatype": "UINT8", "shape": [-1, 3, 16, 16]}
    assert answer["lineage"]["data_digest"] == "d" * 64
    assert answer["sha256"] == served.sha256


def test_a_mistake_of_the_server_is_a_500_for_that_request_and_a_traceback_in_its_log(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "read_form", fail)
    status, answer = ask(server, request("/predict", form_of({"a": b"x"}), kind=FORM))
    assert (status, list(answer)) == (500, ["error"])
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert ask(server, request("/predict", image_of()))[0] == 200


def test_an_access_log_is_a_line_of_json_for_each_request(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(server, request("/health", method="GET"))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(server.app, "settings", type(SETTINGS)(access_log=True))
    ask(server, request("/health?x=1", method="GET"))
    line = json.loads(capsys.readouterr().out)
    assert (line["method"], line["path"], line["status"]) == ("GET", "/health", 200)


# ---- pages ----


def test_the_description_names_every_route_and_no_other(server: Server) -> None:
    api = json.loads((STATIC / "openapi.json").read_text())
    described = {(path, method.upper()) for path, methods in api["paths"].items() for method in methods}
    own = {(path, route.method) for path, route in server.app.routes.items() if path != "/favicon.ico"}
    assert {each for each in described if not each[0].startswith("/v2/models/")} == own
    for path, method in described:
        concrete = path.replace("{name}", "colours").replace("{version}", "7")
        content = request(concrete, b"{}" if method == "POST" else b"", method=method, kind="application/json")
        assert ask(server, content)[0] not in (404, 405, 500), path


def test_every_status_that_a_route_may_answer_with_is_described() -> None:
    api = json.loads((STATIC / "openapi.json").read_text())
    for path in ("/predict", "/predict/tensor"):
        assert set(api["paths"][path]["post"]["responses"]) >= {"200", "400", "408", "413", "415", "429", "503"}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', (STATIC / "openapi.json").read_text()))
    assert references == set(api["components"]["schemas"])


@pytest.mark.parametrize("name", ["upload.html", "docs.html"])
def test_a_page_refers_to_nothing_elsewhere_and_may_load_nothing(name: str) -> None:
    answer = page(name)
    assert dict(answer.headers)["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(rb"https?://|//cdn|@import|url\(", answer.body)
