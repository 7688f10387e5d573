"""What a server must survive: requests that mean no good, and what may be answered to each. Never a 5xx, never silence."""

import asyncio
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.bench.load import Connection
from pipeline.bench.servers import post

Outcome = int | str  # a status, or `closed`, `hangs`, `smuggled`
MISTAKES = frozenset(range(400, 500))
TOO_LARGE = frozenset({413})
# A connection that is no HTTP, or stays silent, may also be closed without a word.
OR_CLOSED: frozenset[Outcome] = frozenset({"closed", *MISTAKES})
CHUNK = 65_536


@dataclass(frozen=True)
class Attack:
    """One way to ask badly, on a connection of its own."""

    name: str
    run: Callable[[int, float], Awaitable[Outcome]]  # port, seconds after which silence is a failure
    allowed: frozenset[Outcome]
    is_slow: bool = False


def attacks(model: str, jpeg: bytes, side: int) -> list[Attack]:
    """All of them, against a model's name that takes images of `side` pixels; `jpeg` is one that it answers."""
    return [*_images(jpeg), *_forms(jpeg), *_tensors(model, side), *_protocol(jpeg), *_slow(jpeg), *_large()]


def _once(name: str, content: bytes, allowed: frozenset[Outcome] | set[int] = MISTAKES) -> Attack:
    """Send all at once, and expect one answer and no second one."""

    async def run(port: int, patience: float) -> Outcome:
        connection = await Connection.open(port)
        try:
            connection.send(content)
            outcome = await outcome_of(connection, patience)
            if isinstance(outcome, int):
                try:
                    async with asyncio.timeout(0.05):
                        await connection.answer()
                    return "smuggled"
                except (TimeoutError, ConnectionError):
                    pass
            return outcome
        finally:
            connection.close()

    return Attack(name, run, frozenset(allowed))


async def outcome_of(connection: Connection, patience: float) -> Outcome:
    """Status of the next answer, or what came instead."""
    try:
        async with asyncio.timeout(patience):
            return (await connection.answer()).status
    except TimeoutError:
        return "hangs"
    except ConnectionError:
        return "closed"


# ---- images that are none ----


def _images(jpeg: bytes) -> list[Attack]:
    bodies = {
        "empty body": b"",
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "PNG bomb": png(20_000, 20_000, zlib.compress(bytes(20_001 * 20_000 // 8), 9)),
        "JPEG that claims 65,500 pixels a side": with_size(jpeg, 65_500, 65_500),
        "PNG of no size": png(0, 0, zlib.compress(b"\0")),
        "PNG with a text bomb": png(1, 1, zlib.compress(b"\0\0"), b"zTXt" + b"a\0\0" + zlib.compress(bytes(10**8), 9)),
        "PNG that ends early": png(64, 64, zlib.compress(bytes(50))),
        "HTML": b"<!doctype html><title>photo</title>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch x) system\n",
        "pickle": pickle.dumps(os.getcwd),
        "zip": zipped(jpeg),
        "address of another server": b"http://169.254.169.254/latest/meta-data/",
        "noise": np.random.default_rng(0).bytes(5_000),
        "JPEG of 20,000 scans": many_scans(20_000),
        "TIFF with a tile of 2 GB": huge_tile(26_000),
        "TIFF that is not a number": encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"),
    }
    found = [_once(name, post("/predict", "image/jpeg", body)) for name, body in bodies.items()]
    return [
        *found,
        _once("pickle as octets", post("/predict", "application/octet-stream", bodies["pickle"])),
        _once("HTML as such", post("/predict", "text/html", bodies["HTML"])),
        _once("JSON instead of an image", post("/predict", "application/json", b'{"url": "file:///etc/passwd"}')),
        _once("gzipped body", post("/predict", "image/jpeg\r\nContent-Encoding: gzip", jpeg)),
        *(_once(f"query {query[:20]}", post(f"/predict?{query}", "image/jpeg", jpeg)) for query in BAD_QUERIES),
    ]


BAD_QUERIES = ("top_k=abc", "top_k=-1", "top_k=0", f"top_k={'9' * 400}", "top_k=1e3", "top_k=%ff%00", "probabilities=maybe")


def png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    """A PNG of 1 bit grey with the size that its header claims."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [header, *([extra] if extra else []), b"IDAT" + data, b"IEND"]
    body = b"".join(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def many_scans(number: int) -> bytes:
    """A progressive JPEG that passes over its pixels again and again."""
    jpeg = encoded(Image.new("L", (999, 999)), "JPEG", progressive=True)
    begin = jpeg.rindex(b"\xff\xda")
    return jpeg[:begin] + jpeg[begin:-2] * number + b"\xff\xd9"


def huge_tile(side: int) -> bytes:
    """A TIFF of 64 x 64 pixels in one deflated tile of `side` x `side`."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(3 * side)) for _ in range(side)) + packer.flush()
    longs = {256: 64, 257: 64, 322: side, 323: side, 324: 200, 325: len(data)}
    entries = {
        **{tag: (4, value) for tag, value in longs.items()},
        **dict.fromkeys((258, 259), (3, 8)),
        262: (3, 2),
        277: (3, 3),
    }
    ifd = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(entries.items()))
    return (b"II*\0" + struct.pack("<IH", 8, len(entries)) + ifd).ljust(200, b"\0") + data


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def zipped(content: bytes) -> bytes:
    """An archive with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.jpg", content)
    return buffer.getvalue()


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# ---- forms ----


def _forms(jpeg: bytes) -> list[Attack]:
    whole = part(jpeg) + b"--b--\r\n"
    bodies = {
        "no parts": b"--b--\r\n",
        "no end": part(jpeg),
        "cut within a part's header": part(jpeg)[:30],
        "another boundary": whole.replace(b"--b", b"--c"),
        "10,000 parts": part(b"x") * 10_000 + b"--b--\r\n",
        "a part's header of 1 MB": b"--b\r\nContent-Disposition: form-data; name="
        + b"a" * 1_000_000
        + b"\r\n\r\nx\r\n--b--\r\n",
        "10,000 headers of a part": b"--b\r\n" + b"A: b\r\n" * 10_000 + b"\r\nx\r\n--b--\r\n",
        "one good and one bad file": part(jpeg) + part(b"no image") + b"--b--\r\n",
        "a thousand empty files": part(b"") * 1_000 + b"--b--\r\n",
        "only a text field": b'--b\r\nContent-Disposition: form-data; name="url"\r\n\r\nhttp://localhost/\r\n--b--\r\n',
    }
    found = [_once(f"form: {name}", post("/predict", "multipart/form-data; boundary=b", body)) for name, body in bodies.items()]
    kinds = {
        "no boundary": "multipart/form-data",
        "an empty boundary": "multipart/form-data; boundary=",
        "a boundary of 10,000 letters": f"multipart/form-data; boundary={'b' * 10_000}",
        "a boundary that is no text": "multipart/form-data; boundary=\xff\xfe",
        "mixed": "multipart/mixed; boundary=b",
    }
    return [*found, *(_once(f"form: {name}", post("/predict", kind, whole)) for name, kind in kinds.items())]


def part(content: bytes, name: str = "file") -> bytes:
    """One file of a form whose boundary is `b`."""
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="photo.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return head.encode() + content + b"\r\n"


# ---- tensors ----


def _tensors(model: str, side: int) -> list[Attack]:
    size = 3 * side * side
    good = {"name": "image", "datatype": "UINT8", "shape": [1, 3, side, side], "data": [7] * size}

    def changed(**values: object) -> bytes:
        return json.dumps({"inputs": [{**good, **values}]}).encode()

    url = f"/v2/models/{model}/infer"
    bodies = {
        "NaN": changed(data=[float("nan")] * size),
        "Infinity": changed(data=[float("inf")] * size),
        "negative pixels": changed(data=[-1] * size),
        "pixels above 255": changed(data=[256] * size),
        "huge integers": changed(data=[10**30] * size),
        "an integer of 5,000 digits": changed().replace(b"[7, 7,", b"[" + b"9" * 5_000 + b", 7,"),
        "fractions": changed(data=[0.5] * size),
        "text": changed(data=["7"] * size),
        "null": changed(data=None),
        "an object": changed(data={"0": 7}),
        "too few": changed(data=[7] * (size - 1)),
        "too many": changed(data=[7] * (size + 1)),
        "FP32": changed(datatype="FP32"),
        "BYTES": changed(datatype="BYTES"),
        "no type": changed(datatype=None),
        "another shape": changed(shape=[1, side, side, 3]),
        "a negative dimension": changed(shape=[-1, 3, side, side]),
        "two negative dimensions": changed(shape=[-1, -3, side, side]),
        "a huge dimension": changed(shape=[2**62, 3, side, side]),
        "dimensions that overflow": changed(shape=[2**63, 2**63, 2**63, 2**63]),
        "no dimensions": changed(shape=[]),
        "a dimension that is true": changed(shape=[True, 3, side, side]),
        "fractional dimensions": changed(shape=[1.0, 3.0, side, side]),
        "no image": changed(shape=[0, 3, side, side], data=[]),
        "another name": changed(name="picture"),
        "the input twice": json.dumps({"inputs": [good, good]}).encode(),
        "no inputs": b'{"inputs": []}',
        "inputs that are a number": b'{"inputs": 7}',
        "an input that is a list": b'{"inputs": [[]]}',
        "an unknown output": json.dumps({"inputs": [good], "outputs": [{"name": "secrets"}]}).encode(),
        "outputs that are text": json.dumps({"inputs": [good], "outputs": "all"}).encode(),
        "parameters that are a list": changed(parameters=[1]),
        "shared memory": changed(parameters={"shared_memory_region": "x", "shared_memory_byte_size": size}, data=[]),
        "a list": b"[]",
        "nothing": b"",
        "no JSON": b"{",
        "no UTF-8": b'{"inputs": "\xff"}',
        "a lone surrogate": rb'{"inputs": [{"name": "\ud800"}], "id": "\ud800"}',
        "300,000 lists": changed(data=[]).replace(b'"data": []', b'"data": [' + b"[]," * 300_000 + b"[]]"),
        "lists that are not the shape": changed(data=[[7] * (size - 1), [7]]),
        "deep nesting": b"[" * 100_000 + b"]" * 100_000,
        "deep nesting of data": changed(data=[]).replace(b'"data": []', b'"data": ' + b"[" * 5_000 + b"]" * 5_000),
        "a key twice": b'{"inputs": [], "inputs": {}}',
    }
    found = [_once(f"v2: {name}", post(url, "application/json", body)) for name, body in bodies.items()]
    head = json.dumps({"inputs": [{k: v for k, v in good.items() if k != "data"} | {"parameters": {"binary_data_size": size}}]})
    for name, length, pixels in (
        ("longer than the body", 10**6, size),
        ("negative", -1, size),
        ("no number", "abc", size),
        ("of 400 digits", "9" * 400, size),
        ("0", 0, size),
        ("right, too few pixels", len(head), size - 1),
        ("right, too many pixels", len(head), size + 1),
        ("right, no pixels", len(head), 0),
    ):
        kind = f"application/octet-stream\r\nInference-Header-Content-Length: {length}"
        found.append(_once(f"v2: header length {name}", post(url, kind, head.encode() + b"\7" * pixels)))
    for lie in (-1, 10**20, "7", None):
        lying = head.replace(str(size), json.dumps(lie)).encode()
        kind = f"application/octet-stream\r\nInference-Header-Content-Length: {len(lying)}"
        found.append(_once(f"v2: binary size {lie}", post(url, kind, lying + b"\7" * size)))
    return [
        *found,
        _once("v2: unknown model", post("/v2/models/nobody/infer", "application/json", changed()), {404}),
        _once("v2: unknown version", post(f"/v2/models/{model}/versions/999/infer", "application/json", changed()), {404}),
        _once("v2: a path upwards", post("/v2/models/..%2f..%2fetc/infer", "application/json", changed()), {404, 400}),
        _once("tensor: empty", post("/predict/tensor", "application/octet-stream", b"")),
        _once("tensor: a byte short", post("/predict/tensor", "application/octet-stream", bytes(size - 1))),
        _once("tensor: too many images", post("/predict/tensor", "application/octet-stream", bytes(size * 2_000))),
        _once("tensor: as JSON", post("/predict/tensor", "application/json", b"[]")),
    ]


# ---- HTTP ----


def _protocol(jpeg: bytes) -> list[Attack]:
    def asked(first: str, *headers: str, body: bytes = b"") -> bytes:
        return "\r\n".join([first, "Host: localhost", *headers, "", ""]).encode("latin-1") + body

    kind, length = "Content-Type: image/jpeg", f"Content-Length: {len(jpeg)}"
    hidden = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    predict = "POST /predict HTTP/1.1"
    both = asked(predict, kind, f"Content-Length: {len(hidden) + 5}", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + hidden)
    return [
        *(
            _once(f"{method} /predict", asked(f"{method} /predict HTTP/1.1"), {405})
            for method in ("GET", "PUT", "DELETE", "PATCH")
        ),
        _once("an unknown method", asked("BREW /predict HTTP/1.1"), OR_CLOSED),
        _once("CONNECT", asked("CONNECT example.org:443 HTTP/1.1"), OR_CLOSED),
        _once("an unknown path", asked("GET /admin HTTP/1.1"), {404}),
        _once("a path upwards", asked("GET /../../etc/passwd HTTP/1.1"), {404, 400}),
        _once("a path upwards in code", asked("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1"), {404, 400}),
        _once("a path that is no text", asked("GET /%ff%00%c0%af HTTP/1.1"), {404, 400}),
        _once("a path of 100,000 letters", asked(f"GET /{'a' * 100_000} HTTP/1.1"), OR_CLOSED),
        _once("a header of 1 MB", asked("GET /health HTTP/1.1", f"X: {'a' * 1_000_000}"), OR_CLOSED),
        _once("50,000 headers", asked("GET /health HTTP/1.1", *["X: a"] * 50_000), OR_CLOSED),
        _once("a header without a name", asked("GET /health HTTP/1.1", ": a"), OR_CLOSED),
        _once("a zero byte in a header", asked("GET /health HTTP/1.1", "X: a\0b"), OR_CLOSED),
        _once("length and chunks", both, OR_CLOSED),
        _once("two lengths", asked(predict, kind, length, "Content-Length: 0", body=jpeg), OR_CLOSED),
        _once(
            "chunks, but not last", asked(predict, kind, "Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"), OR_CLOSED
        ),
        _once("an unknown encoding", asked(predict, kind, "Transfer-Encoding: gzip", body=jpeg), OR_CLOSED),
        *(
            _once(f"length {text}", asked(predict, kind, f"Content-Length: {text}", body=jpeg), OR_CLOSED)
            for text in ("abc", "-1", "0x10", "1e3", "1,000", "9" * 30, f"{'0' * 5_000}99999999999")
        ),
        *(
            _once(f"chunk size {size!r}", asked(predict, kind, "Transfer-Encoding: chunked", body=size + b"\r\n"), OR_CLOSED)
            for size in (b"g", b"-1", b"f" * 30, b"0x5")
        ),
        _once("a folded header", asked("GET /nowhere HTTP/1.1", "X: a\r\n b"), OR_CLOSED),
        _once("a space before the colon", asked(predict, kind, f"Content-Length : {len(jpeg)}", body=jpeg), OR_CLOSED),
        _once("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", OR_CLOSED),
        _once("HTTP/9.9", asked("GET /nowhere HTTP/9.9"), OR_CLOSED),
        _once("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(512), OR_CLOSED),
        _once("SSH", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", OR_CLOSED),
        _once("a web socket", asked("GET /predict HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade", *_SOCKET), MISTAKES),
    ]


_SOCKET = ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")


# ---- too slow ----


def _slow(jpeg: bytes) -> list[Attack]:
    request = post("/predict", "image/jpeg", jpeg)
    begin_of_body = len(request) - len(jpeg)

    def dripping(name: str, begin: int) -> Attack:
        async def run(port: int, patience: float) -> Outcome:
            connection = await Connection.open(port)
            try:
                connection.send(request[:begin])
                dripper = asyncio.create_task(_drip(connection, request[begin:]))
                try:
                    return await outcome_of(connection, patience)
                finally:
                    dripper.cancel()
            finally:
                connection.close()

        return Attack(name, run, frozenset({408, "closed"}), is_slow=True)

    def leaving(name: str, end: int, pause: float) -> Attack:
        async def run(port: int, patience: float) -> Outcome:
            connection = await Connection.open(port)
            connection.send(request[:end])
            await asyncio.sleep(pause)
            connection.close()
            return "closed"

        return Attack(name, run, frozenset({"closed"}))

    return [
        dripping("a byte a second of the headers", 20),
        dripping("a byte a second of the body", begin_of_body),
        dripping("a connection that says nothing", 0),
        leaving("gone within the headers", 20, 0.01),
        leaving("gone within the body", begin_of_body + 100, 0.01),
        leaving("gone before the answer", len(request), 0.0),
        leaving("gone while the answer is made", len(request), 0.001),
    ]


async def _drip(connection: Connection, content: bytes) -> None:
    for place in range(len(content)):
        await asyncio.sleep(1.0)
        if connection.is_closed:
            return
        connection.send(content[place : place + 1])


# ---- too large ----


def _large() -> list[Attack]:
    length = 10**10
    declared = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {length}\r\n\r\n"
    chunked = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
    waiting = declared.replace("\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n")

    def endless(name: str, head: str, more: bytes, allowed: frozenset[Outcome] = TOO_LARGE) -> Attack:
        async def run(port: int, patience: float) -> Outcome:
            connection = await Connection.open(port)
            try:
                connection.send(head.encode())
                flood = asyncio.create_task(_flood(connection, more))
                try:
                    return await outcome_of(connection, patience)
                finally:
                    flood.cancel()
            finally:
                connection.close()

        return Attack(name, run, allowed)

    return [
        endless("a body of 10 GB", declared, bytes(CHUNK)),
        endless("chunks without end", chunked, b"%x\r\n%b\r\n" % (CHUNK, bytes(CHUNK))),
        endless("chunks of one byte without end", chunked, b"1\r\na\r\n" * (CHUNK // 6), MISTAKES),
        endless("10 GB announced", waiting, b""),
        endless("a header behind the body without end", chunked + "1\r\nx\r\n0\r\nX: ", b"a" * CHUNK, MISTAKES),
        endless("an extension of a chunk without end", chunked + "1;x=", b"a" * CHUNK, MISTAKES),
        _once("10 GB announced to the tensor route", declared.replace("/predict", "/predict/tensor").encode(), TOO_LARGE),
    ]


async def _flood(connection: Connection, more: bytes) -> None:
    """Send for ever, as fast as the server takes it."""
    while more and not connection.is_closed:
        if connection.transport.get_write_buffer_size() < CHUNK:
            connection.send(more)
        await asyncio.sleep(0.0005)
