"""The page's preprocessing in a real browser beside that of Python: pipeline/export/web/{decode,preprocess}.js."""

import base64
import dataclasses
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from pipeline.errors import DataError
from pipeline.export.targets import PAGE
from pipeline.preprocess import PreprocessSpec, decode_image
from tests import browser as parts
from tests.browser import browser
from tests.photos import AS_STORED, encode
from tests.web import web_server

pytestmark = pytest.mark.skipif(bool(parts.missing_parts()), reason=f"a browser test needs {parts.missing_parts()}")

Pixels = npt.NDArray[np.uint8]
# Pixels (H, W, 3) of encoded images, or why there are none.
AskBrowser = Callable[[list[bytes], PreprocessSpec], list[Pixels | str]]

IN_THE_PAGE = """async ([images, spec]) => {
  const { decode } = await import("/decode.js");
  const { preprocess } = await import("/preprocess.js");
  const answers = [];
  for (const image of images) {
    const bytes = Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
    try {
      const { width, height, data } = preprocess(await decode(new Blob([bytes]), spec.background), spec);
      answers.push({ width, height, data: [...data] });
    } catch (error) {
      answers.push(error.message);
    }
  }
  return answers;
}"""


@pytest.fixture(scope="module")
def ask_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AskBrowser]:
    """A function that has the page's own modules decode and prepare images."""
    with web_server(PAGE) as port, browser(tmp_path_factory.mktemp("screenshots")) as started:
        page = started.open(f"http://127.0.0.1:{port}/style.css")

        def ask(images: list[bytes], spec: PreprocessSpec) -> list[Pixels | str]:
            encoded = [base64.b64encode(image).decode() for image in images]
            answers = page.evaluate(IN_THE_PAGE, [encoded, dataclasses.asdict(spec)])
            return [answer if isinstance(answer, str) else pixels_of(answer) for answer in answers]

        yield ask


def pixels_of(answer: dict[str, Any]) -> Pixels:
    return np.array(answer["data"], dtype=np.uint8).reshape(answer["height"], answer["width"], 3)


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    """Pixels (H, W, C) on which every filter, shift and rounding shows."""
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)


ON_GREEN = dataclasses.replace(AS_STORED, background=(10, 200, 90))

# ---- resize and crop ----

SIZES = [(45, 65), (81, 30), (60, 42), (3, 5), (1, 1), (10, 300), (64, 32)]
PNGS = [encode(Image.fromarray(noise(*size))) for size in SIZES]
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
SPECS: dict[str, dict[str, Any]] = {
    **{f"exact, {name}": {"resize": [16, 20], "interpolation": name} for name in FILTERS},
    **{f"larger, {name}": {"resize": [97, 84], "interpolation": name} for name in FILTERS},
    "no filter, bilinear": {"resize": [13, 17], "antialias": False},
    "no filter, bicubic": {"resize": [13, 17], "antialias": False, "interpolation": "bicubic"},
    "no filter, larger": {"resize": [90, 91], "antialias": False, "interpolation": "bicubic"},
    "no filter, nearest": {"resize": [13, 17], "antialias": False, "interpolation": "nearest"},
    "shortest side": {"resize": 25, "crop": [21, 18]},
    "shortest side, bicubic": {"resize": 7, "crop": [7, 7], "interpolation": "bicubic"},
    "torchvision": {"resize": 25, "crop": [20, 18], "resize_mode": "torchvision"},
    "torchvision, no filter": {"resize": 22, "crop": [15, 15], "resize_mode": "torchvision", "antialias": False},
    "torchvision, padded": {"resize": 9, "crop": [32, 31], "resize_mode": "torchvision"},
    "crop alone": {"crop": [20, 31]},
    "crop of exact": {"resize": [30, 40], "crop": [25, 25]},
}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_the_browser_gives_the_network_the_very_pixels_that_python_does(
    changes: dict[str, Any], ask_browser: AskBrowser
) -> None:
    spec = dataclasses.replace(ON_GREEN, **changes)
    for size, png, found in zip(SIZES, PNGS, ask_browser(PNGS, spec), strict=True):
        assert not isinstance(found, str), found
        np.testing.assert_array_equal(found, decode_image(png, spec), err_msg=f"{size}")


# ---- decoding ----


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_sixteen_bits(colour_type: int, channels: int) -> bytes:
    samples = np.random.default_rng(5).integers(0, 65536, (20, 30 * channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", 30, 20, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def foreign_profile() -> bytes:
    """sRGB with red and green exchanged: whoever applies it shows other colours."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


PHOTO = Image.fromarray(np.asarray(Image.fromarray(noise(9, 13)).resize((65, 45), Image.Resampling.BICUBIC)))
CLEAR = PHOTO.convert("RGBA")
CLEAR.putalpha(Image.fromarray(noise(45, 65, 1)[:, :, 0]))
PALETTE = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE)
TURNED = Image.Exif()
TURNED[0x0112] = 6
BLUE = Image.new("RGB", PHOTO.size, "blue")
EXACT: dict[str, bytes] = {
    "jpeg": encode(PHOTO, "JPEG", quality=90, subsampling=2),
    "jpeg-444": encode(PHOTO, "JPEG", quality=90, subsampling=0),
    "progressive": encode(PHOTO, "JPEG", progressive=True),
    "grey-jpeg": encode(PHOTO.convert("L"), "JPEG"),
    "cmyk": encode(PHOTO.convert("CMYK"), "JPEG"),
    "mpo": encode(PHOTO, "MPO", save_all=True, append_images=[BLUE]),
    "jpeg-exif": encode(PHOTO, "JPEG", exif=TURNED),
    "png-exif": encode(PHOTO, exif=TURNED),
    "jpeg-profile": encode(PHOTO, "JPEG", icc_profile=foreign_profile()),
    "png-profile": encode(PHOTO, icc_profile=foreign_profile()),
    "png-gamma": encode(PHOTO)[:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + encode(PHOTO)[33:],
    "1-bit": encode(PHOTO.convert("1")),
    "palette": encode(PALETTE),
    "palette-key": encode(PALETTE, transparency=5),
    "rgb-key": encode(PHOTO, transparency=PHOTO.getpixel((3, 3))),
    "16-bit-rgb": png_of_sixteen_bits(2, 3),
    "webp": encode(PHOTO, "WEBP", quality=80),
    "webp-lossless": encode(PHOTO, "WEBP", lossless=True),
    "webp-profile": encode(PHOTO, "WEBP", lossless=True, icc_profile=foreign_profile()),
    "gif": encode(PALETTE, "GIF"),
    "gif-frame-1": encode(PHOTO, "GIF", save_all=True, append_images=[BLUE]),
    "gif-key": encode(PALETTE, "GIF", transparency=3),
    "bmp": encode(PHOTO, "BMP"),
}
# A canvas keeps colours multiplied by their alpha, rounded; 16 bits of grey lose their lower half there instead of rounding.
WITHIN_A_LEVEL: dict[str, bytes] = {
    "alpha": encode(CLEAR),
    "grey-alpha": encode(CLEAR.convert("LA")),
    "palette-alpha": encode(PALETTE, transparency=bytes(range(256))),
    "webp-alpha": encode(CLEAR, "WEBP", lossless=True, exact=True),
    "16-bit-grey": png_of_sixteen_bits(0, 1),
    "16-bit-alpha": png_of_sixteen_bits(6, 4),
}


def test_photos_of_every_kind_are_decoded_as_in_python(ask_browser: AskBrowser) -> None:
    images = EXACT | WITHIN_A_LEVEL
    for (kind, image), found in zip(images.items(), ask_browser([*images.values()], ON_GREEN), strict=True):
        assert not isinstance(found, str), f"{kind}: {found}"
        wanted = decode_image(image, ON_GREEN)
        assert found.shape == wanted.shape, kind
        difference = int(np.abs(found - wanted.astype(int)).max())
        assert difference <= (kind in WITHIN_A_LEVEL), f"{kind}: {difference} levels"


def test_a_photo_wider_than_a_canvas_of_a_phone_is_read_in_parts(ask_browser: AskBrowser) -> None:
    pixels = np.tile(noise(5, 100), (1, 50, 1))  # (H, W, 3)
    pixels[:, 2048] = (255, 0, 0)  # where one part ends
    wide = encode(Image.fromarray(pixels))
    (found,) = ask_browser([wide], ON_GREEN)
    assert np.array_equal(found, pixels)


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "cut-jpeg": EXACT["jpeg"][:-200],
    "cut-progressive": EXACT["progressive"][:-200],
    "cut-png": encode(PHOTO)[:-300],
    "bit-flipped-png": encode(PHOTO)[:300] + b"\xff\x00\xff" + encode(PHOTO)[303:],
    "cut-webp": EXACT["webp"][:-100],
    "cut-gif": EXACT["gif"][:-100],
    "cut-bmp": EXACT["bmp"][:-500],
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='9' height='9'/></svg>",
}


def test_what_python_refuses_is_refused_in_the_browser(ask_browser: AskBrowser) -> None:
    for (kind, image), found in zip(DAMAGED.items(), ask_browser([*DAMAGED.values()], ON_GREEN), strict=True):
        with pytest.raises(DataError):
            decode_image(image, ON_GREEN)
        assert isinstance(found, str), kind
        assert "not a whole image" in found


def test_more_pixels_than_python_takes_are_refused(ask_browser: AskBrowser) -> None:
    large = encode(Image.new("1", (20_001, 5_000)))  # 12 kB
    (found,) = ask_browser([large], ON_GREEN)
    assert found == "20001 x 5000 pixels are too many."


@pytest.mark.parametrize("name", ["preprocess.js", "decode.js", "metadata.js", "worker.js", "app.js"])
def test_a_file_of_the_page_opens_with_what_it_is_for(name: str) -> None:
    assert (Path(PAGE) / name).read_text().startswith("// ")
