import dataclasses
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.config import PreprocessConfig
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.manifest import ImageStats
from pipeline.preprocess import MAX_SCANS, PreprocessSpec, TooManyPixelsError, build_spec, decode_image, spec_from_dict
from tests.photos import AS_STORED, encode

Pixels = npt.NDArray[np.uint8]
STATS = ImageStats("train", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])


def counting(height: int, width: int) -> Pixels:
    """Pixels that are all different, (H, W, 3)."""
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing: 70 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# ---- from bytes to upright RGB ----

# How an upright image is stored under each EXIF orientation (TIFF 6.0, tag 274), in numpy alone.
STORED_AS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED_AS)
def test_a_photograph_is_turned_upright_exactly_once(orientation: int) -> None:
    upright = counting(height=2, width=3)
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    assert np.array_equal(decode_image(encode(stored, exif=exif), AS_STORED), upright)


def palette_image() -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30])
    return image


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
RED = Image.new("RGB", (4, 4), (255, 0, 0))


def png_of_sixteen_bits(colour_type: int, samples: list[int]) -> bytes:
    """A PNG of 4 x 4 pixels with 16 bits a sample, which Pillow reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(f">{len(samples)}H", *samples) * 4
    header = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row * 4)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize(
    ("encoded", "colour"),
    [
        (encode(palette_image()), (10, 20, 30)),
        (encode(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encode(Image.new("L", (4, 4), 77), "JPEG"), (77, 77, 77)),
        (encode(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encode(Image.fromarray(np.full((4, 4), 0x8000, np.uint16))), (128, 128, 128)),  # 16-bit grey, half
        (encode(Image.fromarray(np.full((4, 4), 0x8000, np.uint16)), "TIFF"), (128, 128, 128)),
        (encode(Image.fromarray(np.full((4, 4), 0x00FF, np.uint16))), (1, 1, 1)),  # dark, not white
        (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        (encode(RED, "WEBP", lossless=True), (255, 0, 0)),
        (encode(RED, "BMP"), (255, 0, 0)),
        (encode(RED, "MPO", save_all=True, append_images=[RED], quality=100), (255, 0, 0)),  # what phones call .jpg
        (encode(RED, "JPEG", progressive=True, quality=100), (255, 0, 0)),
        (encode(RED.convert("CMYK"), "TIFF"), (255, 0, 0)),
        (encode(RED, "TIFF", save_all=True, append_images=[Image.new("RGB", (4, 4), (0, 0, 255))]), (255, 0, 0)),
        (encode(Image.new("F", (4, 4), 0.5), "TIFF"), (128, 128, 128)),  # floats up to 1 are shares of white
        (png_of_sixteen_bits(2, [0xC800, 0x6400, 0x3200]), (200, 100, 50)),
        (encode(RED, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")]), (255, 0, 0)),
        (encode(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), (0, 0, 255))]), (255, 0, 0)),
    ],
    ids=[
        "palette",
        "grey",
        "grey-jpeg",
        "1-bit",
        "16-bit-png",
        "16-bit-tiff",
        "16-bit-dark",
        "cmyk",
        "webp",
        "bmp",
        "mpo",
        "progressive",
        "tiff-cmyk",
        "tiff-page-1",
        "tiff-float",
        "16-bit-colour",
        "webp-frame-1",
        "gif-frame-1",
    ],
)
def test_every_kind_of_image_becomes_rgb_of_its_colour(encoded: bytes, colour: tuple[int, int, int]) -> None:
    pixels = decode_image(encoded, AS_STORED)
    assert pixels.shape == (4, 4, 3)
    assert pixels.dtype == np.uint8
    # JPEG and CMYK round once on the way; 1 of 255 covers it.
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(colour, (4, 4, 3)), rtol=0, atol=1)


def test_sixteen_bits_of_grey_become_eight_exactly() -> None:
    levels = np.arange(256, dtype=np.uint16)
    image = Image.fromarray(np.tile(levels * 257, (2, 1)))  # 0xFFFF is white: 65535 = 255 * 257
    assert np.array_equal(decode_image(encode(image), AS_STORED)[0, :, 0], levels)


@pytest.mark.parametrize(
    ("encoded", "colour"),
    [
        (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128))), (255, 127, 127)),  # 128/255 red on white
        (encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), (255, 255, 255)),
        (encode(Image.new("LA", (4, 4), (0, 0))), (255, 255, 255)),
        (encode(palette_image(), transparency=0), (255, 255, 255)),
        (encode(palette_image(), "GIF", transparency=0), (255, 255, 255)),
        (encode(RED, transparency=(255, 0, 0)), (255, 255, 255)),
    ],
    ids=["half", "rgba", "grey-alpha", "palette", "gif", "rgb-key"],
)
def test_a_transparent_image_is_laid_on_white(encoded: bytes, colour: tuple[int, int, int]) -> None:
    # Alpha is rounded to 8 bits: 1 of 255.
    np.testing.assert_allclose(decode_image(encoded, AS_STORED)[0, 0].astype(int), colour, rtol=0, atol=1)


def test_the_background_of_a_transparent_image_is_the_specs() -> None:
    spec = dataclasses.replace(AS_STORED, background=(1, 2, 3))
    assert decode_image(encode(Image.new("RGBA", (4, 4), (9, 9, 9, 0))), spec)[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "cannot identify image file$"),
        (b"garbage" * 100, "cannot identify image file$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot identify image file$"),
        (encode(NOISE, "JPEG")[:-20], "truncated"),
        (encode(NOISE)[:6000], "truncated"),
        (png_of_size(10_001, 10_000), "10001 x 10000 pixels are more than 100,000,000"),
        (png_of_size(60_000, 60_000), "pixels"),
        (encode(Image.new("F", (4, 4), 77.0), "TIFF"), "its grey levels go from 77 to 77, not from 0 to 1; convert it"),
        (encode(Image.new("F", (4, 4), float("nan")), "TIFF"), "its grey levels go from nan to nan"),
        (encode(Image.new("I", (4, 4), 70_000), "TIFF"), "its grey levels go from 70000 to 70000, not from 0 to 65535"),
    ],
    ids=["empty", "garbage", "postscript", "cut-jpeg", "cut-png", "above-the-limit", "bomb", "float", "nan", "32-bit"],
)
def test_bytes_that_are_no_whole_image_are_refused_with_the_reason(encoded: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_image(encoded, AS_STORED)


def test_the_limit_of_pixels_is_the_one_that_the_message_states() -> None:
    # 95 megapixels: below our 100, above the 89 at which Pillow warns. It is cut short, but not too large.
    with pytest.raises(DataError, match="truncated"):
        decode_image(png_of_size(9_500, 10_000), AS_STORED)


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    progressive = io.BytesIO()
    NOISE.convert("L").save(progressive, "JPEG", progressive=True)
    begin = progressive.getvalue().rindex(b"\xff\xda")
    last, before = progressive.getvalue()[begin:-2], progressive.getvalue()[:begin]
    assert decode_image(before + last + b"\xff\xd9", AS_STORED).shape == (*NOISE.size[::-1], 3)
    with pytest.raises(DataError, match="a JPEG of more than 500 scans"):
        decode_image(before + last * MAX_SCANS + b"\xff\xd9", AS_STORED)


def test_what_looks_like_many_scans_is_none_beside_the_image() -> None:
    content = io.BytesIO()
    NOISE.save(content, "JPEG", comment=b"\xff\xda" * (MAX_SCANS + 1))
    film = b"\xff\xda" * (MAX_SCANS + 1)  # behind its end, as some telephones do
    assert decode_image(content.getvalue() + film, AS_STORED).shape == (*NOISE.size[::-1], 3)


def test_the_tiles_of_a_tiff_count_as_its_pixels() -> None:
    row = zlib.compress(bytes(3 * 30_000))
    entries = [
        (256, 4, 64),
        (257, 4, 64),
        (258, 3, 8),
        (259, 3, 8),
        (262, 3, 2),
        (277, 3, 3),
        (322, 4, 30_000),
        (323, 4, 30_000),
    ]
    entries += [(324, 4, 200), (325, 4, len(row))]
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    tiff = (b"II*\0" + struct.pack("<I", 8) + ifd + bytes(4)).ljust(200, b"\0") + row
    with pytest.raises(TooManyPixelsError, match="the pixels of its tiles are more than 100,000,000"):
        decode_image(tiff, AS_STORED)


# ---- resize and crop ----


@pytest.mark.parametrize(("height", "width", "expected"), [(40, 20, (20, 10, 3)), (20, 40, (10, 20, 3)), (20, 31, (10, 16, 3))])
def test_one_number_resizes_the_shortest_side_and_keeps_the_shape(height: int, width: int, expected: tuple[int, ...]) -> None:
    spec = dataclasses.replace(AS_STORED, resize=10)
    assert decode_image(encode(Image.new("RGB", (width, height))), spec).shape == expected


def test_two_numbers_resize_to_exactly_that_height_and_width() -> None:
    spec = dataclasses.replace(AS_STORED, resize=[8, 12], resize_mode="exact")
    assert decode_image(encode(Image.new("RGB", (20, 40))), spec).shape == (8, 12, 3)


def test_an_image_of_the_right_size_is_not_touched() -> None:
    pixels = counting(5, 7)
    spec = dataclasses.replace(AS_STORED, resize=[5, 7], crop=[5, 7], resize_mode="exact")
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels)), spec), pixels)


def test_a_smaller_crop_is_the_middle_of_the_image() -> None:
    pixels = counting(6, 8)
    spec = dataclasses.replace(AS_STORED, crop=[2, 4])
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels)), spec), pixels[2:4, 2:6])


def test_a_larger_crop_puts_the_image_in_the_middle_of_the_background() -> None:
    pixels = counting(2, 8)
    spec = dataclasses.replace(AS_STORED, crop=[6, 4], background=(7, 8, 9))
    expected = np.full((6, 4, 3), (7, 8, 9), np.uint8)
    expected[2:4] = pixels[:, 2:6]
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels)), spec), expected)


@pytest.mark.parametrize(("antialias", "grey"), [(True, 255 / 4), (False, 0)])
def test_stripes_finer_than_a_pixel_blend_with_antialias_and_vanish_without(antialias: bool, grey: float) -> None:
    stripes = np.zeros((16, 32, 3), np.uint8)
    stripes[:, ::4] = 255  # one white column in four, of which each new pixel spans four
    spec = dataclasses.replace(AS_STORED, resize=[16, 8], resize_mode="exact", antialias=antialias)
    inner = decode_image(encode(Image.fromarray(stripes)), spec)[:, 1:-1]  # at the border the filter is cut off
    # The triangle filter sums to exactly a quarter of white; Pillow's fixed point rounds by at most 1.
    np.testing.assert_allclose(inner.astype(float), grey, rtol=0, atol=1)


# ---- the spec ----


def test_the_hash_of_a_spec_is_the_same_on_every_machine() -> None:
    # Every checkpoint and ONNX file carries this hash: if it changes here, no published model can be served any more.
    assert AS_STORED.hash() == "063ded88a5bb14dcdf48ae58ab023fa07a2a87f0e2142fa3427e8137a05ede53"


def test_the_hash_changes_with_every_field() -> None:
    others: dict[str, Any] = {
        "resize": 8,
        "crop": [8, 8],
        "interpolation": "nearest",
        "antialias": False,
        "mean": [0.5, 0.5, 0.4],
        "std": [0.25, 0.25, 0.2],
        "resize_mode": "exact",
        "background": (0, 0, 0),
        "exif": False,
        "color": "BGR",
        "scale": 1,
        "version": 2,
    }
    assert others.keys() == {item.name for item in dataclasses.fields(PreprocessSpec)}
    hashes = {dataclasses.replace(AS_STORED, **{name: value}).hash() for name, value in others.items()}
    assert len(hashes | {AS_STORED.hash()}) == len(others) + 1


def test_a_spec_survives_json() -> None:
    spec = dataclasses.replace(AS_STORED, resize=[8, 12], crop=[4, 4], background=(1, 2, 3))
    read = spec_from_dict(json.loads(json.dumps(dataclasses.asdict(spec))))
    assert read == spec
    assert read.hash() == spec.hash()


@pytest.mark.parametrize("change", [{"sharpen": 1}, {"version": 2}, {"color": "BGR"}, {"scale": 1}])
def test_a_spec_of_a_newer_shardline_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="another Shardline"):
        spec_from_dict({**dataclasses.asdict(AS_STORED), **change})


@pytest.mark.parametrize("missing", ["background", "mean"])
def test_a_spec_with_a_field_missing_is_refused_by_name(missing: str) -> None:
    values = dataclasses.asdict(AS_STORED)
    del values[missing]
    with pytest.raises(ModelError, match=missing):
        spec_from_dict(values)


def test_a_spec_takes_the_statistics_of_the_data_set_or_those_of_a_pretraining() -> None:
    own = build_spec(PreprocessConfig(resize=[8, 8]), STATS)
    pretrained = build_spec(PreprocessConfig(resize=[8, 8], normalization="imagenet"), STATS)
    assert (own.mean, own.std) == (STATS.mean, STATS.std)
    # The published numbers of torchvision's ImageNet weights.
    assert (pretrained.mean, pretrained.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("config", "fixed_size"),
    [
        (PreprocessConfig(resize=[8, 12]), (8, 12)),
        (PreprocessConfig(resize=20, crop=[8, 9]), (8, 9)),
        (PreprocessConfig(resize=[8, 12], crop=[4, 5]), (4, 5)),
    ],
)
def test_a_spec_knows_the_size_of_every_image_and_keeps_it(config: PreprocessConfig, fixed_size: tuple[int, int]) -> None:
    spec = build_spec(config, STATS)
    assert spec.fixed_size == fixed_size
    for width, height in ((30, 3), (5, 50)):
        assert decode_image(encode(Image.new("RGB", (width, height))), spec).shape == (*fixed_size, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PreprocessConfig(), r"images of different sizes, which cannot form a batch"),
        (PreprocessConfig(resize=8), r"images of different sizes, which cannot form a batch"),
        (PreprocessConfig(resize=[8]), r"`preprocess\.resize` is \[8\]"),
        (PreprocessConfig(resize=0, crop=[8, 8]), r"`preprocess\.resize` is 0"),
        (PreprocessConfig(resize=8, crop=[8, -8]), r"`preprocess\.crop` is \[8, -8\]"),
        (PreprocessConfig(resize=8, crop=[8, 8, 3]), r"`preprocess\.crop` is \[8, 8, 3\]"),
    ],
)
def test_sizes_that_cannot_work_are_refused(config: PreprocessConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_spec(config, STATS)
