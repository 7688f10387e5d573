"""Clients that load a server: each keeps one connection alive, and asks again as soon as it has its answer.

`python -m pipeline.bench.load JSON` is a process of its own, pinned to another core than the server, so that neither waits for
the other's interpreter. It speaks HTTP/1.1 over bare sockets: a comfortable client takes longer for a request than the servers
that are to be measured. A request is a file with the bytes to send.
"""

import asyncio
import json
import math
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from pipeline.bench.measure import Figures

PATIENCE_SECONDS = 60.0  # for the last answers
WARM_UP_SECONDS = 0.5  # not counted: connections open, caches fill, batches form


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    headers: dict[str, str]  # names in small letters
    body: bytes


class Connection(asyncio.Protocol):
    """One connection: bytes are sent as they are, and whole answers come back in their order."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.is_closed = False
        self._cause: Exception | None = None
        self._received = bytearray()
        self._answers = deque[Answer]()
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, port: int, host: str = "127.0.0.1") -> "Connection":
        """Connect. Raises OSError when nobody listens."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    def send(self, content: bytes) -> None:
        """Send bytes, a whole request or a part of one."""
        self.transport.write(content)

    async def answer(self) -> Answer:
        """The next answer. Raises ConnectionError when the connection ends before it is whole."""
        while not self._answers:
            if self.is_closed:
                raise ConnectionError("the connection was closed without a whole answer") from self._cause
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._answers.popleft()

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for its answer. Raises ConnectionError as `answer` does."""
        self.send(request)
        return await self.answer()

    def close(self) -> None:
        """Close at once; what is not sent yet is dropped."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Take apart what has come so far."""
        self._received += data
        while (found := parse_answer(self._received)) is not None:
            answer, length = found
            del self._received[:length]
            if answer.status >= 200:  # 100 only says that the body may follow
                self._answers.append(answer)
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """No answer comes after this."""
        self.is_closed, self._cause = True, exc
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and (self._answers or self.is_closed):
            self._waiter.set_result(None)


def parse_answer(received: bytes | bytearray) -> tuple[Answer, int] | None:
    """The first answer in `received` and its length in bytes, or None while it is not whole.

    Raises ValueError if it is no HTTP.
    """
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    status_line, *lines = bytes(received[:end]).decode("latin-1").split("\r\n")
    version, status, *_ = status_line.split(" ")
    if not version.startswith("HTTP/1.") or len(status) != 3:
        raise ValueError(f"no HTTP answer: {status_line[:80]!r}")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    begin = end + 4
    if headers.get("transfer-encoding") == "chunked":
        found = _join_chunks(received, begin)
        if found is None:
            return None
        body, length = found
    else:
        length = begin + int(headers.get("content-length", 0))
        if len(received) < length:
            return None
        body = bytes(received[begin:length])
    return Answer(int(status), headers, body), length


def _join_chunks(received: bytes | bytearray, begin: int) -> tuple[bytes, int] | None:
    body = bytearray()
    while (end := received.find(b"\r\n", begin)) >= 0:
        size = int(received[begin:end], 16)
        begin = end + 2
        if len(received) < begin + size + 2:
            return None
        body += received[begin : begin + size]
        begin += size + 2
        if not size:
            return bytes(body), begin
    return None


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of `values` do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def measure(port: int, requests: list[bytes], num_clients: int, seconds: float) -> Figures:
    """Ask with `num_clients` for `seconds`, each client going through all `requests` from another place on.

    Raises RuntimeError for any answer but 200, ConnectionError and TimeoutError where there is none.
    """
    begin = time.perf_counter() + WARM_UP_SECONDS
    end = begin + seconds
    async with asyncio.timeout(WARM_UP_SECONDS + seconds + PATIENCE_SECONDS):
        clients = [_ask_again_and_again(port, requests, number, end) for number in range(num_clients)]
        spans = [span for of_client in await asyncio.gather(*clients) for span in of_client]
    counted = [answered - asked for asked, answered in spans if begin <= answered < end]
    if not counted:
        raise RuntimeError(f"no answer within {seconds:.0f} s")
    quantiles = {f"p{percent}_ms": quantile(counted, percent / 100) * 1e3 for percent in (50, 90, 99)}
    return {"requests": len(spans), "requests_a_second": len(counted) / seconds, **quantiles}


async def _ask_again_and_again(port: int, requests: list[bytes], number: int, end: float) -> list[tuple[float, float]]:
    """When each request was asked and answered, in seconds of the performance counter."""
    connection = await Connection.open(port)
    spans = []
    try:
        while (asked := time.perf_counter()) < end:
            answer = await connection.ask(requests[number % len(requests)])
            if answer.status != 200:
                raise RuntimeError(f"answered {answer.status}: {answer.body[:200]!r}")
            spans.append((asked, time.perf_counter()))
            number += 1
    finally:
        connection.close()
    return spans


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    contents = [path.read_bytes() for path in sorted(Path(wanted["folder"]).glob("*.http"))]
    print(json.dumps(asyncio.run(measure(wanted["port"], contents, wanted["clients"], wanted["seconds"]))))
