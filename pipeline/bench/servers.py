"""Servers to measure, how each is started, asked and ended; all answer images by the same ONNX file.

They get every cheap advantage that does not change what they are: no access log, one thread a session, and pixels that need
no more than a resize.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.bench.load import Answer, Connection
from pipeline.predictor import Predictor
from pipeline.preprocess import decode_image
from pipeline.serving.served import name_of

Form = Literal["raw", "multipart", "json"]
OURS = "shardline serve"
FASTAPI = "FastAPI + onnxruntime"
LITSERVE = "LitServe"
MLFLOW = "mlflow models serve"
START_SECONDS = 120.0
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Server:
    """One contender."""

    needs: str  # the packages without which it is left out
    command: str  # what python runs
    urls: dict[Form, str]  # that take an image, by the form in which they do; MODEL stands for the model's name
    field: str = "file"  # of a multipart form


SERVERS = {
    OURS: Server(
        "httptools",
        "-m pipeline serve MODEL --port PORT --threads 1",
        {"multipart": "/predict", "raw": "/predict", "json": "/v2/models/MODEL/infer"},
    ),
    # Which says so only when it is started: forms need a package that it does not bring.
    FASTAPI: Server("fastapi python_multipart", "-m pipeline.bench.served_by_fastapi MODEL PORT", {"multipart": "/predict"}),
    LITSERVE: Server("litserve", "-m pipeline.bench.served_by_litserve MODEL PORT", {"multipart": "/predict"}, "request"),
    MLFLOW: Server("mlflow", "-m pipeline.bench.served_by_mlflow MODEL PORT", {"json": "/invocations"}),
}


def is_installed(name: str) -> bool:
    """Whether the packages of a server are here."""
    return all(importlib.util.find_spec(package) for package in SERVERS[name].needs.split())


# ---- what they are asked, and what they say ----


def post(url: str, kind: str, body: bytes) -> bytes:
    """A whole POST request."""
    head = f"POST {url} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def request_for(server: Server, form: Form, encoded: bytes, predictor: Predictor) -> bytes:
    """What asks about a JPEG: as it is, as the file of a form, or as JSON of its pixels."""
    url = server.urls[form].replace("MODEL", name_of(predictor.path))
    if form == "raw":
        return post(url, "image/jpeg", encoded)
    if form == "multipart":
        part = f'Content-Disposition: form-data; name="{server.field}"; filename="photo.jpg"\r\nContent-Type: image/jpeg'
        body = b"--frontier\r\n" + part.encode() + b"\r\n\r\n" + encoded + b"\r\n--frontier--\r\n"
        return post(url, "multipart/form-data; boundary=frontier", body)
    pixels = decode_image(encoded, predictor.spec).transpose(2, 0, 1)[None]  # (1, 3, H, W)
    tensor: object = pixels.tolist()
    if url.startswith("/v2/"):
        tensor = [{"name": "image", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.ravel().tolist()}]
    return post(url, "application/json", json.dumps({"inputs": tensor}, separators=(",", ":")).encode())


def top_of(body: bytes, class_names: list[str]) -> tuple[str, float]:
    """Label and probability of the most probable class, from any contender's answer about one image."""
    answer = json.loads(body)
    if "top_k" in answer:
        best: dict[str, Any] = answer["top_k"][0]
    elif isinstance(answer.get("predictions"), list):
        best = answer["predictions"][0]["top_k"][0]
    else:  # MLflow's arrays or V2's, one for each output of the model
        found = answer.get("predictions") or {output["name"]: [output["data"]] for output in answer["outputs"]}
        (row,) = found["probabilities"]
        best = {"label": class_names[row.index(max(row))], "probability": max(row)}
    return best["label"], best["probability"]


async def ask_all(port: int, requests: list[bytes]) -> list[Answer]:
    """The answers to requests, one after another on one connection. Raises OSError where there are none."""
    connection = await Connection.open(port)
    try:
        async with asyncio.timeout(START_SECONDS):
            return [await connection.ask(request) for request in requests]
    finally:
        connection.close()


def command_of(name: str, model: Path, port: int) -> list[str]:
    """The command line that starts a server in the foreground."""
    words = {"MODEL": str(model), "PORT": str(port)}
    return [sys.executable, *(words.get(word, word) for word in SERVERS[name].command.split())]


# ---- from their start to their end ----


@dataclass(frozen=True)
class Running:
    """A server at work."""

    port: int
    group: int  # of its processes

    def cpu_seconds(self) -> float:
        """User and system time of all its processes, and of those of their children that have ended."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                values = stat.read_text().rsplit(")", 1)[1].split()
                if int(values[2]) == self.group:
                    ticks += sum(int(value) for value in values[11:15])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Processes that are started in here keep to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def serving(name: str, model: Path, core: int, first: bytes, log: Path) -> Iterator[Running]:
    """A server on a core of its own, from its `first` answer on; all its processes are ended.

    Raises RuntimeError with the end of its `log` when no answer comes.
    """
    port = _free_port()
    command = command_of(name, model, port)
    # MLflow looks for uvicorn on the PATH.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("wb") as output, pinned(core):
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        _wait_until_ready(process, port, first, log)
        yield Running(port, process.pid)
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, request: bytes, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            (answer,) = asyncio.run(ask_all(port, [request]))
            if answer.status == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"does not answer: {' '.join(last)} ({log})")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process that it started, also those that it forgets (LitServe's outlive a SIGTERM)."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
