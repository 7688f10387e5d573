"""From the bytes of an encoded image to the uint8 (H, W, 3) pixels that the network takes.

Training, evaluation, parity and serving all call `decode_image`, with Pillow and numpy alone, so none of them can see other
pixels than another. Normalisation is not done here: it is the first module of the network and travels inside the ONNX file.
"""

import dataclasses
import io
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.config import Interpolation, Normalization, PreprocessConfig
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.files import digest_of
from pipeline.manifest import ImageStats

Pixels = npt.NDArray[np.uint8]
# Pillow opens only these, so that a stray PostScript or video file never reaches a decoder.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# 100 megapixels: no camera photo is larger, and a 48 kB decompression bomb can be.
MAX_PIXELS = 100_000_000
# Each scan of a progressive JPEG passes over all of its pixels, and an empty one has 12 bytes. Encoders write about ten.
MAX_SCANS = 500
SCAN, END_OF_IMAGE = 0xDA, 0xD9
# Those of a JPEG that have a length, and its end.
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
TILE_SIDES = (322, 323)  # of a TIFF
# Pillow gives the memory of each image back to the system and asks for it again, which costs a tenth of a decode; with a few
# blocks kept (16 MB each, the documented PILLOW_BLOCKS_MAX) writing 500 x 375 JPEGs takes 1.33 ms of CPU instead of 1.52.
Image.core.set_blocks_max(4)  # type: ignore[attr-defined]
# The limit is ours, and no warning: `read_header` raises. (A filter around each image would not hold where threads decode.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
WHITE = (255, 255, 255)
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Mean and standard deviation of RGB pixels scaled to 0..1, as published with each pretraining.
PRESETS = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "kinetics": ([0.45, 0.45, 0.45], [0.225, 0.225, 0.225]),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "inception": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "none": ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
}


class TooManyPixelsError(DataError):
    """An image whose header announces more pixels than are decoded."""


@dataclass(frozen=True)
class PreprocessSpec:
    """Everything done to an image before the network, and the normalisation inside it. Belongs to the model."""

    resize: int | list[int] | None
    crop: list[int] | None
    interpolation: Interpolation
    antialias: bool
    mean: list[float]
    std: list[float]
    # `torchvision` is `shortest` with its rounding: the longer side is cut off, a central crop rounds halves to even.
    resize_mode: Literal["shortest", "exact", "torchvision"]
    # Transparent images are composited on white, in shards and in serving alike.
    background: tuple[int, int, int] = WHITE
    exif: bool = True
    color: Literal["RGB"] = "RGB"
    scale: int = 255
    version: int = 1

    def hash(self) -> str:
        """Digest by which checkpoint and ONNX file say which preprocessing they belong to."""
        return digest_of(dataclasses.asdict(self))

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(H, W) of every decoded image, or None when it follows the image."""
        if self.crop is not None:
            return self.crop[0], self.crop[1]
        if isinstance(self.resize, list):
            return self.resize[0], self.resize[1]
        return None


def build_spec(config: PreprocessConfig, stats: ImageStats) -> PreprocessSpec:
    """The preprocessing of a network without pretraining, which may raise ConfigError for sizes that cannot work.

    `pipeline.pretraining.spec_for` gives that of a run, whose weights may bring their own.
    """
    for key, sides in (("resize", config.resize), ("crop", config.crop)):
        values = sides if isinstance(sides, list) else [] if sides is None else [sides]
        if any(side <= 0 for side in values) or (isinstance(sides, list) and len(sides) != 2):
            raise ConfigError(f"`preprocess.{key}` is {sides}; it must be positive, [height, width] when a list.")
    interpolation = config.interpolation or "bilinear"
    antialias = config.antialias is not False
    if interpolation == "lanczos" and not antialias:
        raise ConfigError("`preprocess.antialias: false` has no lanczos filter. Use bilinear or bicubic, or antialias.")
    mean, std = normalization_numbers(config.normalization or "dataset", stats)
    spec = PreprocessSpec(
        resize=config.resize,
        crop=config.crop,
        interpolation=interpolation,
        antialias=antialias,
        mean=mean,
        std=std,
        resize_mode="exact" if isinstance(config.resize, list) else "shortest",
    )
    if spec.fixed_size is None:
        raise ConfigError(
            "`preprocess` leaves images of different sizes, which cannot form a batch. "
            "Give `preprocess.crop: [height, width]`, or a `preprocess.resize` of that form."
        )
    return spec


def normalization_numbers(name: Normalization, stats: ImageStats) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of RGB, pixels scaled to 0..1, that a preset or the data set's statistics stand for."""
    mean, std = (stats.mean, stats.std) if name == "dataset" else PRESETS[name]
    return list(mean), list(std)


def spec_from_dict(values: dict[str, Any]) -> PreprocessSpec:
    """Read a spec back from checkpoint or ONNX metadata. Raises ModelError when it has unknown or missing fields."""
    try:
        spec = PreprocessSpec(**{**values, "background": tuple(values["background"])})
    except (KeyError, TypeError) as error:
        raise ModelError(f"the model's preprocessing cannot be read ({error}); it needs another Shardline.") from error
    for name, known in (("version", 1), ("color", "RGB"), ("scale", 255)):
        if getattr(spec, name) != known:
            found = getattr(spec, name)
            raise ModelError(f"the model's preprocessing has {name} {found}, not {known}; it needs another Shardline.")
    return spec


def open_image(encoded: bytes, background: tuple[int, int, int]) -> Image.Image:
    """Decode fully, turn upright by EXIF, composite alpha on `background`, convert to RGB.

    Raises DataError with the reason when the bytes are no whole image of a known format.
    """
    return finish_image(read_header(encoded), background)


def read_header(encoded: bytes | bytearray, max_pixels: int | None = None) -> Image.Image:
    """An image whose header is read, and nothing decoded yet. Raises DataError as above."""
    most = MAX_PIXELS if max_pixels is None else max_pixels
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        number = num_pixels(image)
    except Image.DecompressionBombError as error:  # far beyond
        raise TooManyPixelsError(str(error).partition(",")[0]) from error
    except Exception as error:  # Pillow raises almost anything on corrupt bytes
        raise _described(error) from error
    if number > most:
        what = f"{image.width} x {image.height} pixels" if number == image.width * image.height else "the pixels of its tiles"
        raise TooManyPixelsError(f"{what} are more than {most:,}")
    if encoded.count(bytes([0xFF, SCAN])) > MAX_SCANS and image.format in ("JPEG", "MPO") and _num_scans(encoded) > MAX_SCANS:
        raise DataError(f"a JPEG of more than {MAX_SCANS} scans")
    return image


def num_pixels(image: Image.Image) -> int:
    """For how many pixels there must be room to decode `image`: a tile of a TIFF may be far larger than its picture."""
    number = image.width * image.height
    if image.format == "TIFF":
        height, width = (image.tag_v2.get(side, 0) for side in TILE_SIDES)  # type: ignore[attr-defined]
        number = max(number, height * width)
    return number


def _num_scans(jpeg: bytes | bytearray) -> int:
    """How many scans there are, as far as that is not too many."""
    number, place = 0, 2
    while number <= MAX_SCANS and (found := MARKER.search(jpeg, place)):
        marker, place = jpeg[found.start() + 1], found.end()
        if marker == END_OF_IMAGE:
            break
        number += marker == SCAN
        place += int.from_bytes(jpeg[place : place + 2], "big")
    return number


def finish_image(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """What `open_image` makes of an image whose header was read."""
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, background)
    except DataError:
        raise
    except Exception as error:  # as above
        raise _described(error) from error


def _described(error: Exception) -> DataError:
    return DataError(str(error).split(" <_io")[0] or type(error).__name__)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # it would copy


def _eight_bits(image: Image.Image) -> Pixels:
    """Levels (H, W) of a grey image of 16 or 32 bits, which Pillow's own conversion clips at 255 instead of scaling.

    White is 65,535 in integers and 1 in floats, whatever this image holds: a scale taken from its own pixels would make equal
    things look different. Raises DataError for pixels outside of that.
    """
    grey = np.asarray(image, dtype=np.float64)
    white = 1.0 if image.mode == "F" else 65535.0
    low, high = float(grey.min()), float(grey.max())
    if not 0 <= low <= high <= white:  # false for NaN too
        raise DataError(f"its grey levels go from {low:g} to {high:g}, not from 0 to {white:g}; convert it to 8 or 16 bits")
    return np.rint(grey * (255.0 / white)).astype(np.uint8)


def decode_image(encoded: bytes, spec: PreprocessSpec) -> Pixels:
    """Return the pixels of an encoded image as the network expects them: uint8 (H, W, 3), RGB.

    Raises DataError with the reason when the image cannot be decoded.
    """
    return finish_pixels(read_header(encoded), spec)


def finish_pixels(image: Image.Image, spec: PreprocessSpec) -> Pixels:
    """What `decode_image` makes of an image whose header was read."""
    image = finish_image(image, spec.background)
    if spec.resize is not None:
        image = _resize(image, spec)
    if spec.crop is not None:
        image = _center_crop(image, spec.crop, spec)
    return np.asarray(image)  # (H, W, 3)


def _resize(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    if isinstance(spec.resize, list):
        height, width = spec.resize
    else:
        assert spec.resize is not None
        shortest = min(image.size)
        whole = int if spec.resize_mode == "torchvision" else round
        width, height = (max(1, whole(side * spec.resize / shortest)) for side in image.size)
    if image.size == (width, height):
        return image
    if spec.antialias or spec.interpolation == "nearest":
        return image.resize((width, height), FILTERS[spec.interpolation])
    # Pillow always filters when it shrinks by `resize`; `transform` samples without.
    box = (0, 0, image.width, image.height)
    return image.transform((width, height), Image.Transform.EXTENT, box, resample=FILTERS[spec.interpolation])


def _center_crop(image: Image.Image, crop: list[int], spec: PreprocessSpec) -> Image.Image:
    height, width = crop
    if image.width < width or image.height < height:
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), spec.background)
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        image = canvas
    left, top = (image.width - width) // 2, (image.height - height) // 2
    if spec.resize_mode == "torchvision":
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
