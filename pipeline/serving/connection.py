"""HTTP/1.1 connections over llhttp (httptools) and uvloop: parsing, limits and deadlines, and nothing of models.

Why not a framework? CPU time a request of the server process, pinned to one core, 16 clients, a 28 x 28 PNG, the same decoding
and micro-batching behind each: this 0.13 ms, uvicorn with httptools and uvloop under a raw ASGI application 0.17, granian 0.19
(RSGI) and 0.23 (ASGI), FastAPI with onnxruntime 0.68. And none of them has all the limits that a public port needs: a head that
comes slowly, a body without end that is refused before it is read, connections that never read their answers.

A newcomer would close a connection right after refusing a body. What the client has sent and nobody has read then makes the
kernel reset the connection, and the refusal is lost on its way: so the rest is read and thrown away for a moment.
"""

import asyncio
import contextlib
import email.utils
import http
import math
import re
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from pipeline.serving.exchange import AGAIN, RefusedError, Request, Response
from pipeline.serving.settings import (
    IDLE_SECONDS,
    MAX_CONNECTIONS,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MIN_BODY_BYTES_PER_SECOND,
    ServeSettings,
)

SWEEP_SECONDS = 0.25
LINGER_SECONDS = 2.0
MAX_FORGIVEN = 5
# The parser hands over each chunk of a body alone: ten million of one byte would keep a core busy for half a minute.
MIN_PIECE_BYTES = 128
FREE_PIECES = 1_000
# Requests that a client may send ahead of their answers.
MAX_PIPELINED = 32
REASONS = {status.value: status.phrase.encode() for status in http.HTTPStatus}
# Of a target that proxies are sent (RFC 9112, 3.2.2): which server is meant.
ORIGIN = re.compile(rb"^https?://[^/?]*", re.IGNORECASE)
NO_CONTENT = 204
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Routes(Protocol):
    """What answers requests."""

    def admit(self, request: Request) -> None:
        """Look at the head of a request before its body is read. Raises RefusedError."""

    def handle(self, request: Request) -> None:
        """Answer a request, by `request.respond`, now or later."""

    def count(self, request: Request, status: int, seconds: float) -> None:
        """Take note of an answer."""


class Listener:
    """What the connections of a worker share: limits, routes, the bytes of bodies that are held, and whether it is closing."""

    def __init__(self, settings: ServeSettings, routes: Routes, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self.routes, self.clock = settings, routes, clock
        self.connections: set[Connection] = set()
        self.num_held_bytes = 0
        self.is_draining = False
        self.date = _date_line()

    def sweep(self) -> None:
        """End what has passed its deadline. One look at all costs less than a timer for each request."""
        self.date = _date_line()
        now = self.clock()
        for connection in [each for each in self.connections if each.deadline < now]:
            connection.expire()

    def forgive(self, seconds: float) -> None:
        """Put off all deadlines: this process did not run for so long, and what clients sent meanwhile is still to be read.

        But a request may be what it was busy with, so that is done only a few times for each.
        """
        for connection in self.connections:
            connection.num_forgiven += 1
            if connection.num_forgiven <= MAX_FORGIVEN:
                connection.deadline += seconds

    def make_room(self, newcomer: "Connection") -> bool:
        """Close the idle connection that would be closed next, if there is one: silence must not keep a newcomer out."""
        idle = [each for each in self.connections if each.is_idle and not each.is_closing and each is not newcomer]
        if idle:
            min(idle, key=lambda each: each.deadline).close()
        return bool(idle)

    def drain(self) -> None:
        """Close what is idle; the others close after the answers that they wait for."""
        self.is_draining = True
        for connection in list(self.connections):
            if connection.is_idle:
                connection.close()

    def abort(self) -> None:
        """End all connections, whatever they wait for."""
        for connection in list(self.connections):
            connection.abort()


def _long_head() -> RefusedError:
    return RefusedError(431, f"the head of a request may have {MAX_HEAD_BYTES:,} bytes.")


def _date_line() -> bytes:
    return f"date: {email.utils.formatdate(usegmt=True)}\r\n".encode()


class _StopParsingError(Exception):
    """Raised in a parser's callback to leave the rest of the input unread."""


class _BodyOf:
    """What a second parser calls, of a request whose head the first has read."""

    def __init__(self, connection: "Connection") -> None:
        self.on_body, self.on_message_complete = connection.on_body, connection.on_message_complete


class Connection(asyncio.Protocol):
    """One client. It reads ahead, but answers one request after the other."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.transport: asyncio.Transport
        self.parser = httptools.HttpRequestParser(self)
        self.deadline = math.inf
        self.num_forgiven = 0
        self.incoming: Request | None = None  # not yet whole
        self.is_in_head = False
        self.num_silent_bytes = 0  # since the parser last had something of a body, or a whole request
        self.waiting: deque[Request] = deque()
        self.answering: Request | None = None
        self.is_deaf = False  # nothing more is read
        self.is_closing = False
        self.is_choked = False  # the client does not read its answers

    # ---- asyncio's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a client, in place of an idle one where there are too many; tell it so where none is idle."""
        self.transport = cast(asyncio.Transport, transport)
        listener = self.listener
        self.deadline = listener.clock() + listener.settings.timeout_seconds
        listener.connections.add(self)
        if len(listener.connections) > MAX_CONNECTIONS and not listener.make_room(self):
            self._refuse(RefusedError(429, "too many connections", AGAIN).response())

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client, and stop working for it."""
        self.listener.connections.discard(self)
        self.is_deaf = self.is_closing = True
        for request in (self.answering, self.incoming, *self.waiting):
            if request is not None:
                self._finish(request)
        self.answering = self.incoming = None
        self.waiting.clear()

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self.is_deaf:
            return
        self.num_silent_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if self.is_deaf:  # by a callback, which has said why
                return
            if isinstance(error, httptools.HttpParserCallbackError):
                raise error.__context__ or error from None
            self._refuse_unread(RefusedError(400, f"the request is not HTTP ({error})."))
            return
        if self.incoming is not None:
            self._ask_for_more()
            # The parser keeps a header that does not end, before a body and after one, and says nothing of it.
            if self.num_silent_bytes > MAX_HEAD_BYTES and not self.is_deaf:
                self._refuse_unread(_long_head())

    def _stay(self, data: bytes) -> None:
        """Go on with HTTP/1.1 where another protocol is offered (RFC 9110, 7.8): the parser leaves such a request's body."""
        request = self.incoming
        if request is None:  # it has none; it is the last one
            self.is_deaf = True
            return
        self.parser = httptools.HttpRequestParser(_BodyOf(self))
        framing = (b"transfer-encoding", b"content-length")
        lines = [b"%b: %b\r\n" % (name, request.headers[name]) for name in framing if name in request.headers]
        self.parser.feed_data(b"POST / HTTP/1.1\r\nconnection: close\r\n%b\r\n" % b"".join(lines))
        self.data_received(data)

    def _ask_for_more(self) -> None:
        """Acknowledge a part of a request at once: many a client holds back its body until its head is acknowledged."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_QUICKACK"):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def eof_received(self) -> bool:
        """The client sends nothing more; it may still wait for its answer."""
        is_waited_for = self.answering is not None or bool(self.waiting)
        self.is_deaf = True
        return is_waited_for

    def pause_writing(self) -> None:
        """The client does not read its answers: it gets no more until it does."""
        self.is_choked = True
        self.deadline = self.listener.clock() + self.listener.settings.timeout_seconds

    def resume_writing(self) -> None:
        """It does again."""
        self.is_choked = False
        if not self.is_closing:
            self._go_on()

    # ---- the parser's callbacks ----

    def on_message_begin(self) -> None:
        """A request begins."""
        now = self.listener.clock()
        self.incoming = Request(self, now)
        self.is_in_head, self.num_forgiven = True, 0
        if self.answering is None:
            self.deadline = now + self.listener.settings.timeout_seconds

    def on_url(self, url: bytes) -> None:
        """A part of its target."""
        assert self.incoming is not None
        self.incoming.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of its head; what follows the body of a chunked request is dropped."""
        request = self.incoming
        assert request is not None
        if not self.is_in_head:
            return
        name, value = name.lower(), value.rstrip(b" \t")
        if name in request.headers:
            if name == b"host":
                self._stop(RefusedError(400, "the request has two hosts."))
            value = request.headers[name] + b", " + value
        request.headers[name] = value
        if len(request.headers) > MAX_HEADERS:
            self._stop(RefusedError(431, f"a request may have {MAX_HEADERS} headers."))

    def on_headers_complete(self) -> None:
        """Decide on the request before its body is read."""
        request = self.incoming
        assert request is not None
        self.is_in_head = False
        request.method = self.parser.get_method().decode("latin-1")
        path, _, query = ORIGIN.sub(b"", request.target).partition(b"?")
        request.path, request.query = path.decode("latin-1"), query.decode("latin-1")
        # Another protocol is not spoken: the request itself is answered, and the rest left.
        request.keep_alive = self.parser.should_keep_alive() and not self.parser.should_upgrade()
        request.is_http_1_0 = self.parser.get_http_version() == "1.0"
        try:
            self._check_head(request)
            self.listener.routes.admit(request)
        except RefusedError as refusal:
            if request.has_body:
                self._stop(refusal)
            request.ready = refusal.response()
            return
        expects = request.headers.get(b"expect", b"").lower() == b"100-continue"
        request.asks_first = expects and request.has_body and not request.is_http_1_0
        if self.answering is None:
            self.deadline = self.listener.clock() + self.listener.settings.timeout_seconds
            self._tell_to_go_on()

    def _tell_to_go_on(self) -> None:
        if self.incoming is not None and self.incoming.asks_first:
            self.incoming.asks_first = False
            self.transport.write(CONTINUE)

    def _check_head(self, request: Request) -> None:
        """Refuse what cannot be answered, whatever it asks for. Raises RefusedError."""
        headers = request.headers
        coding, length = headers.get(b"transfer-encoding"), headers.get(b"content-length")
        request.has_body = coding is not None or length not in (None, b"0")
        if len(request.target) + sum(map(len, headers.values())) > MAX_HEAD_BYTES:
            raise _long_head()
        if b"host" not in headers and not request.is_http_1_0:
            raise RefusedError(400, "the request names no host.")
        if coding is not None and coding.lower() != b"chunked":
            raise RefusedError(400, "the only transfer coding that is read is chunked.")
        # What the parser takes has 64 bits; zeros before it, too many for Python, are no part of it.
        if length is not None and int(length[-20:]) > self.listener.settings.max_body_bytes:
            raise self._too_large()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        request, listener = self.incoming, self.listener
        assert request is not None
        self.num_silent_bytes, request.asks_first = 0, False
        request.num_bytes += len(body)
        listener.num_held_bytes += len(body)
        if request.num_bytes > listener.settings.max_body_bytes:
            self._stop(self._too_large())
        request.num_pieces += 1
        if request.num_pieces > FREE_PIECES and request.num_bytes < MIN_PIECE_BYTES * request.num_pieces:
            self._stop(RefusedError(400, f"the body comes in pieces of less than {MIN_PIECE_BYTES} bytes."))
        if listener.num_held_bytes > listener.settings.max_held_bytes:
            self._stop(RefusedError(429, "too many bodies wait here.", AGAIN))
        if not request.body:
            request.body = body  # most come in one piece
            return
        if isinstance(request.body, bytes):
            request.body = bytearray(request.body)
        request.body += body
        if self.answering is None:
            slowest = request.num_bytes / MIN_BODY_BYTES_PER_SECOND
            self.deadline = request.began + listener.settings.timeout_seconds + slowest

    def on_message_complete(self) -> None:
        """The request is whole; or it offers another protocol, and its body is still to come."""
        request = self.incoming
        assert request is not None
        if request.has_body and self.parser.should_upgrade():
            return
        self.incoming, self.num_silent_bytes = None, 0
        if len(self.waiting) >= MAX_PIPELINED:
            self.incoming = request
            self._stop(RefusedError(429, f"no more than {MAX_PIPELINED} requests may be sent ahead of their answers."))
        self.waiting.append(request)
        if self.answering is None:
            self._go_on()

    # ---- answers ----

    def _go_on(self) -> None:
        """Answer the next request, or wait for one."""
        if self.answering is None and self.waiting and not self.is_choked:
            self.answering = request = self.waiting.popleft()
            self.deadline = self.listener.clock() + self.listener.settings.timeout_seconds
            if request.ready is not None:
                request.respond(request.ready)
            else:
                self.listener.routes.handle(request)
        elif self.answering is None and not self.is_choked:
            idle = IDLE_SECONDS if self.incoming is None else self.listener.settings.timeout_seconds
            self.deadline = self.listener.clock() + idle
            self._tell_to_go_on()

    def send(self, request: Request, response: Response) -> None:
        """Write the answer of the request whose turn it is."""
        listener = self.listener
        if request is not self.answering:
            return
        is_last = not request.keep_alive or (not self.waiting and (listener.is_draining or self.is_deaf))
        self._write(request, response, is_last)
        listener.routes.count(request, response.status, listener.clock() - request.began)
        self._finish(request)
        self.answering = None
        if is_last:
            self.close(linger=request.ready is not None and self.is_deaf)
        else:
            self._go_on()

    def _write(self, request: Request | None, response: Response, is_last: bool) -> None:
        head = [b"HTTP/1.1 %d %b\r\n" % (response.status, REASONS.get(response.status, b"")), self.listener.date]
        if response.status != NO_CONTENT:
            head.append(b"content-type: %b\r\ncontent-length: %d\r\n" % (response.content_type.encode(), len(response.body)))
        head += [f"{name}: {value}\r\n".encode() for name, value in response.headers]
        if is_last:
            head.append(b"connection: close\r\n")
        elif request is not None and request.is_http_1_0:
            head.append(b"connection: keep-alive\r\n")
        head.append(b"\r\n")
        if request is None or request.method != "HEAD":
            head.append(response.body)
        # One write: with two, the second waits for the client's delayed acknowledgement of the first, up to 40 ms.
        self.transport.write(b"".join(head))

    def _finish(self, request: Request) -> None:
        """Let go of a request that is answered or that nobody waits for."""
        request.is_over = True
        self.listener.num_held_bytes -= request.num_bytes
        request.num_bytes, request.body = 0, b""
        if request.abandon is not None:
            request.abandon()
            request.abandon = None

    # ---- refusals, deadlines and the end ----

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"a body may have {self.listener.settings.max_body_bytes:,} bytes.")

    def _stop(self, refusal: RefusedError) -> None:
        """Leave the rest unread, and refuse the request that is coming in."""
        self._refuse_unread(refusal)
        raise _StopParsingError

    def _refuse_unread(self, refusal: RefusedError) -> None:
        """Refuse the request that is coming in, after those before it were answered, and close."""
        request = self.incoming or Request(self, self.listener.clock())
        self.incoming = None
        self.is_deaf = True
        request.keep_alive = False
        request.ready = refusal.response()
        self.listener.num_held_bytes -= request.num_bytes
        request.num_bytes, request.body = 0, b""
        self.waiting.append(request)
        if self.answering is None:
            self._go_on()

    def _refuse(self, response: Response) -> None:
        """Answer what was not asked, and close."""
        self.is_deaf = True
        self._write(None, response, is_last=True)
        self.listener.routes.count(Request(self, self.listener.clock()), response.status, 0.0)
        self.close(linger=True)

    def expire(self) -> None:
        """The deadline has passed: of an answer that is not read, of a wait, of a request, or of nothing at all."""
        seconds = self.listener.settings.timeout_seconds
        if self.is_closing or self.is_choked:
            self.abort()
        elif self.answering is not None:
            busy = RefusedError(503, f"there was no answer within {seconds:g} s; the server is busy.", AGAIN)
            self.answering.respond(busy.response())
        elif self.incoming is not None:
            what = "head" if self.is_in_head else "body"
            self._refuse_unread(RefusedError(408, f"the {what} of the request did not come within {seconds:g} s."))
        else:
            self.close()

    @property
    def is_idle(self) -> bool:
        """Whether nothing has come of a request that would be lost."""
        return self.answering is None and self.incoming is None and not self.waiting

    def close(self, *, linger: bool = False) -> None:
        """Close after what is written has gone out; `linger` while the client may still be sending."""
        self.is_deaf = self.is_closing = True
        self.deadline = self.listener.clock() + (LINGER_SECONDS if linger else self.listener.settings.timeout_seconds)
        if not linger or not self.transport.can_write_eof():
            self.transport.close()
            return
        with contextlib.suppress(OSError, RuntimeError):  # the client has gone
            self.transport.write_eof()

    def abort(self) -> None:
        """End the connection at once."""
        self.is_deaf = self.is_closing = True
        self.transport.abort()
