"""The Open Inference Protocol, as JSON and as binary data."""

import json
import re
from typing import Any

import numpy as np
import pytest

from pipeline.serving import v2
from pipeline.serving.served import ServedModel
from tests.unit.serving.asking import answer_of, ask, feed, request
from tests.unit.serving.conftest import Server

PATH = "/v2/models/colours/infer"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)


def inference(images: Any = IMAGES, **changes: Any) -> dict[str, Any]:
    """A request for inference as JSON, some of its fields changed."""
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(np.shape(images)), "data": np.ravel(images).tolist()}
    tensor |= {name: value for name, value in changes.items() if name in ("datatype", "shape", "data", "parameters")}
    return {"inputs": [tensor]} | {name: value for name, value in changes.items() if name in ("id", "outputs", "inputs")}


def as_json(asked: Any) -> bytes:
    return request(PATH, json.dumps(asked).encode(), kind="application/json")


def expected(served: ServedModel) -> dict[str, Any]:
    answers = served.answer(IMAGES)
    return {"logits": answers.logits, "probabilities": answers.probabilities}


@pytest.mark.parametrize("data", [IMAGES.ravel().tolist(), IMAGES.tolist()])
def test_tensors_as_json_flat_or_nested_are_answered_as_json(server: Server, served: ServedModel, data: Any) -> None:
    status, answer = ask(server, as_json(inference(data=data, id="a7")))
    assert (status, answer["model_name"], answer["model_version"], answer["id"]) == (200, "colours", "7", "a7")
    for output in answer["outputs"]:
        assert (output["datatype"], output["shape"]) == ("FP32", [2, 3])
        wanted = expected(served)[output["name"]]
        # The same session, perhaps with another batch size: float32 rounding.
        np.testing.assert_allclose(np.reshape(output["data"], (2, 3)), wanted, rtol=1e-5, atol=1e-6)
    assert [output["name"] for output in answer["outputs"]] == ["logits", "probabilities"]


def test_tensors_as_bytes_are_answered_as_bytes(server: Server, served: ServedModel) -> None:
    asked = inference(parameters={"binary_data_size": IMAGES.size})
    del asked["inputs"][0]["data"]
    asked["outputs"] = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    head = json.dumps(asked).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    connection, wire = server.connect()
    feed(server, connection, request(PATH, head + IMAGES.tobytes(), kind="application/octet-stream", headers=length))
    status, headers, body = answer_of(wire)
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    size = int(headers["inference-header-content-length"])
    (output,) = json.loads(body[:size])["outputs"]
    assert output["parameters"] == {"binary_data_size": 2 * 3 * 4}
    found = np.frombuffer(body[size:], dtype="<f4").reshape(2, 3)
    np.testing.assert_allclose(found, expected(served)["probabilities"], rtol=1e-5, atol=1e-6)  # as above


def test_a_large_request_is_read_beside_the_event_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serving.app.SMALL_JSON_BYTES", 10)
    assert ask(server, as_json(inference()))[0] == 200
    assert ask(server, request(PATH, b"[" * 50_000, kind="application/json"))[0] == 400


def test_pixels_for_a_model_that_was_replaced_while_they_were_read_are_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.serving.app.SMALL_JSON_BYTES", 10)
    read_infer = v2.read_infer

    def read_and_replace(*arguments: Any) -> v2.Inference:
        found = read_infer(*arguments)
        monkeypatch.setattr(ServedModel, "size", (8, 8))
        return found

    monkeypatch.setattr(v2, "read_infer", read_and_replace)
    status, answer = ask(server, as_json(inference()))
    assert (status, answer["error"]) == (422, "the model was just replaced by one that takes 8 x 8 pixels.")


def test_null_is_a_member_that_is_not_there(server: Server) -> None:
    asked = inference(parameters=None) | {"id": None, "parameters": None, "outputs": None}
    status, answer = ask(server, as_json(asked))
    assert status == 200
    assert "id" not in answer
    assert [output["name"] for output in answer["outputs"]] == ["logits", "probabilities"]


@pytest.mark.parametrize("crumb", ["[]", "{}", '"a"'])
def test_json_that_holds_the_parser_up_is_not_parsed(server: Server, crumb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2, "read_infer", None)
    body = f'{{"inputs": [{",".join([crumb] * 24_000)}]}}'.encode()
    status, answer = ask(server, request("/v2/models/colours/infer", body, kind="application/json"))
    assert (status, answer["error"][:18]) == (400, "the JSON has more ")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([], "is not a JSON object"),
        ({}, "`inputs` must be"),
        ({"inputs": {}}, "`inputs` must be"),
        ({"inputs": [1]}, "`inputs` must be"),
        (inference(inputs=[{"name": "other"}]), "`inputs` must be"),
        (inference(datatype="FP32"), "must be UINT8"),
        (inference(datatype=["UINT8"]), "must be UINT8"),
        (inference(shape=[2, 3, 16]), "shape of `image`"),
        (inference(shape=[-2, 3, 16, 16]), "shape of `image`"),
        (inference(shape=[0, 3, 16, 16]), "shape of `image`"),
        (inference(shape=[10**30, 3, 16, 16]), "shape of `image`"),
        (inference(shape=[2.0, 3, 16, 16]), "shape of `image`"),
        (inference(shape=[True, 3, 16, 16]), "shape of `image`"),
        (inference(shape="2,3,16,16"), "shape of `image`"),
        (inference(shape=[]), "shape of `image`"),
        (inference(shape=[3, 3, 16, 16]), "2,304 make its shape"),
        (inference(data=None), "no list of integers"),
        (inference(data=[]), "no list of integers"),
        (inference(data=[[1, 2], 3]), "not nested as its shape"),
        (inference(data=IMAGES.transpose(0, 2, 3, 1).tolist()), "not nested as its shape"),
        (inference(data=[IMAGES[0].ravel().tolist(), IMAGES[1].ravel().tolist()]), "not nested as its shape"),
        (inference(data=[[1, 2], IMAGES.ravel().tolist()[2:]]), "not nested as its shape"),
        (inference(data=[[[[[1]]]]]), "not nested as its shape"),
        (inference(data=[256] * IMAGES.size), "beyond 0 to 255"),
        (inference(data=[-1] * IMAGES.size), "beyond 0 to 255"),
        (inference(data=[10**30] * IMAGES.size), "no list of integers"),
        (inference(data=[1.5] * IMAGES.size), "no list of integers"),
        (inference(data=[True] * IMAGES.size), "no list of integers"),
        (inference(data=["1"] * IMAGES.size), "no list of integers"),
        (inference(data=[float("nan")] * IMAGES.size), "is not JSON"),
        (inference(parameters=[]), "`parameters`"),
        (inference(parameters={"binary_data_size": IMAGES.size}), "`binary_data_size` is 1536"),
        (inference(id=7), "`id`"),
        (inference(outputs=[{"name": "classes"}]), "no output classes"),
        (inference(outputs="logits"), "`outputs` must be"),
        (inference(outputs={}), "`outputs` must be"),
        (inference(outputs=0), "`outputs` must be"),
        (inference(id="x" * 1001), "at most 1,000 letters"),
        (inference(outputs=[{"name": "logits", "parameters": 3}]), "`parameters`"),
    ],
)
def test_what_is_no_inference_is_refused_with_a_reason(server: Server, asked: Any, words: str) -> None:
    status, answer = ask(server, as_json(asked))
    assert status == 400
    assert re.search(words, answer["error"]), answer


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe{}", b"[" * 90_000, b'{"inputs": ' + b"9" * 5000 + b"}", b"NaN"])
def test_what_is_no_json_is_refused(server: Server, body: bytes) -> None:
    assert ask(server, request(PATH, body, kind="application/json"))[0] == 400


@pytest.mark.parametrize("length", ["abc", "-1", "99999", "1e2", "9" * 30, "٣"])
def test_a_length_of_the_json_that_cannot_be_is_refused(server: Server, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    assert ask(server, request(PATH, b"{}", headers=headers))[0] == 400


def test_too_many_images_are_refused(server: Server) -> None:
    assert ask(server, as_json(inference(np.zeros((6, 3, 16, 16), np.uint8))))[0] == 413


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2", 200),
        ("/v2/health/live", 200),
        ("/v2/health/ready", 200),
        ("/v2/models/colours", 200),
        ("/v2/models/colours/versions/7", 200),
        ("/v2/models/colours/ready", 200),
        ("/v2/models/colours/versions/7/ready", 200),
        ("/v2/models/colours/versions/8", 404),
        ("/v2/models/colours/versions/8/ready", 404),
        ("/v2/models/others", 404),
        ("/v2/models/others/ready", 404),
        ("/v2/models/colours/unload", 404),
        ("/v2/models/", 404),
        ("/v2/models/%00%ff", 404),
    ],
)
def test_metadata_and_readiness_are_of_this_model_alone(server: Server, path: str, status: int) -> None:
    assert ask(server, request(path, method="GET"))[0] == status


def test_the_metadata_name_the_tensors(server: Server) -> None:
    _, answer = ask(server, request("/v2/models/colours", method="GET"))
    assert answer["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 3, 16, 16]}]
    assert [(output["name"], output["shape"]) for output in answer["outputs"]] == [
        ("logits", [-1, 3]),
        ("probabilities", [-1, 3]),
    ]
    assert ask(server, request("/v2/models/others/infer", b"{}", kind="application/json"))[0] == 404
