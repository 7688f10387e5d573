"""From the bytes of an encoded image and a crop box to pixels: the step in which training spends most of its time.

Training alone uses it, where the native decoder is not there or leaves an image to it: evaluation, parity and serving go
through `pipeline.preprocess.decode_image`, whose pixels are a contract.
"""

import struct
import warnings
from typing import NamedTuple

import numpy as np
import torch

from pipeline.errors import DataError
from pipeline.preprocess import MAX_PIXELS, open_image

# It is only read from; and torchvision's decoder has a successor that cannot be installed everywhere.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
warnings.filterwarnings("ignore", message=".*decoding and encoding capabilities of TorchVision", category=Warning)
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
APP1 = 0xE1  # EXIF or XMP
XMP_ORIENTATION = b"tiff:Orientation"  # Pillow obeys it, torchvision does not know it


class Box(NamedTuple):
    """A rectangle of an upright image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class JpegHeader(NamedTuple):
    """What a JPEG says of itself before its pixels."""

    height: int
    width: int
    num_components: int
    has_exif: bool


def read_jpeg_header(encoded: bytes) -> JpegHeader | None:
    """Size and components by the frame header (ITU T.81, B.2.2), as stored; None for anything but a JPEG."""
    if encoded[:2] != b"\xff\xd8":
        return None
    place, has_exif = 2, False
    while place + 9 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker in START_OF_FRAME:
            height, width, num_components = struct.unpack_from(">HHB", encoded, place + 5)
            return JpegHeader(height, width, num_components, has_exif)
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        has_exif |= marker == APP1
        place += 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    return None


class EncodedImage:
    """An encoded image whose size is known before its pixels are.

    JPEG is left to torchvision's decoder; all else (CMYK, other formats, an orientation in XMP) is decoded at once by Pillow,
    and a photograph that may be rotated by EXIF at once by torchvision. Raises DataError for bytes that are no image.
    """

    def __init__(self, encoded: bytes, background: tuple[int, int, int]) -> None:
        self.encoded = encoded
        self.pixels: torch.Tensor | None = None
        header = read_jpeg_header(encoded)
        if header is not None and header.num_components in (1, 3) and not (header.has_exif and XMP_ORIENTATION in encoded):
            if header.height * header.width > MAX_PIXELS:
                raise DataError(f"{header.width} x {header.height} pixels are more than {MAX_PIXELS:,}")
            if not header.has_exif:
                self.height, self.width = header.height, header.width
                return
            self.pixels = _decode_jpeg(encoded)
        else:
            self.pixels = torch.from_numpy(np.array(open_image(encoded, background))).permute(2, 0, 1)  # (3, H, W)
        self.height, self.width = self.pixels.shape[1:]


def decode_crop(image: EncodedImage, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """Pixels inside `box`, resized to `size` with an antialiased bilinear filter: uint8 (3, H, W).

    Raises DataError when the image cannot be decoded.
    """
    pixels = _decode_jpeg(image.encoded) if image.pixels is None else image.pixels  # (3, H, W)
    pixels = pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if pixels.shape[1:] == size:
        return pixels
    # In this layout torch's resize takes 110 us for 260 x 340 pixels instead of 200, and keeps it for the batch.
    laid_out = pixels[None].contiguous(memory_format=torch.channels_last)  # (1, 3, h, w)
    return torch.nn.functional.interpolate(laid_out, size, mode="bilinear", antialias=True)[0]


def _decode_jpeg(encoded: bytes) -> torch.Tensor:
    """The upright pixels of a JPEG of one or three components, uint8 (3, H, W)."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        buffer = torch.frombuffer(encoded, dtype=torch.uint8)
        pixels: torch.Tensor = decode_jpeg(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError) as error:
        raise DataError(str(error).splitlines()[0].rsplit(", ", 1)[-1]) from error
    return pixels
