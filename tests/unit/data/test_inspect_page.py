import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import inspect_page
from pipeline.data.duplicates import CopyGroup
from pipeline.data.inspect import Inspection, inspect_dataset
from pipeline.data.inspect_page import (
    SIDE,
    build_sections,
    choose_groups,
    classes_shown,
    describe_group,
    draw_samples,
    draw_small,
    make_pictures,
    write_inspection,
)
from pipeline.report.html import escape, render_page
from tests.unit.data.handmade import Sample, make_dataset
from tests.unit.data.images import as_png, encode, noise

WHITE = (255, 255, 255)


def picture(seed: int) -> bytes:
    return encode(Image.fromarray(noise(6, 8, seed)).resize((60, 45), Image.Resampling.BICUBIC), "JPEG", quality=90)


def inspected(folder: Path, splits: dict[str, list[Sample]], class_names: list[str]) -> Inspection:
    return inspect_dataset(make_dataset(folder, splits, class_names), DataConfig(), 1)


def page_of(inspection: Inspection, seed: int = 0) -> str:
    return render_page("title", build_sections(inspection, seed, 1))


def pictures_in(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)]


@pytest.fixture
def many_classes(tmp_path: Path) -> Inspection:
    """Class number k of 100 has 12 - k // 10 samples in train."""
    image, classes = picture(1), [number for number in range(100) for _ in range(12 - number // 10)]
    train = [Sample(f"{place:05d}", image, number) for place, number in enumerate(classes)]
    return inspected(tmp_path / "data", {"train": train}, [f"class {number}" for number in range(100)])


def test_the_page_names_what_it_shows(tmp_path: Path) -> None:
    names = ["<b>cats</b>", "日本 & 😀"]
    train = [Sample(f"t{seed}", picture(seed), seed % 2) for seed in range(12)]
    test = [Sample("leak", picture(4), 1), Sample("own", picture(30), 0), Sample("broken", b"no image", 1)]
    page = page_of(inspected(tmp_path / "data", {"train": train, "test": test}, names))
    for name in names:
        assert escape(name) in page
    for text in (
        "leak",
        "broken",
        "cannot identify image file",
        "same bytes · train and test · labels differ",
        "byte-identical",
    ):
        assert text in page
    assert "<b>cats</b>" not in page
    shown = pictures_in(page)
    assert shown
    assert all(max(image.size) <= SIDE for image in shown)


def test_findings_are_the_first_section_and_samples_the_last(tmp_path: Path) -> None:
    sections = build_sections(inspected(tmp_path / "data", {"train": [Sample("a", picture(1), 0)]}, ["x"]), 0, 1)
    titles = [section.title for section in sections]
    assert (titles[0], titles[-1]) == ("Findings", "Random samples of each class")


def test_of_many_classes_the_most_and_the_least_frequent_are_shown(many_classes: Inspection) -> None:
    assert classes_shown(many_classes) == [*range(20), *range(80, 100)]
    page = page_of(many_classes)
    assert "the other 60 are in inspect.json" in page
    assert "Of 100 classes the 20 most and the 20 least frequent; 60 are left out." in page
    assert "class 19 " in page
    assert "class 50 (" not in page


def test_the_number_of_pictures_is_bounded(many_classes: Inspection) -> None:
    assert len(pictures_in(page_of(many_classes))) == 20 * 8 + 10 * 4 + 10 * 3 + 2  # and the one pair of copies


def test_samples_are_drawn_by_seed_from_train_first(tmp_path: Path) -> None:
    image = picture(1)
    val = [Sample(f"v{n}", image, 0) for n in range(20)] + [Sample("only", image, 1)]
    train = [Sample(f"t{n}", image, 0) for n in range(40)]
    inspection = inspected(tmp_path / "data", {"val": val, "train": train}, ["x", "y", "z"])
    drawn = draw_samples(inspection, 0, seed=7)
    assert len(set(drawn)) == 8
    assert {inspection.samples.split_of(place) for place in drawn} == {"train"}
    assert drawn == draw_samples(inspection, 0, seed=7) != draw_samples(inspection, 0, seed=8)
    assert draw_samples(inspection, 1, seed=7) == [20]  # only val has it
    assert draw_samples(inspection, 2, seed=7) == []


def group(first: int, across: bool, differ: bool, exact: bool = True) -> CopyGroup:
    splits = ("train", "test") if across else ("train",)
    return CopyGroup(
        (first, first + 1), splits, exact, differ, (first, first + 1), exact, 0 if exact else 2, 0.0 if exact else 3.25
    )


def test_one_kind_of_copies_does_not_crowd_out_the_others() -> None:
    groups = [group(number, True, True) for number in range(100)] + [group(200, True, False), group(300, False, False, False)]
    chosen = choose_groups(groups)
    assert len(chosen) == 24
    assert chosen[-2:] == groups[-2:]
    assert chosen[:22] == groups[:22]
    assert choose_groups(groups[:3]) == groups[:3]


def test_a_group_is_described_by_its_pair() -> None:
    assert describe_group(group(0, False, False)) == "same bytes · train"
    assert describe_group(group(0, True, True, exact=False)) == "near copy: 2 bits, 3.2 levels · train and test · labels differ"
    three = CopyGroup((0, 1, 2), ("train", "val", "test"), True, False, (0, 1), True, 0, 0.0)
    assert describe_group(three) == "same bytes · all splits · 1 more"


def test_thumbnails_keep_the_shape_and_enlarge_tiny_images_by_whole_pixels() -> None:
    def size(pixels_high: int, pixels_wide: int) -> tuple[int, int]:
        return Image.open(io.BytesIO(draw_small(as_png(noise(pixels_high, pixels_wide)), WHITE))).size

    assert size(300, 400) == (96, 72)
    assert size(2000, 10) == (1, 96)
    assert size(8, 8) == (96, 96)
    assert size(40, 20) == (40, 80)
    assert size(60, 50) == (50, 60)
    assert draw_small(b"no image", WHITE) == b""


def test_the_pixels_of_a_tiny_image_stay_sharp() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[:, 1] = 255
    enlarged = np.asarray(Image.open(io.BytesIO(draw_small(as_png(pixels), WHITE))).convert("L"))  # (96, 96)
    assert enlarged[:, :40].max() < 20
    assert enlarged[:, 56:].min() > 235


def test_thumbnails_are_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encode(Image.fromarray(noise(100, 200)), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(draw_small(rotated, WHITE))).size == (48, 96)


def test_pictures_are_made_in_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_page, "PICTURES_A_JOB", 2)
    train = [Sample(f"t{seed}", picture(seed), 0) for seed in range(9)]
    samples = inspected(tmp_path / "data", {"train": train}, ["x"]).samples
    alone, together = (make_pictures(samples, range(9), workers) for workers in (1, 3))
    assert alone == together
    assert sorted(alone) == list(range(9))


def test_a_set_with_several_labels_shows_them_all(tmp_path: Path) -> None:
    train = [Sample("a", picture(1), (0, 1)), Sample("b", picture(2), ()), Sample("c", picture(3), (1,))]
    page = page_of(inspected(tmp_path / "data", {"train": train}, ["sky", "tree"]))
    assert "sky, tree" in page
    assert "one may have several classes" in page


def test_a_set_in_which_nothing_decodes_has_a_page_too(tmp_path: Path) -> None:
    inspection = inspected(tmp_path / "data", {"train": [Sample("a", b"x", 0), Sample("b", b"y", 1)]}, ["x", "y"])
    page = page_of(inspection)
    assert "All 2 images are undecodable" in page
    assert pictures_in(page) == []
    write_inspection(inspection, tmp_path, workers=1)  # NaN is null in JSON
    assert '"mean": [\n        null' in (tmp_path / "inspect.json").read_text()
