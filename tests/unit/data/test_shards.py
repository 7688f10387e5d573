import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.labels import SampleRule
from pipeline.data.shards import ShardSample, read_key, read_samples
from pipeline.errors import DataError

RULE = SampleRule("cls", "", ("cat", "dog", "bird"))
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=form) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples_of(path: Path, rule: SampleRule = RULE) -> dict[str, tuple[bytes, list[Any]]]:
    """Image bytes and labels by key; each key must also be found again from the place of its image."""
    content = path.read_bytes()
    found = {}
    for sample in read_samples(path, rule):
        assert read_key(lambda offset, size: content[offset : offset + size], sample.offset) == sample.key
        found[sample.key] = (content[sample.offset : sample.offset + sample.size], sample.labels)
    return found


def test_a_sample_is_a_run_of_members_with_one_key(tmp_path: Path) -> None:
    members = {
        "__meta__.json": b"{}",
        "__index__/a.jpg": b"not a sample",
        "v1.0/a.JPEG": b"image a",
        "v1.0/a.json": b"{}",
        "v1.0/a.cls": b" 2\n",
        "b.cls": b"0",
        "b.mask.png": b"not the image",
        "b.png": b"image b",
        "README": b"no extension, no sample",
        ".hidden": b"nor this",
    }
    path = write_tar(tmp_path / "any.tar", members)
    assert samples_of(path) == {"v1.0/a": (b"image a", [2]), "b": (b"image b", [0])}
    assert next(read_samples(path, RULE)) == ShardSample("v1.0/a", path.read_bytes().index(b"image a"), 7, [2])


def test_the_extension_of_the_image_can_be_chosen(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "any.tar", {"a.jpg": b"J", "a.seg.png": b"S", "a.png": b"P", "a.cls": b"1"})
    for extension, content in (("", b"J"), ("png", b"P"), ("seg.png", b"S")):
        assert samples_of(path, SampleRule("cls", extension, ())) == {"a": (content, [1])}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "key",
    ["a", "folder/a", "x" * 96, "folder/" + "y" * 90, "f" * 90 + "/" + "g" * 90, "deep/" * 30 + "z" * 80, "Käfer 漢字/ö" * 3],
)
def test_names_of_any_length_and_letters_are_read_in_every_form_of_tar(key: str, form: str, tmp_path: Path) -> None:
    members = {f"{key}.jpg": b"image" * 200, f"{key}.cls": b"1", "next.jpg": b"n", "next.cls": b"2"}
    try:
        path = write_tar(tmp_path / "any.tar", members, FORMATS[form])
    except ValueError:
        pytest.skip("this form has no room for such a name")
    assert samples_of(path) == {key: (b"image" * 200, [1]), "next": (b"n", [2])}


@pytest.mark.parametrize("form", ["ustar", "gnu", "posix", "v7"])
def test_what_the_tar_command_packs_is_read(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    keys = ["1/a", "2/" + "n" * 80] + (["3/" + "m" * 150] if form in ("gnu", "posix") else [])
    for label, key in enumerate(keys):
        (folder / key).parent.mkdir(parents=True)
        (folder / f"{key}.jpg").write_bytes(key.encode())
        (folder / f"{key}.cls").write_text(str(label))
    command = ["tar", f"--format={form}", "--sort=name", "-cf", str(tmp_path / "any.tar"), "-C", str(folder)]
    subprocess.run([*command, *(key.split("/")[0] for key in keys)], check=True)
    assert samples_of(tmp_path / "any.tar") == {key: (key.encode(), [label]) for label, key in enumerate(keys)}


def test_labels_may_be_names_or_fields(tmp_path: Path) -> None:
    members = {"a.jpg": b"x", "a.txt": b"dog", "a.json": b'{"meta": {"kinds": ["cat", 2]}}'}
    path = write_tar(tmp_path / "any.tar", members)
    assert samples_of(path, SampleRule("txt", "", ()))["a"][1] == ["dog"]
    assert samples_of(path, SampleRule("json:meta.kinds", "", ()))["a"][1] == ["cat", 2]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x", "b.jpg": b"x", "b.cls": b"1"}, r"any\.tar: sample a lacks its \.cls label"),
        ({"a.cls": b"1"}, r"any\.tar: sample a lacks its image"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, r"any\.tar: sample a has 'cat' in its \.cls member, not a class number"),
        ({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x", "b.cls": b"1", "a.txt": b""}, "sample a comes twice, or its members"),
        ({"a.jpg": b"x", "a.JPG": b"x", "a.cls": b"1"}, r"a\.JPG comes twice in its sample"),
    ],
)
def test_a_sample_that_is_not_whole_is_reported_by_shard_and_key(
    members: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        samples_of(write_tar(tmp_path / "any.tar", members))


def a_link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def compressed(path: Path) -> None:
    write_tar(path, {"a.jpg": b"x", "a.cls": b"1"}, mode="w:gz")


def cut(path: Path) -> None:
    content = write_tar(path, {"a.jpg": b"x" * 5000, "a.cls": b"1"}).read_bytes()
    path.write_bytes(content[:3000])


def cut_between_members(path: Path) -> None:
    content = write_tar(path, {"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x" * 512, "b.cls": b"1"}).read_bytes()
    path.write_bytes(content[:3072])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_link, r"any\.tar: a\.jpg is a link, whose bytes lie elsewhere"),
        (compressed, r"any\.tar: is compressed \(gzip\).*Decompress it, or train on it as a stream"),
        (cut, r"any\.tar: was cut short"),
        (cut_between_members, r"any\.tar: was cut short"),
        (lambda path: path.write_bytes(b""), r"any\.tar: was cut short, or is no tar"),
        (lambda path: path.write_bytes(b"thesis" * 999), r"any\.tar: was cut short, or is no tar"),
        (lambda path: path.write_bytes(b"thesis" * 999 + bytes(2048)), r"any\.tar: cannot be read as a tar"),
    ],
)
def test_a_file_that_is_no_whole_tar_of_files_is_named(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "any.tar")
    with pytest.raises(DataError, match=message):
        samples_of(tmp_path / "any.tar")


def test_a_tar_inside_an_image_does_not_lend_it_a_name(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", {"n" * 150 + ".jpg": b"x"}, tarfile.GNU_FORMAT).read_bytes()
    path = write_tar(tmp_path / "any.tar", {"a.jpg": inner[:2048], "a.cls": b"1", "b.jpg": b"b", "b.cls": b"2"})
    assert list(samples_of(path)) == ["a", "b"]
