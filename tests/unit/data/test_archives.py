import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.data.sources import ImageSource
from pipeline.errors import DataError
from tests.unit.data.test_sources import opened

NAMES = ["./train/cat/1.jpg", "train/cat/deep/2.PNG", "train/dog/1.jpg", "val/cat/3.jpg", "val/dog/ö 4.jpg"]
OTHERS = ["train/readme.txt", "__MACOSX/._1.jpg", "loose.jpg"]


def content_of(name: str) -> bytes:
    return f"bytes of {Path(name).name}".encode() * 50


def make_tar(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name in [*NAMES, *OTHERS]:
            member = tarfile.TarInfo(name)
            member.size = len(content_of(name))
            tar.addfile(member, io.BytesIO(content_of(name)))
        folder = tarfile.TarInfo("train/empty.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    return path


def make_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in [*NAMES, *OTHERS]:
            file.writestr(name.removeprefix("./"), content_of(name))
    return path


@pytest.fixture(params=["tar", "zip"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ImageSource:
    """An archive of five images in two splits and two classes, and three files that are none."""
    return opened(make_tar(tmp_path / "a.tar") if request.param == "tar" else make_zip(tmp_path / "a.zip"))


def test_an_archive_is_listed_as_its_folders_would_be(source: ImageSource) -> None:
    found = {image.name: (source.class_names[image.labels[0]], image.split) for image in source.images()}
    assert found == {
        "train/cat/1.jpg": ("cat", "train"),
        "train/cat/deep/2.PNG": ("cat", "train"),
        "train/dog/1.jpg": ("dog", "train"),
        "val/cat/3.jpg": ("cat", "val"),
        "val/dog/ö 4.jpg": ("dog", "val"),
    }
    assert (source.kind, source.num_ignored) == ("archive", 3)
    for name in found:
        assert source.read(name) == content_of(name)


def test_a_forked_process_reads_what_its_parent_opened(source: ImageSource) -> None:
    names = [image.name for image in source.images()]
    source.read(names[0])
    child = os.fork()
    if child == 0:
        os._exit(0 if all(source.read(name) == content_of(name) for name in names * 20) else 1)
    assert all(source.read(name) == content_of(name) for name in names * 20)
    assert os.waitpid(child, 0)[1] == 0


def test_what_other_tools_pack_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    long = "c" * 90
    for name in ("cat", long):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{'x' * 80}.jpg").write_bytes(name.encode())
    for form in ("ustar", "gnu", "posix"):
        subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / f"{form}.tar", "-C", folder, "."], check=True)
        source = opened(tmp_path / f"{form}.tar")
        assert source.class_names == sorted(["cat", long])
        assert {source.read(image.name) for image in source.images()} == {b"cat", long.encode()}


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_a_compressed_tar_is_refused_with_the_remedy(mode: str, tmp_path: Path) -> None:
    path = make_tar(tmp_path / f"a.tar.{mode[2:]}", mode)
    with pytest.raises(DataError, match=r"is compressed, and no image in it can be read without all before it\. Decompress it"):
        opened(path)
    with pytest.raises(DataError, match="is compressed"):
        opened(path.rename(tmp_path / "a.tar"))


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_an_archive_that_is_none_or_missing_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name}: no such archive"):
        opened(tmp_path / name)
    (tmp_path / name).write_bytes(b"thesis" * 1000)
    with pytest.raises(DataError, match=rf"{name}: cannot be read as a (tar|zip)"):
        opened(tmp_path / name)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_an_archive_that_was_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    for path in (make_tar(tmp_path / "a.tar"), make_zip(tmp_path / "a.zip")):
        os.truncate(path, int(path.stat().st_size * share * 0.5))
        with pytest.raises(DataError, match=r"a\.(tar|zip): (cannot be read|was cut short)"):
            opened(path)


def test_a_damaged_member_of_a_zip_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("cat/1.jpg", "dog/1.jpg"):
            file.writestr(name, b"0123456789" * 10)
    content = bytearray(path.read_bytes())
    content[content.index(b"0123456789") + 5] ^= 1
    path.write_bytes(content)
    source = opened(path)
    with pytest.raises(DataError, match="damaged in the archive"):
        source.read("cat/1.jpg")
    assert source.read("dog/1.jpg") == b"0123456789" * 10


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    place = 0
    while (place := content.find(b"PK\x01\x02", place)) >= 0:
        content[place + 8] |= 1  # the flag in the table of contents
        place += 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is encrypted .* Unpack it and give the folder"):
        opened(path)


def test_links_in_a_tar_are_images_too_and_those_that_lead_nowhere_fail_when_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("cat/1.jpg", "dog/1.jpg"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content_of(name))
    os.link(folder / "cat/1.jpg", folder / "dog/hard.jpg")
    (folder / "dog/soft.jpg").symlink_to("../cat/1.jpg")
    (folder / "dog/gone.jpg").symlink_to("nowhere.jpg")
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", folder, "."], check=True)
    source = opened(tmp_path / "a.tar")
    names = [image.name for image in source.images()]
    assert names == ["cat/1.jpg", "dog/1.jpg", "dog/gone.jpg", "dog/hard.jpg", "dog/soft.jpg"]
    assert source.read("dog/hard.jpg") == source.read("dog/soft.jpg") == content_of("cat/1.jpg")
    with pytest.raises(DataError, match=r"is a link to dog/nowhere\.jpg, which is no image in the archive"):
        source.read("dog/gone.jpg")
    assert source.num_ignored == 0


def test_a_zip_with_the_slashes_of_windows_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("cat\\1.jpg", "dog\\1.jpg"):
            file.writestr(name, name)
    source = opened(tmp_path / "a.zip")
    assert [image.name for image in source.images()] == ["cat/1.jpg", "dog/1.jpg"]
    assert source.read("dog/1.jpg") == b"dog\\1.jpg"


def test_a_member_that_is_damaged_whatever_its_compression_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as file:
        for name in ("cat/1.jpg", "dog/1.jpg"):
            file.writestr(name, os.urandom(500))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[60:300] = bytes(240)
    (tmp_path / "a.zip").write_bytes(content)
    source = opened(tmp_path / "a.zip")
    with pytest.raises(DataError, match="damaged in the archive"):
        source.read("cat/1.jpg")
