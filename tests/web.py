"""Web servers on loopback: any handler, and one for the files of a folder, with byte ranges (or without them) and a listing."""

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def listening(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    """Answer requests on a free port of loopback with `handler`, each in a thread of its own, and yield the port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


@contextlib.contextmanager
def web_server(folder: Path, *, ranges: bool = True) -> Iterator[int]:
    """Serve `folder` and yield the port."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not ranges or span is None or not path.is_file():
                super().do_GET()
                return
            content = path.read_bytes()
            part = content[int(span[1]) : int(span[2]) + 1 if span[2] else None]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(part)

    with listening(Handler) as port:
        yield port
