import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.figures import Figures, bin_values, compute_figures, find_suspicious, pixel_statistics, quantiles
from pipeline.data.measure import FACTS_ROW, Facts, measure
from pipeline.data.samples import Labels, Samples
from tests.unit.data.handmade import Sample, make_dataset
from tests.unit.data.images import as_png, encode, noise


def figures_of(folder: Path, splits: dict[str, list[Sample]], class_names: list[str]) -> Figures:
    samples = Samples.open(make_dataset(folder, splits, class_names), DataConfig())
    return compute_figures(samples, Labels(samples), measure(samples, 1))


def facts_of(*rows: dict[str, float]) -> Facts:
    """Facts of ordinary images, but for what is given."""
    facts = np.zeros(len(rows), FACTS_ROW)
    facts["width"], facts["height"], facts["mean"], facts["spread"], facts["decoded"] = 100, 100, 128, 50, True
    for fact, row in zip(facts, rows, strict=True):
        for name, value in row.items():
            fact[name] = value
    return facts


def test_each_split_is_counted(tmp_path: Path) -> None:
    images = [as_png(noise(10, 20, seed)) for seed in range(7)]
    train = [Sample(f"t{n}", images[n], n % 2) for n in range(5)]
    splits = figures_of(tmp_path / "data", {"train": train, "test": [Sample("x", images[5], 2)]}, ["a", "b", "c"]).splits
    assert list(splits) == ["train", "test"]
    assert (splits["train"].num_samples, splits["train"].num_shards, splits["train"].class_counts) == (5, 2, [3, 2, 0])
    assert (splits["test"].num_samples, splits["test"].num_shards, splits["test"].class_counts) == (1, 1, [0, 0, 1])
    assert splits["train"].num_bytes == sum(map(len, images[:5]))
    assert splits["train"].stored == {"PNG RGB": 5}
    assert splits["train"].sizes["width"]["median"] == 20


def test_several_labels_are_counted_each(tmp_path: Path) -> None:
    image = as_png(noise(10, 20))
    train = [Sample("a", image, (0, 1)), Sample("b", image, (1,)), Sample("c", image, ())]
    (split,) = figures_of(tmp_path / "data", {"train": train}, ["x", "y"]).splits.values()
    assert (split.class_counts, split.num_unlabelled, split.num_samples) == ([1, 2], 1, 3)


def test_channel_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    # 4 pixels of level 0 and 12 of level 200, whatever image they are in: mean 150, variance 200 * 200 * 3 / 16.
    images = [np.zeros((2, 2, 3), np.uint8), np.full((3, 4, 3), 200, np.uint8)]
    train = [Sample(f"{n}", as_png(pixels), 0) for n, pixels in enumerate(images)]
    (split,) = figures_of(tmp_path / "data", {"train": train}, ["x"]).splits.values()
    assert split.mean == [round(150 / 255, 6)] * 3
    assert split.std == [round(200 * math.sqrt(3) / 4 / 255, 6)] * 3
    assert (split.brightness[0], split.brightness[25], sum(split.brightness)) == (1, 1, 2)  # levels 0..8 and 200..208


def test_statistics_are_exact_for_more_pixels_than_a_float_can_count() -> None:
    histogram = np.zeros((3, 256), np.int64)
    histogram[:, 254], histogram[:, 255] = 2**54, 2**54 + 2**20
    mean, std = pixel_statistics(histogram)
    assert mean[0] == pytest.approx(254.5 / 255, abs=1e-6)  # figures have six digits
    assert std[0] == pytest.approx(0.5 / 255, abs=1e-6)


def test_without_a_pixel_there_are_no_statistics() -> None:
    mean, std = pixel_statistics(np.zeros((3, 256), np.int64))
    assert all(map(math.isnan, mean + std))


def test_sizes_leave_out_what_does_not_decode_but_not_its_bytes(tmp_path: Path) -> None:
    images = [as_png(noise(10, 30)), as_png(noise(10, 30, 1)), as_png(noise(40, 20)), b"no image"]
    sizes = figures_of(tmp_path / "data", {"train": [Sample(f"{n}", i, 0) for n, i in enumerate(images)]}, ["x"]).sizes
    assert sizes.common == [(30, 10, 2), (20, 40, 1)]
    assert sizes.num_sizes == 2
    assert sizes.quantiles["aspect"] == {"min": 0.5, "5 %": 0.5, "25 %": 0.5, "median": 3, "75 %": 3, "95 %": 3, "max": 3}
    assert (sizes.quantiles["megapixels"]["max"], sizes.quantiles["file_bytes"]["min"]) == (0.0008, 8)
    assert sum(sizes.longest_side.counts) == 3
    assert sum(sizes.file_bytes.counts) == 4


def test_quantiles_are_values_that_occur() -> None:
    found = quantiles(np.arange(1.0, 101.0))
    assert found == {"min": 1, "5 %": 5, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "max": 100}
    assert quantiles(np.array([7.0])) == dict.fromkeys(found, 7)
    assert quantiles(np.zeros(0)) == {}


def test_bins_have_round_edges_and_count_every_value() -> None:
    bins = bin_values(np.array([500.0, 375, 375, 260, 499, 510]))
    assert (bins.edges[0], bins.edges[1], bins.edges[-1]) == (260, 280, 520)
    assert {edge: count for edge, count in zip(bins.edges, bins.counts, strict=False) if count} == {
        260: 1,
        360: 2,
        480: 1,
        500: 2,
    }
    assert bin_values(np.array([8.0, 8, 9])).counts == [2, 1]
    assert (bin_values(np.array([8.0, 8])).edges, bin_values(np.array([8.0, 8])).counts) == ([8, 9], [2])
    assert bin_values(np.zeros(0)).counts == []


@pytest.mark.parametrize("values", [[1.0, 21], [3.0, 1e6, 17, 999], [775.0, 27_800], [1.0, 1e9]])
def test_a_wide_span_is_binned_by_ratio(values: list[float]) -> None:
    bins = bin_values(np.array(values))
    assert bins.edges[0] <= min(values)
    assert max(values) < bins.edges[-1]
    assert sum(bins.counts) == len(values)
    ratios = [high / low for low, high in zip(bins.edges, bins.edges[1:], strict=False)]
    assert 1.2 < min(ratios) <= max(ratios) < 1.3
    assert len(bins.counts) < 95


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("undecodable", [{}, {"decoded": False}]),
        ("blank", [{"spread": 3.0}, {"spread": 2.9}]),
        ("tiny", [{"width": 32}, {"width": 31}]),
        ("elongated", [{"width": 400}, {"width": 401}]),
        ("elongated", [{"height": 400}, {"height": 401}]),
        ("very dark", [{"mean": 20}, {"mean": 19.9}]),
        ("very bright", [{"mean": 235}, {"mean": 235.1}]),
    ],
)
def test_an_image_stands_out_beyond_the_threshold_and_not_at_it(kind: str, rows: list[dict[str, float]]) -> None:
    found = find_suspicious(facts_of(*rows))
    assert {name: places.tolist() for name, places in found.items() if len(places)} == {kind: [1]}


def test_the_most_extreme_come_first() -> None:
    dark = find_suspicious(facts_of({"mean": 15}, {"mean": 2}, {}, {"mean": 9}, {"mean": 2}))["very dark"]
    assert dark.tolist() == [1, 4, 3, 0]
    elongated = find_suspicious(facts_of({"width": 500}, {"height": 1000}, {"width": 700}))["elongated"]
    assert elongated.tolist() == [1, 2, 0]


def test_a_blank_image_is_neither_dark_nor_bright() -> None:
    found = find_suspicious(facts_of({"mean": 0, "spread": 0}, {"mean": 255, "spread": 0}))
    assert (len(found["blank"]), len(found["very dark"]), len(found["very bright"])) == (2, 0, 0)


def test_an_image_that_does_not_decode_is_nothing_else(tmp_path: Path) -> None:
    white = encode(Image.new("RGB", (40, 40), "white"), "PNG")
    train = [Sample("a", b"", 0), Sample("b", white, 0)]
    found = figures_of(tmp_path / "data", {"train": train}, ["x"]).suspicious
    assert {name: places.tolist() for name, places in found.items() if len(places)} == {"undecodable": [0], "blank": [1]}
