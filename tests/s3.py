"""A real S3 server on loopback, and a proxy before it that fails as networks and servers do."""

import contextlib
import http.client
import http.server
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.web import listening

ACCESS_KEY, SECRET_KEY = "tester", "loopback-only"
START_SECONDS = 60.0


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """A SeaweedFS server with its S3 interface; yields the port. All of its processes end with the block."""
    weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    options = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
    options += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[len(names) :], strict=True)]
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", *options]
    command += [f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=8", "-master.telemetry=false"]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_for_s3(ports[3], process, folder / "weed.log")
        yield ports[3]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_s3(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        with contextlib.suppress(Exception):  # it answers before it can store
            system = filesystem(port)
            system.mkdir("ready", create_parents=True)
            system.pipe_file("ready/probe", b"x")
            assert system.cat_file("ready/probe") == b"x"
            return
        time.sleep(0.2)
    raise AssertionError(f"no S3 server within {START_SECONDS} s: {log.read_text()[-2000:]}")


def filesystem(port: int) -> Any:
    """An s3fs client of the server on `port`."""
    import s3fs

    return s3fs.S3FileSystem(
        key=ACCESS_KEY,
        secret=SECRET_KEY,
        endpoint_url=f"http://127.0.0.1:{port}",
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def environment(port: int) -> dict[str, str]:
    """What a process needs to read from the server on `port`."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@dataclass
class Faults:
    """What the proxy does wrong: errors by chance, and changes of the bodies that pass. `log` has (path, what was done)."""

    share_failing: float = 0.0
    cut_once: Callable[[str], bool] = lambda _: False  # which bodies are cut in the middle, the first time
    corrupt_once: Callable[[str], bool] = lambda _: False
    corrupt_always: Callable[[str], bool] = lambda _: False
    slow_seconds: float = 0.0
    log: list[tuple[str, str]] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(1))
    done: set[tuple[str, str]] = field(default_factory=set)

    def once(self, what: str, path: str, chosen: Callable[[str], bool]) -> bool:
        """Whether `what` is done to `path` now, for the first and last time."""
        if not chosen(path) or (what, path) in self.done:
            return False
        self.done.add((what, path))
        return True


@contextlib.contextmanager
def faulty_proxy(target_port: int, faults: Faults) -> Iterator[int]:
    """A proxy before the server on `target_port` that passes requests on, signatures and all, and fails as `faults` says."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?", 1)[0]
            if faults.draw.random() < faults.share_failing:
                self._fail(path)
                return
            connection = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            self._answer(path, answer, content)

        def _fail(self, path: str) -> None:
            code = faults.draw.choice([500, 503])
            faults.log.append((path, str(code)))
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _answer(self, path: str, answer: http.client.HTTPResponse, content: bytes) -> None:
            time.sleep(faults.slow_seconds)
            is_body = self.command == "GET" and answer.status in (200, 206) and len(content) > 1
            if is_body and (faults.corrupt_always(path) or faults.once("corrupt", path, faults.corrupt_once)):
                faults.log.append((path, "corrupt"))
                content = _flip(content)
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            faults.log.append((path, self.command))
            if self.command == "HEAD":
                return
            if is_body and faults.once("cut", path, faults.cut_once):
                faults.log.append((path, "cut"))
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815 - http.server's names

    with listening(Handler) as port:
        yield port


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def upload(port: int, folder: Path, bucket: str) -> None:
    """Put the files of a folder into a bucket."""
    system = filesystem(port)
    system.mkdir(bucket, create_parents=True)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            system.pipe_file(f"{bucket}/{path.name}", path.read_bytes())
