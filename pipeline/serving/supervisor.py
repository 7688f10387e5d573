"""`shardline serve`: the port, the process that follows a registered model, and as many workers as were asked for.

A single worker is this very process. Several share the listening socket; one that dies is replaced, and all end when this one
does, also by kill -9: each holds the end of a pipe that breaks then.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.console import say
from pipeline.errors import ConfigError
from pipeline.files import sha256_of
from pipeline.serving.metrics import PLACES, Board
from pipeline.serving.reload import ModelSource
from pipeline.serving.served import version_of
from pipeline.serving.settings import ServeSettings
from pipeline.serving.worker import BACKLOG, Post, banner, work

TICK_SECONDS = 0.05
# A worker that dies at once is not started again at once.
LONGEST_PAUSE_SECONDS = 30.0
HEALTHY_SECONDS = 10.0
POINTER = "model.json"


def serve(settings: ServeSettings, model: Path | None, follow: list[str]) -> int:
    """Serve a model file; or, where there is none, what `follow` finds: a command that gets a folder and keeps POINTER in it.

    Returns the exit code. Raises ModelError for a model that is none, ConfigError for a port that cannot be had.
    """
    with _listening(settings) as sock, contextlib.ExitStack() as stack:
        source = ModelSource(model) if model is not None else None
        if source is None:
            follower = stack.enter_context(_following(follow))
            if code := follower.wait_for_pointer():
                return code
            source = ModelSource(follower.folder / POINTER, is_pointer=True)
        board = Board(settings.workers)
        address = _address_of(sock)
        post = Post(settings, source, sock.detach(), board.descriptor, address)
        return work(post) if settings.workers == 1 else _Supervisor(post, board).run()


@contextlib.contextmanager
def _listening(settings: ServeSettings) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        where = f"{settings.host}:{settings.port}"
        raise ConfigError(f"cannot listen on {where} ({error}). Give another --port (0 for any free one) or --host.") from error
    with sock:
        sock.listen(BACKLOG)
        sock.setblocking(False)
        yield sock


def _address_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


# ---- a registered model ----


@dataclass
class _Follower:
    """The process that keeps a pointer to a registered model; it is started again when it dies."""

    command: list[str]
    folder: Path
    process: "subprocess.Popen[bytes]"
    is_ending: threading.Event = field(default_factory=threading.Event)

    def wait_for_pointer(self) -> int:
        """0 once there is a model; the exit code of the process where it ends before, having said why."""
        while not (self.folder / POINTER).is_file():
            code = self.process.poll()
            if code is not None:
                return code if code > 0 else 1
            time.sleep(TICK_SECONDS)
        threading.Thread(target=self._keep_alive, daemon=True).start()
        return 0

    def _keep_alive(self) -> None:
        while True:
            self.process.wait()
            if self.is_ending.wait(HEALTHY_SECONDS):
                return
            self.process = _start_follower(self.command, self.folder)


def _start_follower(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    # It ends when its standard input does, so that it cannot outlive the server; a group of its own keeps ^C from it.
    return subprocess.Popen([*command, str(folder / POINTER)], stdin=subprocess.PIPE, start_new_session=True)


@contextlib.contextmanager
def _following(command: list[str]) -> Iterator[_Follower]:
    folder = Path(tempfile.mkdtemp(prefix="shardline-serve-"))
    follower = _Follower(command, folder, _start_follower(command, folder))
    try:
        yield follower
    finally:
        follower.is_ending.set()
        follower.process.terminate()
        follower.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# ---- several workers ----


@dataclass
class _Place:
    """A worker's place: the process in it, and how often the last ones died early."""

    number: int
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    num_deaths: int = 0


class _Supervisor:
    def __init__(self, post: Post, board: Board) -> None:
        self.post, self.board = post, board
        self.places = [_Place(number) for number in range(post.settings.workers)]
        self.is_stopped = self.is_forced = False
        self.lifeline, self.own_end = os.pipe()

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            code = self._start() or self._watch()
        finally:
            self._end_all()
        return code or int(self.is_forced)

    def _stop(self, *_: object) -> None:
        if self.is_stopped:  # already: this is the second, and ends it at once
            self.is_forced = True
            for place in self.places:
                if place.process is not None:
                    place.process.kill()
        self.is_stopped = True

    def _start(self) -> int:
        """Start the first, and the others once it answers: a bad model is complained of once. Its exit code if it ends."""
        for place in self.places:
            self._fill(place)
            if place.number == 0 and (code := self._wait_ready([place])):
                return code
        if code := self._wait_ready(self.places):
            return code
        if not self.is_stopped:
            path, name, version = self.post.source.locate()
            say(banner(name, version or version_of(sha256_of(path)), self.post.address))
        return 0

    def _wait_ready(self, places: list[_Place]) -> int:
        while not self.is_stopped and any(not self._is_ready(place) for place in places):
            for place in places:
                code = None if place.process is None else place.process.poll()
                if code is not None:
                    return code if code > 0 else 1
            time.sleep(TICK_SECONDS)
        return 0

    def _is_ready(self, place: _Place) -> bool:
        return bool(self.board.rows[place.number, PLACES["ready_workers"]])

    def _watch(self) -> int:
        while not self.is_stopped:
            time.sleep(TICK_SECONDS)
            for place in self.places:
                if place.process is not None and place.process.poll() is not None:
                    self._mourn(place)
                if place.process is None and time.monotonic() >= place.started:
                    self._fill(place)
        return 0

    def _mourn(self, place: _Place) -> None:
        """Note that a worker died, and when another may take its place."""
        assert place.process is not None
        now = time.monotonic()
        place.num_deaths = place.num_deaths + 1 if now - place.started < HEALTHY_SECONDS else 0
        pause = min(0.1 * 2**place.num_deaths, LONGEST_PAUSE_SECONDS) if place.num_deaths else 0.0
        self.board.forget(place.number)
        say(f"serve: worker {place.number} ended with {place.process.returncode}; another takes its place")
        place.process, place.started = None, now + pause

    def _fill(self, place: _Place) -> None:
        post = dataclasses.replace(self.post, number=place.number, lifeline=self.lifeline)
        place.started = time.monotonic()
        place.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.serving.worker", post.to_json()],
            pass_fds=(post.listening, post.board, post.lifeline),
            start_new_session=True,  # ^C is for this process, which tells them
        )

    def _end_all(self) -> None:
        os.close(self.post.listening)  # or it would go on taking connections that nobody answers
        processes = [place.process for place in self.places if place.process is not None]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + 2 * self.post.settings.timeout_seconds + 5
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.close(self.own_end)
        os.close(self.lifeline)
