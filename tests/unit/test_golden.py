import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ModelError
from pipeline.golden import GoldenVectors, awkward_images, compare_golden, decode_all, require_golden
from pipeline.preprocess import PreprocessSpec

PATH = Path("model.onnx")


@pytest.fixture
def spec() -> PreprocessSpec:
    return PreprocessSpec(20, [16, 16], "bilinear", True, [0.5] * 3, [0.2] * 3, "shortest")


@pytest.fixture
def golden(spec: PreprocessSpec) -> GoldenVectors:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    encoded = awkward_images(Image.fromarray(colours).resize((40, 30)))
    pixels = decode_all(encoded, spec)
    return GoldenVectors([*encoded], [*encoded.values()], pixels, np.full((len(encoded), 3), 1 / 3, dtype=np.float32))


def test_they_hold_what_decoders_stumble_over(golden: GoldenVectors) -> None:
    assert {"greyscale", "cmyk", "exif-rotated", "alpha", "1x1", "panorama"} < set(golden.kinds)
    assert golden.pixels.shape == (len(golden.kinds), 16, 16, 3)
    by_kind = dict(zip(golden.kinds, golden.pixels.astype(int), strict=True))
    assert np.ptp(by_kind["greyscale"], axis=2).max() == 0
    assert by_kind["1x1"].std(axis=(0, 1)).max() == 0
    assert np.abs(by_kind["exif-rotated"] - np.rot90(by_kind["jpeg"], -1)).mean() < 12
    assert np.abs(by_kind["cmyk"] - by_kind["jpeg"]).mean() < 12
    assert by_kind["alpha"].mean() > by_kind["plain"].mean(), "white shines through"


def test_they_come_back_from_their_file(golden: GoldenVectors, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(golden.to_bytes())
    again = GoldenVectors.read(path)
    assert (again.kinds, again.encoded) == (golden.kinds, golden.encoded)
    assert (again.pixels == golden.pixels).all()
    assert (again.probabilities == golden.probabilities).all()
    for content in (b"", b"PK", golden.to_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be read as golden vectors"):
            GoldenVectors.read(path)


def test_a_pickle_in_their_place_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    with path.open("wb") as file:
        np.savez(file, lengths=np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ModelError, match="allow_pickle=False"):
        GoldenVectors.read(path)


def test_the_same_machine_replays_them_exactly(golden: GoldenVectors, spec: PreprocessSpec) -> None:
    replay = compare_golden(golden, spec, golden.probabilities)
    assert (set(replay.levels.values()), replay.max_abs) == ({0}, 0.0)
    assert require_golden(PATH, replay) == "11 images of awkward kinds: the same pixels, probabilities within 0e+00"


@pytest.mark.parametrize(
    "change",
    [
        lambda golden: dataclasses.replace(golden, probabilities=golden.probabilities[0]),
        lambda golden: dataclasses.replace(golden, probabilities=golden.probabilities[:-1]),
        lambda golden: dataclasses.replace(golden, probabilities=golden.probabilities.astype(str)),
        lambda golden: dataclasses.replace(golden, pixels=golden.pixels.astype(float)),
        lambda golden: dataclasses.replace(golden, pixels=golden.pixels[:-1]),
        lambda golden: GoldenVectors([], [], golden.pixels[:0], golden.probabilities[:0]),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(
    golden: GoldenVectors, tmp_path: Path, change: Callable[[GoldenVectors], GoldenVectors]
) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(change(golden).to_bytes())
    with pytest.raises(ModelError, match="cannot be read as golden vectors"):
        GoldenVectors.read(path)


def test_an_image_that_is_none_is_named(golden: GoldenVectors, spec: PreprocessSpec) -> None:
    broken = dataclasses.replace(golden, encoded=[b"no image", *golden.encoded[1:]])
    with pytest.raises(ModelError, match=r"golden\.npz: its image 'plain' cannot be decoded"):
        compare_golden(broken, spec, golden.probabilities)


def test_another_decoder_another_preprocessing_and_other_answers_are_told_apart(
    golden: GoldenVectors, spec: PreprocessSpec
) -> None:
    pixels = golden.pixels.copy()
    pixels[golden.kinds.index("cmyk")] ^= 16
    other = dataclasses.replace(golden, pixels=pixels)
    with pytest.raises(ModelError, match="the pixels of 'cmyk' differ by 16 of 255 levels"):
        require_golden(PATH, compare_golden(other, spec, golden.probabilities))
    upright = dataclasses.replace(spec, exif=True, interpolation="bicubic")
    with pytest.raises(ModelError, match="decodes images otherwise"):
        require_golden(PATH, compare_golden(golden, upright, golden.probabilities))
    with pytest.raises(ModelError, match=r"probabilities differ by 1\.0e-03"):
        require_golden(PATH, compare_golden(golden, spec, golden.probabilities + np.float32(1e-3)))
    assert "probabilities within 1e-03" in require_golden(
        PATH, compare_golden(golden, spec, golden.probabilities + np.float32(1e-3)), "int8"
    )
    with pytest.raises(ModelError, match=r"has the precision 'int4', which this Shardline does not know\. Upgrade it"):
        require_golden(PATH, compare_golden(golden, spec, golden.probabilities), "int4")
    with pytest.raises(ModelError, match="probabilities differ by inf"):
        require_golden(PATH, compare_golden(golden, spec, np.full_like(golden.probabilities, np.nan)))
