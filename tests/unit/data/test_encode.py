import dataclasses
import io
import random
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DatasetConfig
from pipeline.data import encode as encode_module
from pipeline.data.encode import Encoded, Encoder, PixelSums, jpeg_size, png_size, stats_of
from pipeline.data.native import is_built, with_restarts
from pipeline.errors import DataError
from pipeline.preprocess import open_image
from tests.unit.data.images import as_jpeg, as_png, encode, gradient, noise

WHITE = (255, 255, 255)
ORIENTATION = 274


def store(content: bytes, *, trust: bool = False, need_pixels: bool = False, **changes: Any) -> Encoded:
    return Encoder(dataclasses.replace(DatasetConfig(), **changes), trust=trust).encode(content, need_pixels=need_pixels)


def stored_image(encoded: Encoded) -> Image.Image:
    return Image.open(io.BytesIO(encoded.content))


def rotated_jpeg(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encode(Image.fromarray(gradient(height, width)), "JPEG", exif=exif, quality=60)


# ---- kept as it is ----


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20}], ids=str)
def test_a_jpeg_keeps_its_bytes(options: dict[str, Any]) -> None:
    content = encode(Image.fromarray(gradient(20, 30)), "JPEG", **options)
    encoded = store(content)
    assert (encoded.content, encoded.extension) == (content, "jpg")


def test_the_pixels_of_a_rotated_jpeg_are_upright_although_its_bytes_are_not() -> None:
    content = rotated_jpeg(30, 20)
    encoded = store(content, need_pixels=True)
    assert encoded.content == content
    assert encoded.pixels is not None
    assert encoded.pixels.size == (20, 30)


@pytest.mark.parametrize(
    ("format", "extension"), [("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif")]
)
def test_on_request_other_formats_keep_their_bytes_under_their_own_extension(format: str, extension: str) -> None:
    content = encode(Image.fromarray(noise(9, 7)), format)
    encoded = store(content, keep_format=True)
    assert (encoded.content, encoded.extension) == (content, extension)


# ---- encoded anew ----


def test_another_format_becomes_a_jpeg_that_keeps_its_colours() -> None:
    pixels = gradient(16, 16)
    encoded = store(as_png(pixels))
    assert encoded.extension == "jpg"
    # Quality 95 without chroma subsampling: quantisation steps of at most 10 move a smooth image by a few of 255.
    np.testing.assert_allclose(np.asarray(stored_image(encoded)).astype(int), pixels.astype(int), rtol=0, atol=6)


def test_colours_are_not_subsampled() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, ::2] = (255, 0, 0)
    pixels[:, 1::2] = (0, 0, 255)  # columns of one pixel, which subsampling would make one purple
    found = np.asarray(stored_image(store(as_png(pixels)))).astype(int)
    assert found[:, ::2, 0].min() > 200
    assert found[:, 1::2, 0].max() < 60


def test_quality_is_the_one_that_was_asked_for() -> None:
    content = as_png(noise(64, 64))
    assert len(store(content, jpeg_quality=50).content) < len(store(content).content) / 2


def test_transparent_pixels_show_the_background() -> None:
    clear = encode(Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "PNG")
    red, green, blue = stored_image(store(clear, background=[200, 100, 50])).getpixel((4, 4))  # type: ignore[misc]
    assert (red, green, blue) == pytest.approx((200, 100, 50), abs=3)


@pytest.mark.parametrize(
    ("image", "background", "mode", "level"),
    [
        (Image.new("L", (8, 8), 77), [255, 255, 255], "L", 77),
        (Image.new("1", (8, 8), 1), [255, 255, 255], "L", 255),
        (Image.new("I;16", (8, 8), 100 * 257), [255, 255, 255], "L", 100),
        (Image.new("LA", (8, 8), (77, 0)), [128, 128, 128], "L", 128),
        (Image.new("LA", (8, 8), (77, 255)), [0, 200, 0], "RGB", (77, 77, 77)),  # its background might show
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_grey_stays_one_channel(image: Image.Image, background: list[int], mode: str, level: Any) -> None:
    stored = stored_image(store(encode(image, "PNG"), background=background))
    assert stored.mode == mode
    assert stored.getpixel((4, 4)) == pytest.approx(level, abs=1)


# ---- made smaller ----


@pytest.mark.parametrize(("width", "height", "expected"), [(40, 20, (16, 8)), (20, 40, (8, 16)), (1000, 2, (16, 1))])
def test_a_larger_image_is_shrunk_to_the_longest_side(width: int, height: int, expected: tuple[int, int]) -> None:
    for content in (as_jpeg(gradient(height, width)), as_png(gradient(height, width))):
        encoded = store(content, max_side=16)
        assert stored_image(encoded).size == expected
        assert encoded.extension == "jpg"


def test_an_image_that_is_small_enough_keeps_its_bytes() -> None:
    content = as_jpeg(gradient(16, 9))
    assert store(content, max_side=16).content == content


def test_a_rotated_jpeg_is_shrunk_upright_and_turned_only_once() -> None:
    encoded = store(rotated_jpeg(40, 20), max_side=16)
    stored = stored_image(encoded)
    assert stored.size == (8, 16)
    assert ORIENTATION not in stored.getexif()
    assert open_image(encoded.content, WHITE).size == (8, 16)


def test_a_grey_jpeg_that_is_shrunk_stays_grey() -> None:
    content = encode(Image.new("L", (40, 40), 120), "JPEG")
    assert stored_image(store(content, max_side=16)).mode == "L"


@pytest.mark.parametrize(("format", "expected"), [("PNG", "png"), ("BMP", "png"), ("TIFF", "png"), ("WEBP", "jpg")])
def test_a_format_that_is_kept_stays_lossless_when_it_is_shrunk(format: str, expected: str) -> None:
    pixels = gradient(40, 40)
    encoded = store(encode(Image.fromarray(pixels), format), max_side=16, keep_format=True)
    assert encoded.extension == expected
    if expected == "png":
        wanted = Image.fromarray(pixels).resize((16, 16), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(stored_image(encoded)), np.asarray(wanted))


# ---- refused ----


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("keep_format", [False, True])
def test_what_is_cut_short_is_refused(trust: bool, keep_format: bool) -> None:
    for content in (as_jpeg(noise(40, 40)), as_png(noise(40, 40))):
        with pytest.raises(DataError):
            store(content[: len(content) * 2 // 3], trust=trust, keep_format=keep_format)


def test_with_trust_a_bomb_is_refused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    content = as_jpeg(gradient(20, 20))
    monkeypatch.setattr(encode_module, "MAX_PIXELS", 399)
    monkeypatch.setattr("pipeline.preprocess.MAX_PIXELS", 399)
    with pytest.raises(DataError, match="20 x 20 pixels are more than 399"):
        store(content, trust=True)


def damaged(content: bytes, pick: random.Random) -> bytes:
    """A file with bytes cut off, changed (anywhere, or in its header), lost or added."""
    changed = bytearray(content)
    at = pick.randrange(len(changed))
    match pick.randrange(5):
        case 0:
            del changed[at:]
        case 1:
            changed[at] = pick.randrange(256)
        case 2:
            changed[pick.randrange(min(700, len(changed)))] = pick.randrange(256)
        case 3:
            del changed[at : at + pick.randint(1, 300)]
        case _:
            changed[at:at] = pick.randbytes(20)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}], ids=str)
def test_an_image_whose_pixels_nobody_needs_is_refused_exactly_when_it_cannot_be_decoded(options: dict[str, Any]) -> None:
    content = encode(Image.fromarray(noise(40, 56)), "JPEG", quality=80, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", **options)
    pick = random.Random(len(content))
    refused = 0
    for _ in range(250):
        case = damaged(content, pick)
        try:
            open_image(case, WHITE)
        except DataError as error:
            refused += 1
            with pytest.raises(DataError, match=re.escape(str(error))):
                store(case)
        else:
            assert store(case).extension == "jpg"
    assert 50 < refused < 200


def test_a_sound_jpeg_is_not_turned_into_pixels_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "open_image", None)
    content = as_jpeg(noise(40, 56))
    assert store(content).content == content
    with pytest.raises(TypeError):
        store(content, need_pixels=True)


# ---- taken at its word ----


def test_with_trust_a_jpeg_that_looks_whole_is_not_decoded() -> None:
    content = as_jpeg(noise(40, 40))
    encoded = store(content, trust=True)
    assert (encoded.content, encoded.extension, encoded.pixels) == (content, "jpg", None)


def test_with_trust_a_png_that_looks_whole_is_not_decoded_where_it_is_kept() -> None:
    content = as_png(noise(40, 40))
    damaged = content[:300] + bytes(50) + content[350:]
    encoded = store(damaged, trust=True, keep_format=True)
    assert (encoded.content, encoded.extension, encoded.pixels) == (damaged, "png", None)
    with pytest.raises(DataError):
        store(damaged, trust=False, keep_format=True)


def test_with_trust_the_images_of_the_statistics_are_decoded() -> None:
    assert store(as_jpeg(noise(40, 40)), trust=True, need_pixels=True).pixels is not None


def test_with_trust_an_image_that_is_too_large_is_shrunk() -> None:
    assert stored_image(store(as_jpeg(gradient(40, 20)), trust=True, max_side=16)).size == (8, 16)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(3000)}, {"comment": b"x" * 999}])
def test_the_size_is_read_from_the_header(options: dict[str, Any]) -> None:
    assert jpeg_size(encode(Image.fromarray(gradient(21, 33)), "JPEG", **options)) == (33, 21)
    assert png_size(as_png(gradient(21, 33))) == (33, 21)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff" * 50, b"\xff\xd8\xff\xe0\0\0" * 9]
)
def test_a_header_without_a_size_has_none(content: bytes) -> None:
    assert jpeg_size(content) is None
    assert png_size(content) is None


# ---- restart markers ----

needs_native = pytest.mark.skipif(not is_built(), reason="the native decoder is not built here")


@needs_native
@pytest.mark.parametrize("trust", [False, True])
def test_on_request_a_jpeg_has_restart_markers(trust: bool) -> None:
    content = as_jpeg(noise(40, 40))
    encoded = store(content, restart=4, trust=trust)
    assert (encoded.content, encoded.extension, encoded.kept) == (with_restarts(content, 4), "jpg", "")


@needs_native
def test_on_request_what_becomes_a_jpeg_has_restart_markers() -> None:
    content = as_png(gradient(40, 20))
    encoded, plain = store(content, restart=4, max_side=16), store(content, max_side=16)
    assert encoded.content == with_restarts(plain.content, 4)
    assert np.array_equal(np.asarray(stored_image(encoded)), np.asarray(stored_image(plain)))


@needs_native
def test_what_is_no_jpeg_has_no_restart_markers() -> None:
    content = as_png(noise(20, 20))
    assert store(content, restart=4, keep_format=True).content == content


@needs_native
def test_a_jpeg_that_cannot_be_rewritten_is_kept_with_the_reason() -> None:
    content = as_jpeg(noise(40, 40))[:-2] + bytes(99) + b"\xff\xd9"  # every reader shrugs at this
    encoded = store(content, restart=4)
    assert encoded.content == content
    assert "extraneous bytes" in encoded.kept


# ---- statistics ----


def test_sums_are_exact_and_the_order_does_not_matter() -> None:
    images = [noise(30, 20, seed) for seed in range(4)] + [gradient(7, 9)]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.int64)  # (N, 3)
    for order in (images, images[::-1]):
        sums = PixelSums()
        for image in order:
            sums.add(Image.fromarray(image))
        assert sums.totals() == (len(pixels), pixels.sum(axis=0).tolist(), (pixels * pixels).sum(axis=0).tolist())


def test_mean_and_standard_deviation_are_those_of_the_pixels() -> None:
    pixels = noise(30, 20).reshape(-1, 3).astype(np.int64)
    stats = stats_of(len(pixels), pixels.sum(axis=0).tolist(), (pixels**2).sum(axis=0).tolist(), "train")
    # The manifest rounds to 6 digits.
    np.testing.assert_allclose(stats.mean, (pixels / 255).mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(stats.std, (pixels / 255).std(axis=0), rtol=0, atol=1e-6)


def test_a_channel_that_never_changes_can_still_be_divided_by() -> None:
    stats = stats_of(10, [2550, 0, 1000], [650250, 0, 100000], "train")
    assert stats.mean == [1.0, 0.0, round(100 / 255, 6)]
    assert stats.std == [round(1 / 255, 6)] * 3


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no image of the train split could be decoded"):
        stats_of(0, [0, 0, 0], [0, 0, 0], "train")
