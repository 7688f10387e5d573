"""A served model, an application, and connections to it without a socket."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.serving.app import App
from pipeline.serving.batching import Batcher
from pipeline.serving.connection import Connection, Listener
from pipeline.serving.metrics import Board
from pipeline.serving.served import ServedModel, load_served
from pipeline.serving.settings import ServeSettings

SETTINGS = ServeSettings(max_batch=4, max_queue=8, max_images=5, timeout_seconds=5, max_body_mb=0.1, max_pixels_mp=2, top_k=2)


@pytest.fixture(scope="session")
def served_path(exported_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a file in a folder `colours`. Read-only."""
    path = tmp_path_factory.mktemp("served") / "colours" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(exported_model.SerializeToString())
    return path


@pytest.fixture(scope="session")
def served(served_path: Path) -> ServedModel:
    """The tiny model, loaded: three colours, 16 x 16 pixels."""
    return load_served(served_path, "colours", "7", threads=1, max_batch=4)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


@dataclass
class Wire(asyncio.Transport):
    """What a connection has written, and what it did besides."""

    written: bytearray = field(default_factory=bytearray)
    is_closed: bool = False
    is_aborted: bool = False
    has_eof: bool = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_eof = True

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True

    @property
    def statuses(self) -> list[int]:
        """The status of every answer so far."""
        return [int(part[:3]) for part in bytes(self.written).split(b"HTTP/1.1 ")[1:]]


@dataclass
class Server:
    """An application whose connections are spoken to directly, under a clock that the test moves."""

    app: App
    listener: Listener
    batcher: Batcher
    loop: asyncio.AbstractEventLoop
    now: float = 100.0

    def connect(self) -> tuple[Connection, Wire]:
        """A new client."""
        wire, connection = Wire(), Connection(self.listener)
        self.do(connection.connection_made, wire)
        return connection, wire

    def do(self, call: Any, *arguments: Any) -> Any:
        """Call something on the event loop, where connections live."""

        async def called() -> Any:
            return call(*arguments)

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(timeout=20)

    def after(self, seconds: float) -> None:
        """Let time pass, and the listener look at its deadlines."""
        self.now += seconds
        self.do(self.listener.sweep)


@pytest.fixture
def board() -> Board:
    """Figures of one worker."""
    return Board(1)


@pytest.fixture
def server(served: ServedModel, loop: asyncio.AbstractEventLoop, board: Board) -> Iterator[Server]:
    """A server of the tiny model."""
    batcher = Batcher(SETTINGS, board, loop)
    batcher.model = served
    app = App(SETTINGS, board, batcher)
    made = Server(app, Listener(SETTINGS, app), batcher, loop)
    made.listener.clock = lambda: made.now
    yield made
    batcher.close()
    app.json_reader.shutdown()
