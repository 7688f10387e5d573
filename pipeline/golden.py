"""Golden vectors: encoded images of awkward kinds with the pixels and probabilities that belong to them, beside the model.

They travel as GOLDEN, a numpy file without pickles, so that any machine with onnxruntime and Pillow can find out whether it
decodes, resizes and answers as the one that trained. Decoders of JPEG may differ by a level or two; answers are compared for
the stored pixels, so that the two are told apart.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import DataError, ModelError
from pipeline.preprocess import Pixels, PreprocessSpec, decode_image

GOLDEN = "golden.npz"
# Of a level of 255. libjpeg-turbo's releases and IDCTs differ by one; a resize can add another.
MOST_LEVELS = 2
# Of a probability, on other processors and in other releases of onnxruntime. float32 rounds in the seventh digit. float16 has
# steps of 0.016 for logits of about 20, and a GPU rounds every layer where a CPU rounds the logits alone; two logits that are
# off by two steps move a probability by a quarter of both. INT8 kernels agree on integers (weights of 7 bits keep their sums
# from saturating) but may round a value between two layers to the next of its 256 levels; logits were seen to differ by 0.05
# within one machine, and are given twice that.
MOST_ABS = {"fp32": 1e-4, "fp16": 2e-2, "int8": 5e-2}


@dataclass(frozen=True)
class GoldenVectors:
    """N images: their kinds, encoded bytes, pixels uint8 (N, H, W, 3) and probabilities float32 (N, K)."""

    kinds: list[str]
    encoded: list[bytes]
    pixels: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """The content of the file."""
        content = io.BytesIO()
        lengths = np.array([len(each) for each in self.encoded])
        stream = np.frombuffer(b"".join(self.encoded), dtype=np.uint8)
        arrays: dict[str, Any] = {"kinds": np.array(self.kinds), "lengths": lengths, "encoded": stream}
        np.savez(content, pixels=self.pixels, probabilities=self.probabilities, **arrays)
        return content.getvalue()

    @classmethod
    def read(cls, path: Path) -> "GoldenVectors":
        """Read the file. Raises ModelError when it is none."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                ends = np.cumsum(arrays["lengths"])
                stream = arrays["encoded"].tobytes()
                encoded = [stream[end - length : end] for end, length in zip(ends, arrays["lengths"], strict=True)]
                golden = cls([str(kind) for kind in arrays["kinds"]], encoded, arrays["pixels"], arrays["probabilities"])
                golden._require_shapes()
                return golden
        except Exception as error:  # zipfile, numpy and zlib each have their own
            raise ModelError(f"{path}: cannot be read as golden vectors ({error}). Export the model again.") from error

    def _require_shapes(self) -> None:
        number, pixels, probabilities = len(self.kinds), self.pixels, self.probabilities
        if not number or not number == len(self.encoded) == len(pixels) == len(probabilities):
            raise ValueError("its parts are not of the same images")
        if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,) or probabilities.dtype != np.float32 or probabilities.ndim != 2:
            raise ValueError("its parts are no pixels and probabilities")


def awkward_images(picture: Image.Image) -> dict[str, bytes]:
    """One picture in the forms that decoders and preprocessing stumble over, encoded."""
    picture = picture.convert("RGB").resize((max(picture.width, 24), max(picture.height, 16)))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by 90 degrees
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    panorama = picture.resize((20 * picture.height, picture.height))
    return {
        "plain": _encode(picture, "PNG"),
        "jpeg": _encode(picture, "JPEG", quality=90, subsampling=2),
        "progressive": _encode(picture, "JPEG", quality=90, progressive=True),
        "greyscale": _encode(picture.convert("L"), "JPEG", quality=90),
        "cmyk": _encode(picture.convert("CMYK"), "JPEG", quality=90),
        "exif-rotated": _encode(picture, "JPEG", quality=90, exif=rotated),
        "alpha": _encode(alpha, "PNG"),
        "palette": _encode(picture.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "webp": _encode(picture, "WEBP", lossless=True),
        "1x1": _encode(picture.resize((1, 1)), "PNG"),
        "panorama": _encode(panorama, "JPEG", quality=90),
    }


def _encode(picture: Image.Image, form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def decode_all(images: dict[str, bytes], spec: PreprocessSpec) -> Pixels:
    """Pixels (N, H, W, 3) of encoded images."""
    return np.stack([decode_image(encoded, spec) for encoded in images.values()])


@dataclass(frozen=True)
class Replay:
    """How a machine compares with the golden vectors: largest differences of pixels, in levels, and of probabilities."""

    num_images: int
    levels: dict[str, int]  # of each kind
    max_abs: float

    @property
    def worst_kind(self) -> str:
        """The kind of image whose pixels differ most."""
        return max(self.levels, key=lambda kind: self.levels[kind])


def compare_golden(golden: GoldenVectors, spec: PreprocessSpec, probabilities: npt.NDArray[np.float32]) -> Replay:
    """Decode the images here, and compare with `probabilities`, (N, K), of the stored pixels. Raises ModelError."""
    levels = {}
    for kind, encoded, wanted in zip(golden.kinds, golden.encoded, golden.pixels, strict=True):
        try:
            found = decode_image(encoded, spec).astype(int)
        except DataError as error:
            raise ModelError(f"{GOLDEN}: its image '{kind}' cannot be decoded ({error}).") from error
        levels[kind] = 255 if found.shape != wanted.shape else int(np.abs(found - wanted).max())
    difference = np.abs(probabilities - golden.probabilities)
    return Replay(len(golden.kinds), levels, float(difference.max()) if np.isfinite(difference).all() else float("inf"))


def require_golden(path: Path, replay: Replay, precision: str = "fp32") -> str:
    """What the comparison says, in words. Raises ModelError when this machine decodes or answers otherwise."""
    if precision not in MOST_ABS:
        raise ModelError(f"{path}: has the precision '{precision}', which this Shardline does not know. Upgrade it.")
    if replay.max_abs > MOST_ABS[precision]:
        raise ModelError(
            f"{path}: answers otherwise on this machine than where it was exported: probabilities differ by "
            f"{replay.max_abs:.1e} (at most {MOST_ABS[precision]:.0e}). Try another release of onnxruntime."
        )
    kind = replay.worst_kind
    if replay.levels[kind] > MOST_LEVELS:
        raise ModelError(
            f"{path}: this machine decodes images otherwise than the one that exported it: the pixels of '{kind}' differ by "
            f"{replay.levels[kind]} of 255 levels (at most {MOST_LEVELS}). Try another release of Pillow."
        )
    pixels = f"at most {replay.levels[kind]} levels apart" if replay.levels[kind] else "the same pixels"
    return f"{replay.num_images} images of awkward kinds: {pixels}, probabilities within {replay.max_abs:.0e}"
