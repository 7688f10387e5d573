"""A request as a route sees it, and the answer that it gives: once, now or later."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import orjson

JSON = "application/json"
AGAIN = (("retry-after", "1"),)  # seconds


@dataclass(frozen=True, slots=True)
class Response:
    """Status, body and headers of an answer."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


def json_response(value: object, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(status, orjson.dumps(value))


class RefusedError(Exception):
    """A request that is not answered as asked: the status, and one line that says why and what would be taken."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers

    def response(self) -> Response:
        """The answer that says so, `{"error": ...}` on every route."""
        return Response(self.status, orjson.dumps({"error": str(self)}), JSON, self.headers)


class Sender(Protocol):
    """What takes the answer to the client."""

    def send(self, request: "Request", response: Response) -> None:
        """Send the answer, if the client is still there and waits for it."""


class Request:
    """One request; its body is there when the route is called. Header names are in lower case."""

    __slots__ = (
        "abandon", "asks_first", "began", "body", "has_body", "headers", "is_http_1_0", "is_over", "keep_alive", "method",
        "num_bytes", "num_pieces", "path", "query", "ready", "route", "sender", "target",
    )  # fmt: skip

    def __init__(self, sender: Sender, began: float) -> None:
        self.sender = sender
        self.began = began  # seconds of the loop's clock
        self.ready: Response | None = None  # what it is answered with, decided before its body came
        self.method = ""
        self.target = b""
        self.path = ""
        self.query = ""
        self.headers: dict[bytes, bytes] = {}
        self.body: bytes | bytearray = b""
        self.has_body = False
        self.asks_first = False  # its body comes when it is told to go on
        self.num_bytes = 0  # of the body, as far as it has come
        self.num_pieces = 0  # in which it came
        self.keep_alive = True
        self.is_http_1_0 = False
        self.is_over = False  # answered, or its client has gone
        self.route = "none"  # by which it is counted
        self.abandon: Callable[[], object] | None = None  # to be called when nobody waits for the answer any more

    def respond(self, response: Response) -> None:
        """Give the answer. Only the first counts."""
        if not self.is_over:
            self.sender.send(self, response)

    def header(self, name: bytes) -> str:
        """The value of a header; empty where it is missing."""
        return self.headers.get(name, b"").decode("latin-1")

    @property
    def media_type(self) -> str:
        """Content-Type without its parameters, in lower case."""
        return self.header(b"content-type").partition(";")[0].strip().lower()
