import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from pipeline.data import tar_writer
from pipeline.data.tar_writer import TarWriter, tar_header

MEMBERS = {"00000000-a.jpg": b"x" * 700, "00000000-a.cls": b"3", "b" * 95 + ".jpg": b"y" * 512, "empty.txt": b"", "c.png": b"z"}


def as_tarfile_writes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("size", [0, 1, 512, 68_000, 8**11 - 1])
def test_a_header_is_the_one_of_the_standard_library(size: int) -> None:
    member = tarfile.TarInfo("00000000-some_name.jpg")
    member.size = size
    assert tar_header(member.name, size) == member.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("pieces_at_a_time", [1, 3, 500])
def test_a_tar_is_byte_for_byte_the_one_of_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces_at_a_time: int
) -> None:
    monkeypatch.setattr(tar_writer, "PIECES_AT_A_TIME", pieces_at_a_time)
    writer = TarWriter(tmp_path / "a.tar")
    offsets = [writer.add(name, content) for name, content in MEMBERS.items()]
    sha256 = writer.finish()
    written = (tmp_path / "a.tar").read_bytes()
    assert written == as_tarfile_writes(MEMBERS)
    assert (sha256, writer.num_bytes) == (hashlib.sha256(written).hexdigest(), len(written))
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert offsets == [member.offset_data for member in tar]


def test_what_the_system_takes_only_in_part_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, write = os.writev, os.write
    monkeypatch.setattr(os, "writev", lambda descriptor, pieces: whole(descriptor, [b"".join(pieces)[:1000]]))
    monkeypatch.setattr(os, "write", lambda descriptor, rest: write(descriptor, rest[:300]))
    writer = TarWriter(tmp_path / "a.tar")
    for name, content in MEMBERS.items():
        writer.add(name, content)
    writer.finish()
    monkeypatch.undo()
    assert (tmp_path / "a.tar").read_bytes() == as_tarfile_writes(MEMBERS)


def test_gnu_tar_lists_it_without_a_complaint(tmp_path: Path) -> None:
    writer = TarWriter(tmp_path / "a.tar")
    for name, content in MEMBERS.items():
        writer.add(name, content)
    writer.finish()
    done = subprocess.run(["tar", "tvf", tmp_path / "a.tar"], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[-1] for line in done.stdout.splitlines()] == list(MEMBERS)


def test_an_abandoned_tar_is_gone(tmp_path: Path) -> None:
    writer = TarWriter(tmp_path / "a.tar")
    writer.add("a.jpg", bytes(10))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
