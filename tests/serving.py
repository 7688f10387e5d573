"""`shardline serve` on a free port, and the simplest client of it."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import started, wait_until

STARTED = re.compile(r"^serving (\S+) (\S+) on (http://\S+)$", re.MULTILINE)


@dataclass
class Served:
    """A server at work."""

    process: "subprocess.Popen[bytes]"
    log: Path
    name: str = ""
    version: str = ""
    url: str = ""

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a route."""
        return self.ask(urllib.request.Request(f"{self.url}{path}"))

    def post(self, path: str, body: bytes, kind: str = "application/octet-stream") -> tuple[int, Any]:
        """Status and JSON of an answer."""
        return self.ask(urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": kind}))

    def ask(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def connect(self) -> socket.socket:
        """A bare connection."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def said(self, words: str) -> bool:
        return words in self.log.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop it and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(*arguments: str, cwd: Path, log: Path, **environment: str) -> Iterator[Served]:
    """A server on a free port, ready."""
    with started("serve", *arguments, "--port=0", cwd=cwd, log=log, **environment) as process:
        server = Served(process, log)
        wait_until(lambda: bool(STARTED.search(log.read_text())) or process.poll() is not None, "the server")
        found = STARTED.search(log.read_text())
        assert found, log.read_text()
        server.name, server.version, server.url = found.groups()
        yield server
