"""Bytes from anywhere: any URL that fsspec knows (https, s3, gs, file), read in pieces, each tried again when it fails.

A cut connection or a body that is too short shows as a piece of the wrong length and is asked for again; what is missing or
forbidden is said at once.
"""

import functools
import hashlib
import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError, DataError
from pipeline.files import publish, temporary_name

PIECE_BYTES = 8 << 20
ATTEMPTS = 8
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
SILENCE_SECONDS = 30.0  # of a server, before a request counts as failed
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
Answer = TypeVar("Answer")


def is_url(location: str) -> bool:
    """Whether a data set is named by a URL rather than a folder."""
    return "://" in location


def join(url: str, name: str) -> str:
    """The URL of `name` below `url`; a name that is a URL stands for itself."""
    return name if is_url(name) else f"{url.rstrip('/')}/{name}"


def _options(protocol: str) -> dict[str, Any]:
    if protocol in ("s3", "s3a"):
        quick = {"connect_timeout": SILENCE_SECONDS, "read_timeout": SILENCE_SECONDS, "retries": {"max_attempts": 1}}
        return {"config_kwargs": quick}
    if protocol in ("http", "https"):
        import aiohttp

        return {
            "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)}
        }
    return {}


@functools.lru_cache(maxsize=32)
def _open_filesystem(protocol: str, _process: int) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol, **_options(protocol))
    except ImportError as error:
        extra = EXTRAS.get(protocol, "train")
        raise ConfigError(
            f"{protocol}:// needs a package that is not here ({error}): pip install 'shardline[{extra}]'."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{protocol}:// is no kind of address that can be read ({error}).") from error


def _filesystem(url: str) -> Any:
    # A connection must not be carried over a fork: each process opens its own.
    return _open_filesystem(url.partition("://")[0], os.getpid())


def patiently(ask: Callable[[], Answer], url: str) -> Answer:
    """Return `ask()`, tried again with growing pauses. Raises DataError when it is of no use or was tried often enough."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except (DataError, ConfigError):
            raise
        except FileNotFoundError as error:
            raise DataError(f"{url}: is not there. Check the address (and AWS_ENDPOINT_URL for another S3 server).") from error
        except PermissionError as error:
            raise DataError(f"{url}: access is denied. Check the credentials and the address.") from error
        except Exception as error:  # every kind of server has its own
            if attempt == ATTEMPTS:
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise DataError(f"{url}: could not be read in {ATTEMPTS} attempts ({reason}).") from error
            pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - so that many clients do not come back at once
    raise AssertionError


def size_of(url: str) -> int:
    """Bytes of a remote file. Raises DataError."""
    found = patiently(lambda: _filesystem(url).info(url)["size"], url)
    if found is None:
        raise DataError(f"{url}: the server does not say how long it is.")
    return int(found)


def read_piece(url: str, start: int, stop: int, num_bytes: int) -> bytes:
    """Bytes start <= place < stop of a remote file that has `num_bytes` in all. Raises DataError."""

    def ask() -> bytes:
        piece = bytes(_filesystem(url).cat_file(url, start=start, end=stop))
        if len(piece) == num_bytes != stop - start:  # a server that knows no ranges sends all of it
            piece = piece[start:stop]
        if len(piece) != stop - start:
            raise OSError(f"{len(piece)} of {stop - start} bytes arrived")
        return piece

    return patiently(ask, url)


def read_all(url: str) -> bytes:
    """A small remote file whole. Raises DataError."""
    return patiently(lambda: bytes(_filesystem(url).cat_file(url)), url)


def download(url: str, target: Path, num_bytes: int, sha256: str) -> None:
    """Write a remote file to `target`, which a crash leaves half-written. Raises DataError when its bytes are not those told.

    Bytes that arrived whole but wrong are asked for once more.
    """
    for _ in range(2):
        digest = hashlib.sha256()
        with target.open("r+b" if target.exists() else "wb") as file:
            for start in range(0, num_bytes, PIECE_BYTES):
                piece = read_piece(url, start, min(start + PIECE_BYTES, num_bytes), num_bytes)
                digest.update(piece)
                file.write(piece)
            file.truncate()
        if digest.hexdigest() == sha256:
            return
    raise DataError(f"{url}: its sha256 is not the manifest's. Upload it again.")


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Bring a small remote file to `path`, whole or not at all, unless the right one is there. Raises DataError."""
    if path.is_file() and sha256 is not None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        if sha256 is None:
            temporary.write_bytes(read_all(url))
        else:
            download(url, temporary, size_of(url), sha256)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RemoteFile(io.RawIOBase):
    """A remote file read from its start to its end, in pieces that are each tried again when they fail."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.num_bytes = size_of(url)
        self.place = 0
        self._piece, self._first = b"", 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what comes next and return how much that was, 0 at the end. Raises DataError."""
        if self.place >= self._first + len(self._piece):
            if self.place >= self.num_bytes:
                return 0
            self._first = self.place
            self._piece = read_piece(self.url, self.place, min(self.place + PIECE_BYTES, self.num_bytes), self.num_bytes)
        start = self.place - self._first
        part = self._piece[start : start + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)
