import asyncio
import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.bench.load import Connection, measure, parse_answer, quantile
from tests.web import listening

REQUEST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nok"
DELAY_SECONDS = 0.005


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers after DELAY_SECONDS with what it was sent; /bad with 500."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(DELAY_SECONDS)
        self.send_response(500 if self.path == "/bad" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def saying(content: bytes) -> Iterator[int]:
    """A server that says `content` to whoever connects, byte by byte, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def speak() -> None:
        with listener.accept()[0] as client:
            for place in range(len(content)):
                client.sendall(content[place : place + 1])

    threading.Thread(target=speak, daemon=True).start()
    with listener:
        yield listener.getsockname()[1]


async def answers_of(port: int, number: int) -> list[bytes]:
    connection = await Connection.open(port)
    try:
        return [(await connection.answer()).body for _ in range(number)]
    finally:
        connection.close()


def test_answers_are_taken_apart_wherever_the_network_cuts_them() -> None:
    length = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none"
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\ntw\r\n1\r\no\r\n0\r\n\r\n"
    proceed = b"HTTP/1.1 100 Continue\r\n\r\n"
    with saying(proceed + length + chunks + length) as port:
        assert asyncio.run(answers_of(port, 3)) == [b"one", b"two", b"one"]


@pytest.mark.parametrize(
    "content", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", b"SSH-2.0\r\n\r\n"]
)
def test_an_answer_that_never_gets_whole_is_an_error(content: bytes) -> None:
    with saying(content) as port, pytest.raises(ConnectionError, match="closed without a whole answer"):
        asyncio.run(answers_of(port, 1))


def test_status_and_headers_are_read() -> None:
    refusal = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After:  1 \r\nContent-Length: 0\r\n\r\n"
    found = parse_answer(refusal + b"HTTP/1.1 2")
    assert found is not None
    answer, length = found
    assert (answer.status, answer.headers["retry-after"], answer.body, length) == (429, "1", b"", len(refusal))
    assert parse_answer(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n") is None


def test_a_quantile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert quantile([3.0], 0.5) == 3


def test_latency_and_rate_are_those_of_the_server() -> None:
    with listening(Handler) as port:
        figures = asyncio.run(measure(port, [REQUEST], num_clients=1, seconds=1.0))
    assert DELAY_SECONDS * 1e3 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"]
    # One client waits for each answer, so that time is all spent in latencies.
    assert figures["requests_a_second"] == pytest.approx(1e3 / figures["p50_ms"], rel=0.5)


def test_an_answer_that_refuses_ends_the_measurement() -> None:
    with listening(Handler) as port, pytest.raises(RuntimeError, match="answered 500: b'ok'"):
        asyncio.run(measure(port, [REQUEST, REQUEST.replace(b"/predict", b"/bad")], num_clients=2, seconds=5.0))


def test_the_clients_are_a_process_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "000.http").write_bytes(REQUEST)
    with listening(Handler) as port:
        wanted = json.dumps({"port": port, "folder": str(tmp_path), "clients": 4, "seconds": 0.5})
        command = [sys.executable, "-m", "pipeline.bench.load", wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["requests_a_second"] > 4 / 0.1
