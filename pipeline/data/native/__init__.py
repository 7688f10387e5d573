"""Training's JPEG decoder in C, for where it could be built; torchvision.io decodes everywhere else.

It decodes no more rows, columns and frequencies of a JPEG than a crop needs. Where the crop is not to become half as large or
smaller its pixels are those of Pillow to one grey level; there it scales among the frequencies, and a pixel may differ by more.

What it does not know (other formats, unusual files, broken ones) it leaves to the general decoder, which says what is wrong.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.preprocess import MAX_PIXELS

try:
    from pipeline.data.native import _jpeg
except ImportError:  # there was no compiler, or no libjpeg
    _jpeg = None  # type: ignore[assignment]

# What becomes of an image, by the number that the C code gives it (jpeg.h).
STATUSES = ("decoded", "not supported", "too large", "broken", "cut short", "no memory")
DECODED = 0
# Where an encoded image lies, what its crop is drawn by, and the row of the batch that it fills (module.c).
SAMPLE = np.dtype([("offset", np.int64), ("size", np.int64), ("key", np.uint64), ("file", np.int32), ("row", np.int32)])
HOW_TO_BUILD = "`make native` builds it, where a C compiler and the headers of libjpeg-turbo are"


def is_built() -> bool:
    """Whether the decoder is there."""
    return _jpeg is not None


def describe(decoder: str | None) -> str:
    """What decodes training's crops by `data.decoder`, in words. Raises ConfigError as `chosen` does."""
    if chosen(decoder):
        return f"the native decoder ({'AVX2' if _jpeg.uses_avx2() else 'portable C'})"
    return "torchvision.io" if is_built() else f"torchvision.io: the native decoder is not built here; {HOW_TO_BUILD}"


def require_for_restarts(restart: int | None) -> None:
    """Refuse `dataset.restart` where the decoder, which sets the markers, is not built. Raises ConfigError."""
    if restart is not None and not is_built():
        raise ConfigError(f"`dataset.restart` needs the native decoder, which is not built here: {HOW_TO_BUILD}.")


def chosen(decoder: str | None) -> bool:
    """Whether `data.decoder` means the native one. Raises ConfigError where it is asked for and not built."""
    if decoder == "native" and not is_built():
        raise ConfigError(f"`data.decoder` is native, which is not built here. {HOW_TO_BUILD}.")
    return is_built() if decoder is None else decoder == "native"


def decoder_of(config: DataConfig) -> str | None:
    """The decoder of a training's crops, `native` or `torchvision`; None where it takes no crops."""
    if config.augment.crop_scale == 1:
        return None
    return "native" if chosen(config.decoder) else "torchvision"


class CropReader:
    """Random crops of JPEGs: `smallest` to all of the area, mirrored with probability `flip`, at `size` (H, W)."""

    def __init__(self, smallest: float, flip: float, size: tuple[int, int]) -> None:
        self.smallest, self.flip, self.size = smallest, flip, size

    def decode(self, encoded: bytes, key: int) -> npt.NDArray[np.uint8] | None:
        """One crop, uint8 (H, W, 3), drawn by `key`; None for what is left to the general decoder."""
        pixels = np.empty((*self.size, 3), np.uint8)
        status = _jpeg.random_crop(encoded, key, self.smallest, self.flip, MAX_PIXELS, *self.size, pixels)
        return pixels if status == DECODED else None

    def read(self, samples: npt.NDArray[Any], out: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        """One crop of each of n samples, rows of SAMPLE, into its row of `out`, uint8 (m, H, W, 3); returns n statuses.

        Nothing of Python is locked meanwhile.
        """
        statuses = np.empty(len(samples), np.int32)
        _jpeg.read_crops(samples, self.smallest, self.flip, MAX_PIXELS, *self.size, out, statuses)
        return statuses


def with_restarts(encoded: bytes, interval: int) -> bytes:
    """The same JPEG, coefficient for coefficient, with a restart marker every `interval` MCUs.

    The result has been read again and compared. Raises DataError with the reason where there is none.
    """
    try:
        rewritten: bytes = _jpeg.with_restarts(encoded, interval, MAX_PIXELS)
    except ValueError as error:
        raise DataError(str(error)) from error
    return rewritten
