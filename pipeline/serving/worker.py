"""One process that serves: its event loop, from the first request that it may take to the last that it finishes.

SIGTERM and SIGINT: /ready says 503 at once; what was sent before is read and answered; then the port is closed, with what is
idle, and the process ends with 0 when the last answer is out. A second signal ends it at once.
"""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import uvloop

from pipeline.console import say
from pipeline.errors import ShardlineError
from pipeline.files import allow_open_files
from pipeline.serving.app import App
from pipeline.serving.batching import Batcher
from pipeline.serving.connection import SWEEP_SECONDS, Connection, Listener
from pipeline.serving.metrics import Board, resident_bytes
from pipeline.serving.reload import ModelSource, Reloader
from pipeline.serving.settings import MAX_CONNECTIONS, ServeSettings

# Long enough for what the kernel holds already to be accepted and read.
GRACE_SECONDS = 0.1
BACKLOG = 2048


@dataclass(frozen=True)
class Post:
    """What a worker is given: open descriptors, its number, and the address by which it is known."""

    settings: ServeSettings
    source: ModelSource
    listening: int
    board: int
    address: str
    lifeline: int = -1  # ends when the process that started it does
    number: int = 0

    def to_json(self) -> str:
        """The word of a command line that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self) | {"source": [str(self.source.path), self.source.is_pointer]})

    @classmethod
    def from_json(cls, text: str) -> "Post":
        """Read what `to_json` wrote."""
        values = json.loads(text)
        path, is_pointer = values.pop("source")
        settings = ServeSettings(**values.pop("settings"))
        return cls(settings=settings, source=ModelSource(Path(path), is_pointer), **values)


def work(post: Post) -> int:
    """Serve until a signal comes; the exit code. Raises ModelError where there is no model to begin with."""
    allow_open_files(MAX_CONNECTIONS + 256)
    return uvloop.run(_Worker(post).run())


class _Worker:
    def __init__(self, post: Post) -> None:
        self.post, self.settings = post, post.settings
        self.board = Board(post.settings.workers, post.number, post.board)
        self.stop = asyncio.Event()
        self.num_signals = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        if self.post.lifeline >= 0:
            loop.add_reader(self.post.lifeline, self._end_orphan)
        batcher = Batcher(self.settings, self.board, loop)
        app = App(self.settings, self.board, batcher)
        listener = Listener(self.settings, app)
        # From here on it is this worker's own: it is closed with the server, and who connects afterwards is refused.
        sock = socket.socket(fileno=self.post.listening)
        server = await loop.create_server(lambda: Connection(listener), sock=sock, backlog=BACKLOG)
        tasks = [asyncio.create_task(self._sweep(listener, batcher))]
        try:
            reloader = Reloader(self.post.source, self.settings, batcher, self.board, speaks=self.post.number == 0)
            if await self._unless_stopped(asyncio.create_task(reloader.load_first())):
                self.board.show("ready_workers", 1)
                if self.settings.workers == 1:
                    say(banner(app.model.name, app.model.version, self.post.address))
                tasks.append(asyncio.create_task(reloader.watch()))
                await self._until_stopped(tasks)
            app.is_draining = True
            self.board.show("ready_workers", 0)
            await self._drain(server, listener)
        finally:
            for task in tasks:
                task.cancel()
            server.close()
            listener.abort()
        batcher.close()
        app.json_reader.shutdown(wait=False, cancel_futures=True)
        return 0

    async def _unless_stopped(self, load: "asyncio.Task[object]") -> bool:
        """Whether the model was loaded before a signal came."""
        stopped = asyncio.create_task(self.stop.wait())
        await asyncio.wait({load, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not load.done():
            load.cancel()
            return False
        load.result()
        return True

    async def _until_stopped(self, tasks: "list[asyncio.Task[None]]") -> None:
        """Wait for a signal. A task of ours that ends before does so by a mistake, which is raised, not kept to itself."""
        stopped = asyncio.create_task(self.stop.wait())
        await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        for task in tasks:
            if task.done():
                task.result()

    async def _sweep(self, listener: Listener, batcher: Batcher) -> None:
        while True:
            began = listener.clock()
            await asyncio.sleep(SWEEP_SECONDS)
            late = listener.clock() - began - SWEEP_SECONDS
            if late > SWEEP_SECONDS:
                listener.forgive(late)
            listener.sweep()
            self.board.show("waiting_images", batcher.num_waiting)
            self.board.show("connections", len(listener.connections))
            self.board.show("held_bytes", listener.num_held_bytes)
            self.board.show("resident_bytes", resident_bytes())

    async def _drain(self, server: asyncio.Server, listener: Listener) -> None:
        # From now on each answer says that it is the last of its connection, so that clients leave it and not we them.
        listener.is_draining = True
        await asyncio.sleep(GRACE_SECONDS)
        # A busy machine may have slept through that: a timer is looked at before the sockets are. Each turn of the loop looks
        # at them once: the first accepts the last connections, the next ones read what was sent on them.
        for _ in range(4):
            await asyncio.sleep(0)
        server.close()
        listener.drain()
        # Each has a deadline of its own: for its body, then for its answer.
        deadline = listener.clock() + 2 * self.settings.timeout_seconds
        while listener.connections and listener.clock() < deadline:
            await asyncio.sleep(0.01)

    def _end(self) -> None:
        self.num_signals += 1
        if self.num_signals > 1:
            os._exit(1)
        self.stop.set()

    def _end_orphan(self) -> None:
        asyncio.get_running_loop().remove_reader(self.post.lifeline)
        self.stop.set()


def banner(name: str, version: str, address: str) -> str:
    """The line that says that requests may come."""
    return f"serving {name} {version} on {address}"


def main(argument: str) -> int:
    """A worker among several. What a person can mend is one line, as everywhere."""
    try:
        return work(Post.from_json(argument))
    except ShardlineError as error:
        print(f"shardline: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
