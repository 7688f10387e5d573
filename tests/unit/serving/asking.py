"""Requests as bytes, and answers taken apart."""

import io
import json
import time
from typing import Any

import numpy as np
from PIL import Image

from pipeline.serving.connection import Connection
from tests.unit.serving.conftest import Server, Wire


def image_of(colour: tuple[int, int, int] = (220, 40, 30), size: tuple[int, int] = (16, 16), form: str = "PNG") -> bytes:
    """An encoded picture of one colour."""
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, form)
    return content.getvalue()


def noise(seed: int, size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    """An encoded picture of noise."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, form)
    return content.getvalue()


def request(
    path: str, body: bytes = b"", method: str = "POST", kind: str = "image/png", headers: dict[str, str] | None = None
) -> bytes:
    """A request of HTTP/1.1."""
    lines = [f"{method} {path} HTTP/1.1", "Host: here"]
    named = {"Content-Type": kind, "Content-Length": str(len(body))} if method == "POST" else {}
    lines += [f"{name}: {value}" for name, value in (named | (headers or {})).items() if value]
    return "\r\n".join([*lines, "", ""]).encode() + body


def form_of(files: dict[str, bytes], boundary: str = "b0undary") -> bytes:
    """A form of files, each named as its key."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in files.items()
    ]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()])


def answer_of(wire: Wire, number: int = 1) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the last of `number` answers, waited for."""
    deadline = time.monotonic() + 20
    while len(wire.statuses) < number:
        assert time.monotonic() < deadline, bytes(wire.written)
        time.sleep(0.002)
    head, _, body = bytes(wire.written).split(b"HTTP/1.1 ")[number].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    return int(lines[0][:3]), headers, json.loads(body) if headers["content-type"] == "application/json" and body else body


def ask(server: Server, content: bytes) -> tuple[int, Any]:
    """Status and answer to one request on a connection of its own."""
    connection, wire = server.connect()
    feed(server, connection, content)
    status, _, answer = answer_of(wire)
    return status, answer


def feed(server: Server, connection: Connection, content: bytes) -> None:
    """What the client sends."""
    server.do(connection.data_received, content)
