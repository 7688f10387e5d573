import importlib.util

import numpy as np
import pytest
from PIL import Image

from pipeline.report.drawing import font, shorten, thumbnail, write_upwards


def test_a_text_is_cut_only_where_it_does_not_fit() -> None:
    face = font(12)
    assert shorten("cat", face, face.getlength("cat")) == "cat"
    cut = shorten("a long name", face, 40)
    assert cut.endswith("…") and face.getlength(cut) <= 40


def test_without_matplotlib_there_is_still_a_typeface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    font.cache_clear()
    assert font(12).getlength("cat") > 0
    font.cache_clear()


def test_text_upwards_ends_where_it_should_and_is_taller_than_wide() -> None:
    sheet = Image.new("RGB", (60, 100), "white")
    write_upwards(sheet, (30, 90), "airplane", font(13), (0, 0, 0))
    rows, columns = np.nonzero(np.asarray(sheet.convert("L")) < 128)
    assert 80 < rows.max() < 90 and rows.max() - rows.min() > 2 * (columns.max() - columns.min())
    assert abs((columns.max() + columns.min()) / 2 - 30) < 4


def test_a_thumbnail_is_enlarged_by_whole_factors_and_made_smaller_smoothly() -> None:
    small = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    large = np.asarray(thumbnail(small, 128))
    assert large.shape == (75, 125, 3) and np.array_equal(large[::25, ::25], small)
    assert thumbnail(np.zeros((300, 200, 3), np.uint8), 128).size == (85, 128)
    assert thumbnail(np.zeros((100, 100, 3), np.uint8), 128).size == (100, 100)
