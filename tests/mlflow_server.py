"""A real MLflow server on loopback that can be killed, stopped and started again, and a proxy before it that fails as told."""

import contextlib
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.web import listening

Fault = Literal["none", "500", "401", "slow", "artifacts"]
START_SECONDS = 120.0


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class MlflowServer:
    """MLflow with sqlite and a folder of artifacts, always on the same port."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            assert self.process.poll() is None, (self.folder / "log.txt").read_text()[-2000:]
            assert time.monotonic() < deadline, "MLflow does not answer"
            time.sleep(0.1)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it the hard way."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(timeout=20)


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """A started server, ended afterwards."""
    server = MlflowServer(folder)
    server.start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@dataclass
class Proxy:
    """What the proxy does with requests right now, and how many came."""

    port: int = 0
    fault: Fault = "none"
    num_requests: int = 0
    slow_seconds: float = 10.0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def proxy_before(server: MlflowServer) -> Iterator[Proxy]:
    """A proxy before `server`."""
    proxy = Proxy()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.num_requests += 1
            fault = proxy.fault
            if fault == "slow":
                time.sleep(proxy.slow_seconds)
            if fault in ("500", "401"):
                self._answer(int(fault), b"no")
            elif fault == "artifacts" and self.command == "PUT":
                self._answer(507, b"the store is full")
            else:
                with contextlib.suppress(OSError):  # the server has gone in the meantime
                    self._forward(body)

        def _forward(self, body: bytes) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            self._answer(answer.status, answer.read(), answer.headers.get("Content-Type", ""))
            connection.close()

        def _answer(self, status: int, content: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _pass_on  # noqa: N815 - http.server's names

    with listening(Handler) as proxy.port:
        yield proxy
