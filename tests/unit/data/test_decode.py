import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.decode import Box, EncodedImage, decode_crop, read_jpeg_header
from pipeline.errors import DataError
from pipeline.preprocess import open_image
from tests.unit.data.images import as_jpeg, as_png, encode, gradient, noise

WHITE = (255, 255, 255)


def whole(encoded: bytes) -> torch.Tensor:
    image = EncodedImage(encoded, WHITE)
    return decode_crop(image, Box(0, 0, image.height, image.width), (image.height, image.width))


def by_pillow(encoded: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(open_image(encoded, WHITE))).permute(2, 0, 1)


@pytest.mark.parametrize(
    "encoded",
    [
        as_jpeg(gradient(30, 41)),
        as_jpeg(gradient(30, 41), progressive=True),
        as_jpeg(gradient(30, 41)[..., 0]),
        encode(Image.fromarray(gradient(30, 41)).convert("CMYK"), "JPEG", quality=95),
        as_png(gradient(30, 41)),
        encode(Image.fromarray(gradient(30, 41)), "WEBP"),
    ],
    ids=["jpeg", "progressive", "grey", "cmyk", "png", "webp"],
)
def test_an_image_looks_as_it_does_in_an_evaluation(encoded: bytes) -> None:
    pixels = whole(encoded)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 30, 41))
    # Both use libjpeg-turbo, of different versions: chroma may be upsampled by another filter.
    torch.testing.assert_close(pixels.float(), by_pillow(encoded).float(), rtol=0, atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright_once_before_its_size_is_taken(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = as_jpeg(gradient(24, 40), exif=exif)
    image = EncodedImage(encoded, WHITE)
    assert (image.height, image.width) == ((24, 40) if orientation < 5 else (40, 24))
    torch.testing.assert_close(whole(encoded).float(), by_pillow(encoded).float(), rtol=0, atol=4)


def test_an_orientation_in_xmp_is_obeyed_as_in_an_evaluation() -> None:
    encoded = as_jpeg(gradient(24, 40), xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>')
    assert by_pillow(encoded).shape == (3, 40, 24)
    torch.testing.assert_close(whole(encoded).float(), by_pillow(encoded).float(), rtol=0, atol=4)


def test_a_box_is_cut_out_and_resized() -> None:
    encoded = as_png(noise(60, 80))
    box = Box(top=10, left=20, height=30, width=40)
    cut = Image.fromarray(noise(60, 80)).crop((20, 10, 60, 40))
    assert np.array_equal(decode_crop(EncodedImage(encoded, WHITE), box, (30, 40)).permute(1, 2, 0).numpy(), np.asarray(cut))
    smaller = decode_crop(EncodedImage(encoded, WHITE), box, (15, 16)).permute(1, 2, 0).numpy()
    # Pillow computes the same triangle filter with other rounding.
    np.testing.assert_allclose(smaller.astype(int), np.asarray(cut.resize((16, 15), Image.Resampling.BILINEAR)), rtol=0, atol=1)


def test_the_header_of_a_jpeg_is_read_without_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = as_jpeg(gradient(24, 40), exif=exif)
    header = read_jpeg_header(encoded)
    assert header == (24, 40, 3, True)
    grey = read_jpeg_header(as_jpeg(gradient(24, 40)[..., 0], progressive=True))
    assert grey == (24, 40, 1, False)
    assert read_jpeg_header(as_png(gradient(4, 4))) is None
    assert read_jpeg_header(encoded[:40]) is None
    assert read_jpeg_header(b"\xff\xd8" + b"\xff" * 50) is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_jpeg_that_is_cut_short_is_refused(share: float) -> None:
    encoded = as_jpeg(noise(60, 80))
    with pytest.raises(DataError):
        whole(encoded[: int(len(encoded) * share)])


def test_a_jpeg_that_claims_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    encoded = bytearray(as_jpeg(gradient(8, 8)))
    frame = encoded.index(b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(DataError, match="65535 x 65535 pixels are more than"):
        EncodedImage(bytes(encoded), WHITE)
