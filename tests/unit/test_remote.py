import hashlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import remote
from pipeline.errors import ConfigError, DataError
from pipeline.remote import RemoteFile, download, fetch, is_url, join, read_all, read_piece, size_of
from tests.s3 import Faults, faulty_proxy
from tests.web import web_server

CONTENT = bytes(range(256)) * 40  # 10,240 bytes, four pieces


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces and short pauses."""
    monkeypatch.setattr(remote, "PIECE_BYTES", 3000)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(remote, "ATTEMPTS", 4)


@pytest.fixture
def faults() -> Faults:
    """What goes wrong on the way; nothing unless a test says so."""
    return Faults()


@pytest.fixture
def url(tmp_path: Path, faults: Faults) -> Iterator[str]:
    """The address of CONTENT behind the proxy."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "shard.tar").write_bytes(CONTENT)
    with web_server(tmp_path / "web") as port, faulty_proxy(port, faults) as proxy:
        yield f"http://127.0.0.1:{proxy}/shard.tar"


def brought(url: str, target: Path, sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> bytes:
    download(url, target, len(CONTENT), sha256)
    return target.read_bytes()


def test_addresses_are_told_from_folders_and_joined() -> None:
    assert [is_url(text) for text in ("s3://b/x", "https://h", "data/x", "/data", "C:x")] == [True, True, False, False, False]
    assert join("s3://b/data/", "train.tar") == "s3://b/data/train.tar"
    assert join("s3://b/data", "https://h/x.tar") == "https://h/x.tar"


def test_a_file_comes_in_pieces(url: str, faults: Faults, tmp_path: Path) -> None:
    assert size_of(url) == len(CONTENT)
    assert read_piece(url, 100, 200, len(CONTENT)) == CONTENT[100:200]
    assert read_all(url) == CONTENT
    faults.log.clear()
    assert brought(url, tmp_path / "x") == CONTENT
    assert [what for _, what in faults.log] == ["GET"] * 4


def test_a_piece_that_fails_or_is_cut_is_asked_for_again(url: str, faults: Faults, tmp_path: Path) -> None:
    faults.share_failing = 0.3
    faults.cut_once = lambda path: True
    assert brought(url, tmp_path / "x") == CONTENT
    assert {"cut"} < {what for _, what in faults.log}


def test_wrong_bytes_are_fetched_once_more_and_then_refused(url: str, faults: Faults, tmp_path: Path) -> None:
    faults.corrupt_once = lambda path: True
    assert brought(url, tmp_path / "x") == CONTENT
    faults.corrupt_always = lambda path: True
    with pytest.raises(DataError, match=r"shard\.tar: its sha256 is not the manifest's\. Upload it again"):
        brought(url, tmp_path / "x")


def test_a_shorter_file_than_told_is_refused_after_some_attempts(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shard\.tar: could not be read in 4 attempts"):
        download(url, tmp_path / "x", len(CONTENT) + 10, "0" * 64)


def test_a_server_that_always_fails_is_given_up_with_its_answer(url: str, faults: Faults, tmp_path: Path) -> None:
    faults.share_failing = 1.0
    with pytest.raises(DataError, match=r"shard\.tar: could not be read in 4 attempts \(50[03]"):
        brought(url, tmp_path / "x")
    assert len(faults.log) == 4


def test_what_is_not_there_is_said_at_once(url: str, faults: Faults) -> None:
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"nowhere\.tar: is not there\. Check the address"):
        read_all(url.replace("shard", "nowhere"))
    assert len(faults.log) == 1
    assert time.monotonic() - begun < 5


def test_a_server_without_byte_ranges_will_do(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "shard.tar").write_bytes(CONTENT)
    with web_server(tmp_path / "web", ranges=False) as port:
        assert brought(f"http://127.0.0.1:{port}/shard.tar", tmp_path / "x") == CONTENT


def test_a_file_is_fetched_whole_or_not_at_all(url: str, faults: Faults, tmp_path: Path) -> None:
    fetch(url, tmp_path / "deep" / "copy", hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "deep" / "copy").read_bytes() == CONTENT
    with pytest.raises(DataError, match="its sha256 is not"):
        fetch(url, tmp_path / "deep" / "other", "0" * 64)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]


def test_a_remote_file_reads_like_one_on_disk(url: str, faults: Faults) -> None:
    faults.share_failing = 0.2
    file = io.BufferedReader(RemoteFile(url), buffer_size=700)
    assert file.read(5000) == CONTENT[:5000]
    assert file.read() == CONTENT[5000:]
    assert file.read(1) == b""


def test_a_forked_process_opens_connections_of_its_own(url: str) -> None:
    assert read_piece(url, 0, 10, len(CONTENT)) == CONTENT[:10]
    child = os.fork()
    if child == 0:
        os._exit(0 if read_piece(url, 10, 20, len(CONTENT)) == CONTENT[10:20] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert read_piece(url, 20, 30, len(CONTENT)) == CONTENT[20:30]


def test_an_address_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="nonsense:// is no kind of address"):
        read_all("nonsense://host/file")
