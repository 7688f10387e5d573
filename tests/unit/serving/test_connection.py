"""HTTP as clients speak it, well, badly and with ill will."""

import pytest

from pipeline.serving import connection as module
from pipeline.serving.batching import Job
from pipeline.serving.connection import FREE_PIECES, LINGER_SECONDS, MAX_FORGIVEN, MAX_PIPELINED, MIN_PIECE_BYTES
from pipeline.serving.settings import BODIES_HELD, IDLE_SECONDS, MAX_HEAD_BYTES, MAX_HEADERS
from tests.processes import wait_until
from tests.unit.serving.asking import answer_of, ask, feed, image_of, noise, request
from tests.unit.serving.conftest import SETTINGS, Server, Wire

LIMIT = SETTINGS.max_body_bytes
CHUNKED = b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_requests_on_one_connection_are_answered_one_after_the_other_in_their_order(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/predict?top_k=1", image_of()) + request("/health", method="GET"))
    assert answer_of(wire, 1)[2]["predictions"]
    assert answer_of(wire, 2)[2] == {"status": "alive"}
    assert not wire.is_closed


def test_a_request_that_comes_byte_by_byte_is_one_request(server: Server) -> None:
    connection, wire = server.connect()
    for byte in request("/predict", image_of()):
        assert not wire.written
        feed(server, connection, bytes([byte]))
    assert answer_of(wire)[0] == 200


def test_a_chunked_body_is_a_body(server: Server) -> None:
    image = image_of()
    head = request("/predict", headers={"Content-Length": "", "Transfer-Encoding": "chunked"})
    chunks = b"%x\r\n%b\r\n3\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (len(image) - 3, image[:-3], image[-3:])
    assert ask(server, head + chunks)[0] == 200


def test_a_body_in_many_chunks_is_a_body_unless_they_are_crumbs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FREE_PIECES", 2)
    image = noise(0, size=(60, 60))

    def in_chunks(size: int) -> bytes:
        pieces = [image[place : place + size] for place in range(0, len(image), size)]
        return CHUNKED.replace(b"Host: a", b"Host: a\r\nContent-Type: image/png") + b"".join(
            b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]
        )

    assert ask(server, in_chunks(MIN_PIECE_BYTES + 1))[0] == 200
    status, answer = ask(server, in_chunks(MIN_PIECE_BYTES - 1))
    assert (status, "pieces of less than 128 bytes" in answer["error"]) == (400, True)


def test_every_answer_is_a_single_write(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two writes the second waits for a delayed acknowledgement of the first: 40 ms with Linux's clients."""
    connection, wire = server.connect()
    writes = list[bytes]()

    def note(data: bytes) -> None:
        writes.append(data)
        Wire.write(wire, data)

    monkeypatch.setattr(wire, "write", note)
    feed(server, connection, request("/predict", image_of()))
    answer_of(wire)
    assert len(writes) == 1


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),  # TLS
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\nabc", 400),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX:" + b"a" * (MAX_HEAD_BYTES + 1), 431),
        (b"GET /" + b"a" * (MAX_HEAD_BYTES + 1), 431),
        (request("/health", method="GET", headers={f"X{number}": "1" for number in range(MAX_HEADERS)}), 431),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (LIMIT + 1), 413),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (CHUNKED + b"%x\r\n" % (LIMIT + 1) + b"x" * (LIMIT + 1), 413),
        (CHUNKED + b"1\r\nx\r\n" * (FREE_PIECES + 1), 400),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"0" * 5000 + b"%d\r\n\r\n" % (LIMIT + 1), 413),
        (CHUNKED.replace(b"chunked", b"gzip\r\nTransfer-Encoding: chunked") + b"0\r\n\r\n", 400),
        (b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n", 404),
    ],
)
def test_what_cannot_be_read_is_refused_and_the_connection_closed(server: Server, content: bytes, status: int) -> None:
    connection, wire = server.connect()
    feed(server, connection, content)
    found, headers, answer = answer_of(wire)
    assert (found, headers["connection"]) == (status, "close")
    assert answer["error"].endswith(".")
    # What the client still sends is read and dropped; a reset would take the refusal away from it.
    assert wire.has_eof
    assert not wire.is_closed
    feed(server, connection, b"x" * 1000)
    assert wire.statuses == [status]
    assert server.listener.num_held_bytes == 0
    server.after(LINGER_SECONDS + 0.1)
    assert wire.is_aborted


def test_a_refusal_waits_for_the_answers_before_it(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/predict", image_of()) + b"nonsense\r\n\r\n")
    answer_of(wire, 2)
    assert wire.statuses == [200, 400]


def test_what_is_refused_without_a_body_leaves_the_connection_open(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/nowhere", method="GET") + request("/predict", method="GET"))
    feed(server, connection, b"GET /health HTTP/1.1\r\n\r\nGET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    feed(server, connection, request("/health", method="GET"))
    assert wire.statuses == [404, 405, 400, 431, 200]
    assert not wire.has_eof


def test_a_client_may_not_send_more_ahead_than_a_few_requests(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/predict", image_of()) + (MAX_PIPELINED + 5) * request("/health", method="GET"))
    answer_of(wire, MAX_PIPELINED + 2)
    assert wire.statuses == [200] + MAX_PIPELINED * [200] + [429]


@pytest.mark.parametrize(
    ("begun", "status"),
    [
        (b"POST /predict HTTP/1.1\r\nHo", 408),
        (request("/predict", image_of())[:-5], 408),
        (request("/predict", headers={"Content-Length": "", "Transfer-Encoding": "chunked"}) + b"5\r\nab", 408),
    ],
)
def test_a_slow_client_is_told_so_and_let_go(server: Server, begun: bytes, status: int) -> None:
    connection, wire = server.connect()
    server.after(SETTINGS.timeout_seconds - 1)
    feed(server, connection, begun)
    server.after(SETTINGS.timeout_seconds - 1)
    assert wire.statuses == []
    server.after(2)
    assert (wire.statuses, wire.has_eof) == ([status], True)


def test_time_in_which_the_server_did_not_run_is_not_the_clients(server: Server) -> None:
    connection, wire = server.connect()
    content = request("/predict", image_of())
    feed(server, connection, content[:60])
    server.now += SETTINGS.timeout_seconds + 1
    server.do(server.listener.forgive, SETTINGS.timeout_seconds + 1)
    server.after(0.1)
    feed(server, connection, content[60:])
    assert answer_of(wire)[0] == 200


def test_a_request_that_keeps_the_server_busy_is_not_given_more_time_for_ever(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/predict", image_of())[:60])
    for _ in range(MAX_FORGIVEN + 1):
        assert wire.statuses == []
        server.now += SETTINGS.timeout_seconds + 1
        server.do(server.listener.forgive, SETTINGS.timeout_seconds + 1)
        server.after(0)
    assert wire.statuses == [408]


def test_a_body_may_take_longer_the_more_of_it_comes(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/predict", b"x" * 96_000)[:-60_000])
    server.after(1)
    feed(server, connection, b"x" * 50_000)
    server.after(SETTINGS.timeout_seconds)  # 86,000 bytes are worth 1.3 s
    assert wire.statuses == []
    server.after(1)
    assert wire.statuses == [408]


def test_a_connection_on_which_nothing_comes_is_closed_without_a_word(server: Server) -> None:
    _, fresh = server.connect()
    used, wire = server.connect()
    feed(server, used, request("/health", method="GET"))
    server.after(SETTINGS.timeout_seconds + 1)
    assert fresh.is_closed
    assert not fresh.written
    assert not wire.is_closed
    server.after(IDLE_SECONDS)
    assert wire.is_closed


def test_a_client_that_does_not_read_its_answers_gets_no_more_of_them(server: Server) -> None:
    connection, wire = server.connect()
    server.do(connection.pause_writing)
    feed(server, connection, request("/health", method="GET"))
    assert not wire.written
    server.do(connection.resume_writing)
    assert wire.statuses == [200]
    server.do(connection.pause_writing)
    server.after(SETTINGS.timeout_seconds + 1)
    assert wire.is_aborted


def test_a_request_that_waits_too_long_is_told_to_come_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.batcher, "submit", lambda job: None)
    connection, wire = server.connect()
    feed(server, connection, request("/predict", image_of()))
    server.after(SETTINGS.timeout_seconds + 1)
    status, headers, answer = answer_of(wire)
    assert (status, headers["retry-after"]) == (503, "1")
    assert "no answer within 5 s" in answer["error"]
    monkeypatch.undo()
    feed(server, connection, request("/predict", image_of()))
    assert answer_of(wire, 2)[0] == 200


def test_a_client_that_goes_away_is_no_longer_worked_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = list[Job]()
    monkeypatch.setattr(server.batcher, "submit", jobs.append)
    connection, _ = server.connect()
    feed(server, connection, request("/predict", image_of()))
    assert server.listener.num_held_bytes == len(image_of())
    (entry,) = jobs[0].entries
    server.do(connection.connection_lost, None)
    assert jobs[0].is_over
    assert entry.upload is None
    assert server.listener.num_held_bytes == 0
    assert not server.listener.connections


def test_one_who_has_sent_everything_still_gets_the_answer(server: Server) -> None:
    connection, wire = server.connect()
    content = request("/predict", image_of())

    def say_all() -> bool:
        connection.data_received(content)
        return connection.eof_received()

    assert server.do(say_all)
    assert answer_of(wire)[0] == 200
    assert wire.is_closed


def test_bodies_that_wait_are_bounded_over_all_connections(server: Server) -> None:
    half = request("/predict", b"x" * LIMIT)[: -LIMIT // 2]
    clients = [server.connect() for _ in range(2 * BODIES_HELD + 1)]
    for connection, _ in clients:
        feed(server, connection, half)
    assert [wire.statuses for _, wire in clients[:-2]] == [[]] * (len(clients) - 2)
    assert clients[-1][1].statuses == [429]


def test_connections_are_counted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    clients = [server.connect() for _ in range(2)]
    for connection, _ in clients:
        feed(server, connection, request("/predict", image_of())[:60])
    _, wire = server.connect()
    assert wire.statuses == [429]
    assert server.app.board.total("requests none 429") == 1


def test_a_newcomer_takes_the_place_of_who_is_silent_longest(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    busy, _ = server.connect()
    feed(server, busy, request("/predict", image_of())[:60])
    wires = [server.connect()[1] for _ in range(2)]
    assert [wire.is_closed for wire in wires] == [True, False]
    assert [wire.statuses for wire in wires] == [[], []]


def test_while_draining_what_was_begun_is_finished_and_nothing_else_begun(server: Server) -> None:
    idle, idle_wire = server.connect()
    feed(server, idle, request("/health", method="GET"))
    busy, busy_wire = server.connect()
    content = request("/predict", image_of())
    feed(server, busy, content[:60])
    server.do(server.listener.drain)
    assert (idle_wire.is_closed, busy_wire.is_closed) == (True, False)
    feed(server, busy, content[60:])
    status, headers, _ = answer_of(busy_wire)
    assert (status, headers["connection"], busy_wire.is_closed) == (200, "close", True)


def test_http_1_0_and_head_and_close_are_understood(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert answer_of(wire)[1]["connection"] == "keep-alive"
    feed(server, connection, b"HEAD /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    status, headers, body = answer_of(wire, 2)
    assert (status, body, headers["content-length"]) == (200, b"", "18")
    assert wire.is_closed


def test_a_client_that_asks_first_is_told_to_go_on_or_refused(server: Server) -> None:
    connection, wire = server.connect()
    expecting = {"Expect": "100-continue"}
    head = request("/predict", b"", headers=expecting | {"Content-Length": str(len(image_of()))})
    feed(server, connection, head)
    assert bytes(wire.written) == b"HTTP/1.1 100 Continue\r\n\r\n"
    feed(server, connection, image_of())
    assert answer_of(wire, 2)[0] == 200
    connection, wire = server.connect()
    feed(server, connection, request("/predict", b"", headers=expecting | {"Content-Length": str(LIMIT + 1)}))
    assert wire.statuses == [413]


def test_a_client_that_asks_behind_another_request_is_told_when_its_turn_comes(server: Server) -> None:
    connection, wire = server.connect()
    asking = request("/predict", b"", headers={"Expect": "100-continue", "Content-Length": str(len(image_of()))})
    feed(server, connection, request("/predict", image_of()) + asking)
    wait_until(lambda: bytes(wire.written).endswith(b"HTTP/1.1 100 Continue\r\n\r\n"), "the answers")
    feed(server, connection, image_of())
    wait_until(lambda: wire.statuses == [200, 100, 200], "the answers")
    connection, wire = server.connect()
    feed(server, connection, asking.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert wire.statuses == []


@pytest.mark.parametrize("place", ["in a header after its body", "in the extension of a chunk"])
def test_what_follows_a_chunk_without_end_is_refused(server: Server, place: str) -> None:
    connection, wire = server.connect()
    feed(server, connection, CHUNKED + (b"1\r\nx\r\n0\r\nX: " if "header" in place else b"1;x="))
    for _ in range(MAX_HEAD_BYTES // 1000 + 1):
        feed(server, connection, b"a" * 1000)
    assert (wire.statuses, wire.has_eof) == ([431], True)
    assert server.listener.num_held_bytes == 0


def test_what_comes_before_a_head_does_not_count_as_its_length(server: Server) -> None:
    connection, wire = server.connect()
    following = request("/health", method="GET")
    feed(server, connection, request("/predict", b"x" * 60_000) + following[:20])
    feed(server, connection, following[20:])
    wait_until(lambda: wire.statuses == [422, 200], "the answers")


@pytest.mark.parametrize("target", ["http://a/health", "HTTPS://a:80/health?x", "/%68ealth"])
def test_a_target_may_name_its_server_or_have_escapes(server: Server, target: str) -> None:
    connection, wire = server.connect()
    feed(server, connection, request(target, method="GET"))
    assert answer_of(wire)[0] == 200


def test_blanks_behind_a_header_are_none_of_it(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/predict", image_of(), headers={"Content-Encoding": "identity \t"}))
    assert answer_of(wire)[0] == 200
    connection, wire = server.connect()
    two = request("/predict", image_of(), headers={"Content-Encoding": "gzip\r\nContent-Encoding: identity"})
    feed(server, connection, two)
    assert answer_of(wire)[0] == 415


def test_an_answer_without_content_has_no_length(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/favicon.ico", method="GET"))
    assert wire.statuses == [204]
    assert b"content-" not in wire.written


@pytest.mark.parametrize("form", ["whole", "in pieces", "chunked", "asking first"])
def test_a_request_that_offers_another_protocol_keeps_its_body(server: Server, form: str) -> None:
    connection, wire = server.connect()
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
    image = image_of()
    if form == "chunked":
        head = request("/predict", b"", headers=offer).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        feed(server, connection, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(image), image))
    elif form == "asking first":
        feed(server, connection, request("/predict", image, headers=offer | {"Expect": "100-continue"})[: -len(image)])
        assert wire.statuses == [100]
        feed(server, connection, image)
    else:
        content = request("/predict", image, headers=offer)
        for part in [content] if form == "whole" else [content[:40], content[40:-50], content[-50:]]:
            feed(server, connection, part)
    wait_until(lambda: wire.statuses[-1:] == [200], "the answers")
    assert wire.is_closed or wire.has_eof
    assert server.listener.num_held_bytes == 0


def test_an_upgrade_is_not_taken_and_the_request_answered(server: Server) -> None:
    connection, wire = server.connect()
    feed(server, connection, request("/health", method="GET", headers={"Connection": "Upgrade", "Upgrade": "websocket"}))
    assert (wire.statuses, wire.is_closed or wire.has_eof) == ([200], True)
