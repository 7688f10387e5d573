import io
import math
from typing import Any

import numpy as np
from PIL import Image

from pipeline.report.drawing import RIGHT, WRONG, blend
from pipeline.report.reliability import SIDE, draw_reliability


def drawn(*bins: tuple[int, float, float]) -> Image.Image:
    """A diagram of bins (count, confidence, accuracy)."""
    width = 1 / len(bins)
    entries: list[dict[str, Any]] = [
        {"low": number * width, "high": (number + 1) * width, "count": count, "confidence": sure, "accuracy": right}
        for number, (count, sure, right) in enumerate(bins)
    ]
    with Image.open(io.BytesIO(draw_reliability(entries, "title"))) as file:
        return file.convert("RGB")


def share_of(sheet: Image.Image, colour: tuple[int, int, int]) -> float:
    """How much of the height of the diagram has a colour, in the column where it has most."""
    return float((np.asarray(sheet) == colour).all(axis=2).sum(axis=0).max()) / SIDE


def test_bars_are_as_tall_as_what_they_say_and_show_on_which_side_the_confidence_errs() -> None:
    too_sure = drawn((0, math.nan, math.nan), (7, 0.9, 0.6))
    # The dashed line takes a few pixels of a column, a bar's edges one each.
    assert abs(share_of(too_sure, blend(RIGHT, 0.85)) - 0.6) < 0.02
    assert abs(share_of(too_sure, blend(WRONG, 0.7)) - 0.3) < 0.02
    assert share_of(too_sure, blend(RIGHT, 0.35)) == 0
    not_sure_enough = drawn((0, math.nan, math.nan), (7, 0.6, 0.8))
    assert abs(share_of(not_sure_enough, blend(RIGHT, 0.35)) - 0.2) < 0.02
    assert share_of(not_sure_enough, blend(WRONG, 0.7)) == 0


def test_bins_without_answers_have_no_bar() -> None:
    sheet = drawn((0, math.nan, math.nan), (0, math.nan, math.nan))
    assert share_of(sheet, blend(RIGHT, 0.85)) == 0
