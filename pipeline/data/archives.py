"""A tar or zip of folders of images, read in place: nothing is unpacked to disk.

The table of contents is held in memory, some hundred bytes an image.
"""

import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.class_folders import ClassFolders, Folder, is_image_name
from pipeline.data.sources import ImageSource, ListedImage
from pipeline.errors import DataError

BLOCK = 512
NOWHERE = (0, 0)  # where the image of a link lies that leads to none
ENCRYPTED = 0x1  # bit of a zip member's flags
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError)


class ArchiveImages(ImageSource):
    """The images of an archive, by the same rules as those of a folder. Raises DataError for one that cannot be read."""

    kind = "archive"

    def __init__(self, path: Path, class_level: int | None) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: no such archive.")
        self.members, num_files = self._contents()
        self.folders = ClassFolders({folder_of(name) for name in self.members}, class_level, str(path))
        self.class_names = self.folders.class_names
        self._num_other = num_files - len(self.members)

    @abstractmethod
    def _contents(self) -> tuple[dict[str, tuple[int, int]], int]:
        """(facts of each image by its name, number of all files)."""

    def images(self) -> Iterator[ListedImage]:
        """List the images by name."""
        self.num_ignored = self._num_other
        for name in sorted(self.members, key=lambda name: name.encode(errors="surrogatepass")):
            place = self.folders.place(folder_of(name))
            if place is None:
                self.num_ignored += 1
            else:
                yield ListedImage(name, (place[0],), place[1], self.members[name])


def folder_of(name: str) -> Folder:
    """The folders of a member, without those that mean nothing."""
    return tuple(part for part in name.split("/")[:-1] if part not in ("", "."))


def open_archive(path: Path, class_level: int | None) -> ArchiveImages:
    """Return the source in a tar or zip. Raises DataError."""
    if path.name.lower().endswith(".zip"):
        return ZipImages(path, class_level)
    return TarImages(path, class_level)


class TarImages(ArchiveImages):
    """An uncompressed tar. The facts of a member are its place and size."""

    def _contents(self) -> tuple[dict[str, tuple[int, int]], int]:
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        members, num_files = dict[str, tuple[int, int]](), 0
        self._links = dict[str, str]()  # images that are only another name of one; tar itself makes hard links
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    num_files += not member.isdir()
                    name = member.name.removeprefix("./")
                    if is_image_name(name) and member.isreg():
                        members[name] = (member.size, member.offset_data)
                    elif is_image_name(name) and (member.islnk() or member.issym()):
                        beside = posixpath.dirname(name) if member.issym() else ""
                        self._links[name] = posixpath.normpath(posixpath.join(beside, member.linkname))
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        except BROKEN as error:
            raise DataError(f"{self.path}: {_why_unreadable(self.path, error)}") from error
        # A tar that was cut between two members reads well; but every tar ends with a block of zeros.
        last = os.pread(self._descriptor, BLOCK, max(0, os.fstat(self._descriptor).st_size - BLOCK))
        if any(last):
            raise DataError(f"{self.path}: was cut short: it does not end as a tar does. Copy it again.")
        for name in self._links:
            members[name] = members.get(self._target(name), NOWHERE)
        return members, num_files

    def _target(self, name: str) -> str:
        """What a link leads to in the end; links that lead in a circle end at one of them."""
        for _ in self._links:
            if name not in self._links:
                break
            name = self._links[name]
        return name

    def read(self, name: str) -> bytes:
        """The member's bytes; the place is given with each read, so processes may share the open file. Raises DataError."""
        if self.members[name] == NOWHERE:
            raise DataError(f"is a link to {self._links[name]}, which is no image in the archive")
        size, offset = self.members[name]
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        """Close the tar."""
        os.close(self._descriptor)


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "is compressed, and no image in it can be read without all before it. Decompress it first (gunzip, unxz, ...)."
    return f"cannot be read as a tar ({str(error) or type(error).__name__}). It may have been cut short: copy it again."


class ZipImages(ArchiveImages):
    """A zip. The facts of a member are its size and checksum."""

    def _contents(self) -> tuple[dict[str, tuple[int, int]], int]:
        members, num_files = {}, 0
        self._stored = dict[str, str]()
        for member in self._open().infolist():
            num_files += not member.is_dir()
            name = member.filename.replace("\\", "/")  # as some programs on Windows write it
            if member.is_dir() or not is_image_name(name):
                continue
            if member.flag_bits & ENCRYPTED:
                raise DataError(f"{self.path}: is encrypted ({member.filename}). Unpack it and give the folder.")
            members[name] = (member.file_size, member.CRC)
            self._stored[name] = member.filename
        return members, num_files

    def _open(self) -> zipfile.ZipFile:
        try:
            self._zip, self._process = zipfile.ZipFile(self.path), os.getpid()
        except BROKEN as error:
            raise DataError(f"{self.path}: cannot be read as a zip ({error}). Copy it again.") from error
        return self._zip

    def read(self, name: str) -> bytes:
        """The member's bytes. Raises DataError when they are damaged."""
        if self._process != os.getpid():  # a forked process would move the place in its parent's open file
            self._open()
        try:
            return self._zip.read(self._stored[name])
        except BROKEN as error:
            raise DataError(f"damaged in the archive ({error})") from error
        except NotImplementedError as error:
            raise DataError(f"compressed in a way that Python does not know ({error})") from error

    def close(self) -> None:
        """Close the zip."""
        self._zip.close()
