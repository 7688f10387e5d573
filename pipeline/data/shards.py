"""The samples of WebDataset tars, ours and anybody's, by their headers: where each image lies and what its label says.

The naming rules are those of the webdataset library: a sample is a run of members with one key, the name up to the first dot
after the last slash; all the rest of the name, in small letters, is the extension.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.labels import RawLabel, SampleRule, raw_labels
from pipeline.errors import DataError

BLOCK_BYTES = 512
NAME_BYTES = 100
KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
APPLE_DOUBLE = re.compile(r"(?:^|/)\._[^/]*$")  # what macOS puts beside each file
META = re.compile(r"__[^/]*__($|/|[.])")
LONGEST_LABEL_BYTES = 1 << 20
# More blocks than this no header before the image's takes: names are at most 4,096 bytes long.
BLOCKS_OF_A_LONG_NAME = 16
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample: its key, where the bytes of its image lie, and its labels as they are written."""

    key: str
    offset: int
    size: int
    labels: list[RawLabel]


def read_samples(path: Path, rule: SampleRule) -> Iterator[ShardSample]:
    """Yield the samples of a shard in its order. Raises DataError naming the shard and what is wrong with it."""
    _require_tar(path)
    seen = set()
    try:
        with tarfile.open(path, mode="r:") as tar:
            for key, members in _grouped(tar):
                if key in seen:
                    raise DataError(f"sample {key} comes twice, or its members do not lie together")
                seen.add(key)
                if not members.keys().isdisjoint((*rule.image_extensions, rule.label_extension)):  # a readme is none
                    yield _sample(tar, key, members, rule)
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error
    except tarfile.TarError as error:
        raise DataError(f"{path}: cannot be read as a tar ({error}). It may have been cut short: copy it again.") from error


def _require_tar(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(max(0, path.stat().st_size - BLOCK_BYTES))
        end = file.read(BLOCK_BYTES)
    kind = next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        raise DataError(
            f"{path}: is compressed ({kind}), so no image in it can be read without all before it. Decompress it, "
            "or train on it as a stream (`shardline index --stream`)."
        )
    # A tar that was cut between two members reads well; but every tar ends with blocks of zeros.
    if any(end) or not end:
        raise DataError(f"{path}: was cut short, or is no tar: it does not end as one. Copy it again.")


def _grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield (key, its members by extension)."""
    key, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        parts = KEY_AND_EXTENSION.fullmatch(member.name)
        if parts is None or member.isdir() or META.match(member.name) or APPLE_DOUBLE.search(member.name):
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{member.name} is a {'sparse file' if member.issparse() else 'link'}, whose bytes lie elsewhere")
        if parts[1] != key:
            if members:
                yield key, members
            key, members = parts[1], {}
        extension = parts[2].lower()
        if extension in members:
            raise DataError(f"{member.name} comes twice in its sample")
        members[extension] = member
    if members:
        yield key, members


def _sample(tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo], rule: SampleRule) -> ShardSample:
    image = next((members[extension] for extension in rule.image_extensions if extension in members), None)
    label = members.get(rule.label_extension)
    if image is None or label is None:
        lacking = "image" if image is None else f".{rule.label_extension} label"
        found = ", ".join(f".{extension}" for extension in members)
        raise DataError(f"sample {key} lacks its {lacking}: it has {found} (`--image` and `--label` say which are meant)")
    content = tar.extractfile(label)
    assert content is not None
    try:
        labels = raw_labels(rule.label, content.read(LONGEST_LABEL_BYTES))
    except DataError as error:
        raise DataError(f"sample {key} {error}") from error
    return ShardSample(key, image.offset_data, image.size, labels)


def read_key(read: Callable[[int, int], bytes], offset: int) -> str:
    """The key of the sample whose image begins at `offset`, given `read(offset, size)` of its shard.

    A long name lies in blocks of its own before the header: in a pax header or a GNU one.
    """
    name = _name_in(read(offset - BLOCK_BYTES, BLOCK_BYTES))
    for blocks in range(1, BLOCKS_OF_A_LONG_NAME + 1):
        start = offset - BLOCK_BYTES * (blocks + 2)
        if start < 0:
            break
        header = read(start, BLOCK_BYTES)
        kind = header[156:157]
        if kind not in (b"L", b"x") or not _is_header(header, blocks):
            continue
        content = read(start + BLOCK_BYTES, int(header[124:135], 8))
        found = content.rstrip(b"\0") if kind == b"L" else _pax_path(content)
        name = found.decode("utf-8", errors="surrogateescape") if found else name
        break
    parts = KEY_AND_EXTENSION.fullmatch(name)
    return parts[1] if parts else name


def _name_in(header: bytes) -> str:
    name = header[:NAME_BYTES].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", errors="surrogateescape")


def _is_header(block: bytes, blocks: int) -> bool:
    """Whether a block is the header of a member whose content takes `blocks` blocks."""
    try:
        size, checksum = int(block[124:135], 8), int(block[148:156].split(b"\0")[0], 8)
    except ValueError:
        return False
    return -(-size // BLOCK_BYTES) == blocks and checksum == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _pax_path(content: bytes) -> bytes | None:
    """The value of `path` in the records of a pax header: `LENGTH KEY=VALUE` and a line break each."""
    while content[:1].isdigit():
        length = int(content.split(b" ", 1)[0])
        key, _, value = content[:length].split(b" ", 1)[1].partition(b"=")
        if key == b"path":
            return value[:-1]
        content = content[length:]
    return None
