"""The pages that come with the server: files of `static/`, complete in themselves, so that they work without a network."""

import functools
from pathlib import Path

from pipeline.serving.exchange import JSON, Response

STATIC = Path(__file__).with_name("static")
# Their own style and script, requests to this server, and pictures that the visitor chose: nothing else may be loaded.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    ("content-security-policy", POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-cache"),
)


@functools.cache
def page(name: str) -> Response:
    """A file of `static/` as an answer."""
    content = (STATIC / name).read_bytes()
    if name.endswith(".json"):
        return Response(200, content, JSON)
    return Response(200, content, "text/html; charset=utf-8", HEADERS)
