"""The Open Inference Protocol (KServe V2) over REST: metadata, and inference with tensors as JSON or as binary data.

https://github.com/kserve/open-inference-protocol, and Triton's extension for binary data: the JSON comes first, its length in
the header Inference-Header-Content-Length, and the bytes of the tensors follow it. A tensor holds preprocessed pixels.
"""

import itertools
import math
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from pipeline.serving.exchange import RefusedError, Request, Response
from pipeline.serving.served import Answers, ServedModel

PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(ready|infer))?")
LENGTH_HEADER = b"inference-header-content-length"
OUTPUTS = ("logits", "probabilities")
BINARY_TYPE = "application/octet-stream"
# Beside those of the tensor itself.
MAX_JSON_PARTS = 1_000


class Asked(NamedTuple):
    """What a path names: `action` is ready, infer or empty (metadata)."""

    name: str
    version: str
    action: str


@dataclass(frozen=True)
class Inference:
    """A request for inference: images uint8 (N, 3, H, W), the outputs that are wanted, and which of them as binary data."""

    images: npt.NDArray[np.uint8]
    request_id: str
    outputs: dict[str, bool]


def read_path(path: str) -> Asked | None:
    """What a path below /v2/models asks for; None if nothing that is known."""
    match = PATH.fullmatch(path)
    return Asked(urllib.parse.unquote(match[1]), urllib.parse.unquote(match[2] or ""), match[3] or "") if match else None


def require_model(path: str, model: ServedModel) -> None:
    """Refuse a path that names another model, or another version, than the one that is served."""
    asked = read_path(path)
    assert asked is not None
    if asked.name != model.name or asked.version not in ("", model.version):
        raise RefusedError(404, f"no model {asked.name[:100]} {asked.version[:100]}; this is {model.name} {model.version}.")


def server_metadata(version: str) -> dict[str, Any]:
    """What /v2 says."""
    return {"name": "shardline", "version": version, "extensions": ["binary_tensor_data"]}


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """What /v2/models/NAME says."""
    outputs = [
        {"name": item.name, "datatype": "FP32", "shape": [-1, *item.shape[1:]]}
        for item in model.predictor.session.get_outputs()
        if item.name in OUTPUTS
    ]
    inputs = [{"name": "image", "datatype": "UINT8", "shape": [-1, 3, *model.size]}]
    platform = "onnxruntime_onnx"
    return {"name": model.name, "versions": [model.version], "platform": platform, "inputs": inputs, "outputs": outputs}


def json_length(request: Request) -> int:
    """How many bytes of the body are JSON. Raises RefusedError for a header that cannot be true."""
    text = request.header(LENGTH_HEADER)
    if not text:
        return len(request.body)
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and int(text) <= len(request.body)):
        raise RefusedError(400, f"Inference-Header-Content-Length is '{text[:40]}', of a body of {len(request.body):,} bytes.")
    return int(text)


def require_modest(body: bytes | bytearray, num_json_bytes: int, size: tuple[int, int], max_images: int) -> None:
    """Refuse JSON that holds more lists, objects or strings than a request needs: a parser lets nobody else run meanwhile."""
    num_lists, num_objects, num_quotes = (body.count(sign, 0, num_json_bytes) for sign in (b"[", b"{", b'"'))
    wanted = max_images * (1 + 3 + 3 * size[0])  # images, their channels, and the rows of these
    if num_lists > wanted + MAX_JSON_PARTS or num_objects > MAX_JSON_PARTS or num_quotes > MAX_JSON_PARTS:
        raise RefusedError(400, "the JSON has more lists, objects or strings than a request for inference.")


def read_infer(body: bytes | bytearray, num_json_bytes: int, model: ServedModel) -> Inference:
    """Read a request for inference. Raises RefusedError."""
    content = memoryview(body)
    try:
        asked = orjson.loads(content[:num_json_bytes])
    except ValueError as error:  # also of what is nested too deeply, and of bytes that are not UTF-8
        raise RefusedError(400, f"the request is not JSON ({str(error)[:100]}).") from error
    if not isinstance(asked, dict):
        raise RefusedError(400, "the request is not a JSON object.")
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict) or inputs[0].get("name") != "image":
        raise RefusedError(400, "`inputs` must be a list of one tensor, `image`.")
    request_id = _given(asked, "id", "")
    if not isinstance(request_id, str) or len(request_id) > 1000:
        raise RefusedError(400, "`id` must be a string of at most 1,000 letters.")
    images = _read_tensor(inputs[0], content[num_json_bytes:], model)
    return Inference(images, request_id, _wanted_outputs(asked))


def _read_tensor(tensor: dict[str, Any], binary: memoryview, model: ServedModel) -> npt.NDArray[np.uint8]:
    """The pixels of the tensor `image`."""
    if tensor.get("datatype") != "UINT8":
        raise RefusedError(400, f"the datatype of `image` is {str(tensor.get('datatype'))[:40]}; it must be UINT8.")
    shape, (height, width) = tensor.get("shape"), model.size
    if (
        not isinstance(shape, list)
        or not all(type(axis) is int for axis in shape)
        or shape[1:] != [3, height, width]
        or not 0 < shape[0] < 2**31
    ):
        raise RefusedError(400, f"the shape of `image` is {str(shape)[:80]}; it must be [N, 3, {height}, {width}].")
    wanted = math.prod(shape)
    size = _parameters(tensor).get("binary_data_size")
    if size is not None:
        if type(size) is not int or size != len(binary) or size != wanted:
            raise RefusedError(
                400, f"`binary_data_size` is {str(size)[:40]}: {wanted:,} bytes make the shape, {len(binary):,} follow."
            )
        return np.frombuffer(binary, dtype=np.uint8).reshape(shape)
    if len(binary):
        raise RefusedError(400, "binary data follow the JSON, but `image` has no `binary_data_size`.")
    data = _flat(tensor.get("data"), shape)
    if len(data) != wanted:
        raise RefusedError(400, f"the data of `image` are {len(data):,} values; {wanted:,} make its shape.")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _flat(data: Any, shape: list[int]) -> bytes:
    """The values of a tensor in JSON: a list, or lists in lists as its shape has them.

    numpy would guess a type for them, and give each of a thousand short strings the room of one long one.
    """
    if isinstance(data, list) and data and isinstance(data[0], list):
        for length in shape[1:]:
            if not all(type(row) is list and len(row) == length for row in data):
                raise RefusedError(400, f"the data of `image` are not nested as its shape {shape} is.")
            data = list(itertools.chain.from_iterable(data))
    if not isinstance(data, list) or set(map(type, data)) != {int}:
        raise RefusedError(400, "the data of `image` are no list of integers, nor nested ones.")
    try:
        return bytes(data)
    except ValueError as error:
        raise RefusedError(400, "the data of `image` go beyond 0 to 255.") from error


def _given(value: dict[str, Any], name: str, default: Any) -> Any:
    """A member of a JSON object; many a client writes null for one that is missing."""
    found = value.get(name)
    return default if found is None else found


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    parameters = _given(value, "parameters", {})
    if not isinstance(parameters, dict):
        raise RefusedError(400, "`parameters` must be a JSON object.")
    return parameters


def _wanted_outputs(asked: dict[str, Any]) -> dict[str, bool]:
    """The outputs that are wanted, all by default, and whether as binary data."""
    default = _parameters(asked).get("binary_data_output", False)
    outputs = _given(asked, "outputs", [])
    if outputs == []:
        outputs = [{"name": name} for name in OUTPUTS]
    if not isinstance(outputs, list) or len(outputs) > len(OUTPUTS) or not all(isinstance(each, dict) for each in outputs):
        raise RefusedError(400, f"`outputs` must be a list of some of {', '.join(OUTPUTS)}.")
    wanted = {}
    for output in outputs:
        if output.get("name") not in OUTPUTS:
            raise RefusedError(400, f"no output {str(output.get('name'))[:40]}; there are {', '.join(OUTPUTS)}.")
        wanted[output["name"]] = _parameters(output).get("binary_data", default) is True
    return wanted


def infer_response(model: ServedModel, answers: Answers, asked: Inference) -> Response:
    """The outputs that were asked for, as they were asked for."""
    outputs, binary = [], []
    for name, as_binary in asked.outputs.items():
        values = answers.probabilities if name == "probabilities" else answers.logits
        output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        if as_binary:
            content = np.ascontiguousarray(values, dtype="<f4").tobytes()
            output["parameters"] = {"binary_data_size": len(content)}
            binary.append(content)
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    said: dict[str, Any] = {"model_name": model.name, "model_version": model.version, "outputs": outputs}
    if asked.request_id:
        said["id"] = asked.request_id
    head = orjson.dumps(said)
    if not binary:
        return Response(200, head)
    return Response(200, b"".join([head, *binary]), BINARY_TYPE, ((LENGTH_HEADER.decode(), str(len(head))),))
