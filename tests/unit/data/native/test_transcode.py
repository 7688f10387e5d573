import io
import math
import re
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import native
from pipeline.data.native import CropReader, with_restarts
from pipeline.errors import ConfigError, DataError
from tests.unit.data.images import as_jpeg, encode, gradient, noise

pytestmark = pytest.mark.skipif(not native.is_built(), reason="the native decoder is not built here")

END = b"\xff\xd9"


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content


def segments(jpeg: bytes) -> list[tuple[int, bytes]]:
    """Marker and content of each segment before the image data."""
    found: list[tuple[int, bytes]] = []
    at = 2
    while not found or found[-1][0] != 0xDA:
        (length,) = struct.unpack(">H", jpeg[at + 2 : at + 4])
        found.append((jpeg[at + 1], jpeg[at + 4 : at + 2 + length]))
        at += 2 + length
    return found


def interval_of(jpeg: bytes) -> int:
    return next((int.from_bytes(content, "big") for marker, content in segments(jpeg) if marker == 0xDD), 0)


def pixels(jpeg: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def grey(dc_code: int = 0, ahead: bytes = b"") -> bytes:
    """8 x 8 grey pixels by hand; the one number they are made of has `dc_code` bits, all 1."""
    bits = "0" + "1" * dc_code + "0"
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    tables = bytes([0]) + bytes([1]) * 64
    codes = bytes([1]) + bytes(15)  # one code, of one bit
    return (
        b"\xff\xd8"
        + ahead
        + segment(0xDB, tables)
        + segment(0xC0, bytes([8, 0, 8, 0, 8, 1, 1, 0x11, 0]))
        + segment(0xC4, b"\x00" + codes + bytes([dc_code]))
        + segment(0xC4, b"\x10" + codes + b"\x00")
        + segment(0xDA, bytes([1, 1, 0, 0, 63, 0]))
        + data
        + END
    )


@pytest.mark.parametrize("size", [(64, 96), (33, 75), (1, 1), (7, 200)])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"restart_marker_blocks": 3}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_keeps_its_pixels(mode: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    jpeg = encode(Image.fromarray(noise(*size)).convert(mode), "JPEG", **options)
    rewritten = with_restarts(jpeg, 4)
    assert np.array_equal(pixels(rewritten), pixels(jpeg))
    assert interval_of(rewritten) == 4
    assert with_restarts(rewritten, 4) == rewritten


@pytest.mark.parametrize("interval", [1, 3, 4, 100, 65_535])
@pytest.mark.parametrize("width", [40, 300, 500])
def test_markers_come_after_as_many_blocks_as_asked(width: int, interval: int) -> None:
    for jpeg in (as_jpeg(noise(20, width), subsampling=2), as_jpeg(noise(20, width)[..., 0])):
        marked = with_restarts(jpeg, interval)
        assert interval_of(marked) == interval
        side = 8 if Image.open(io.BytesIO(jpeg)).mode == "L" else 16
        num_blocks = math.ceil(width / side) * math.ceil(20 / side)
        assert len(re.findall(rb"\xff[\xd0-\xd7]", marked)) == (num_blocks - 1) // interval


def test_what_a_file_says_besides_its_pixels_stays() -> None:
    exif = Image.Exif()
    exif[274] = 6
    options = {"exif": exif, "comment": b"from the attic", "icc_profile": b"p" * 70000, "dpi": (300, 300), "xmp": b"<x/>"}
    jpeg = encode(Image.fromarray(noise(20, 30)), "JPEG", **options)
    kept = [part for part in segments(jpeg) if part[0] >= 0xE0]
    assert len(kept) == 6
    assert [part for part in segments(with_restarts(jpeg, 4)) if part[0] >= 0xE0] == kept


@pytest.mark.timeout(60)  # libjpeg's own list of them took as many seconds for a third of this number
def test_many_segments_take_no_more_time_each_than_few() -> None:
    jpeg = grey(ahead=300_000 * segment(0xFE, b""))
    rewritten = with_restarts(jpeg, 4)
    assert rewritten.count(segment(0xFE, b"")) == 300_000
    assert with_restarts(rewritten, 4) == rewritten


def test_what_stands_between_scans_stays_too() -> None:
    jpeg = as_jpeg(noise(40, 50), progressive=True)
    ahead, first, *more = jpeg.split(b"\xff\xda")
    comment = b"\xff\xff" + segment(0xFE, b"\xff\xda of a scan")
    between = (comment + b"\xff\xda").join([ahead + b"\xff\xda" + first, *more])
    kept = [content for marker, content in segments(with_restarts(between, 4)) if marker == 0xFE]
    assert kept == [b"\xff\xda of a scan"] * len(more)
    assert np.array_equal(pixels(with_restarts(between, 4)), pixels(jpeg))


@pytest.mark.parametrize("interval", [0, 65_536, 65_540])
def test_an_interval_that_no_marker_can_say_is_refused(interval: int) -> None:
    with pytest.raises(DataError, match="1 to 65535 MCUs"):
        with_restarts(BROKEN, interval)


def test_of_a_file_with_several_pictures_the_first_stays() -> None:
    first, second = (Image.fromarray(noise(20, 30, seed)) for seed in (1, 2))
    several = encode(first, "MPO", save_all=True, append_images=[second])
    rewritten = with_restarts(several, 4)
    with Image.open(io.BytesIO(several)) as before, Image.open(io.BytesIO(rewritten)) as after:
        assert (before.format, after.format) == ("MPO", "JPEG")
        assert np.array_equal(np.asarray(after), np.asarray(before))
    assert rewritten.endswith(END) and rewritten.count(b"\xff\xd8") == 1


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("key", range(20))
def test_a_crop_has_the_same_pixels_with_markers(key: int, subsampling: int) -> None:
    jpeg = as_jpeg(gradient(180, 240), subsampling=subsampling)
    reader = CropReader(smallest=0.08, flip=0.5, size=(48, 48))
    one, other = reader.decode(jpeg, 977 * key), reader.decode(with_restarts(jpeg, 4), 977 * key)
    assert one is not None and other is not None and np.array_equal(one, other)


BROKEN = as_jpeg(noise(64, 64))
PROGRESSIVE = grey().replace(b"\xff\xc0", b"\xff\xc2").replace(b"\x00\x3f\x00", b"\x00\x00\x00")
WHOLE = as_jpeg(noise(64, 64), progressive=True)
UNFINISHED = WHOLE[: WHOLE.rindex(b"\xff\xda")] + END  # shown smoothed, as if it were on its way
SCAN = PROGRESSIVE[PROGRESSIVE.index(b"\xff\xda") : -2]


@pytest.mark.parametrize(
    ("jpeg", "reason"),
    [
        (b"", "Empty input"),
        (b"\x89PNG", "Not a JPEG file"),
        (BROKEN[:-200], "Premature end of JPEG file"),
        (BROKEN[:-2] + bytes(99) + END, "extraneous bytes before marker"),
        (grey().replace(b"\xff\xc0\x00\x0b\x08", b"\xff\xc0\x00\x0b\x0c"), "precision 12"),
        (grey().replace(b"\xff\xc0", b"\xff\xc3"), "Unsupported"),
        (PROGRESSIVE.replace(SCAN, 501 * SCAN), "More scans than an image has"),
        (PROGRESSIVE, "some of its progressive scans are missing"),
        (UNFINISHED, "some of its progressive scans are missing"),
        (grey().replace(b"\x08\x00\x08\x00\x08\x01", b"\x08\xff\x00\xff\x00\x01"), "More pixels than an image may have"),
        # It is found when half of the result is written.
        (grey(15, ahead=5 * segment(0xE5, b"x" * 60000)), "DCT coefficient out of range"),
    ],
    ids=["empty", "png", "cut", "extraneous", "12-bit", "lossless", "scans", "one-scan", "unfinished", "pixels", "coefficient"],
)
def test_what_cannot_be_rewritten_is_refused_with_a_reason(jpeg: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        with_restarts(jpeg, 4)


def test_wherever_it_is_cut_a_file_is_refused_or_keeps_its_pixels() -> None:
    jpeg = as_jpeg(noise(24, 40))
    for end in range(len(jpeg) - 2):
        with pytest.raises(DataError):
            with_restarts(jpeg[:end], 4)


def test_where_nothing_is_built_markers_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_jpeg", None)
    native.require_for_restarts(None)
    with pytest.raises(ConfigError, match=r"`dataset\.restart` needs the native decoder, .* `make native` builds it"):
        native.require_for_restarts(4)
