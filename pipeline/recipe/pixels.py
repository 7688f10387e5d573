"""What exactly enters the network? The tensors just before its first layer, against the normalisation that was declared."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.dataset import Batch
from pipeline.errors import DataError
from pipeline.preprocess import PRESETS, PreprocessSpec, open_image
from pipeline.recipe.verdict import Subject, Verdict, draw_rows
from pipeline.report.charts import Histogram
from pipeline.report.grid import draw_grid, draw_tile
from pipeline.report.html import Cell, Picture, PictureGroup, Pictures, Table, Text

TILES = 32
NUM_IMAGES = 512
# float32 on a GPU against float64 here.
ROUNDING = 1e-3
# Statistics may come from a part of the split; constants of other data are further off.
TOLERANCE = 0.05
LEVEL = 1 / 255  # a channel that is nearly the same everywhere has no deviation that could be told better
STANDARD_ERRORS = 4.0
Values = npt.NDArray[np.float64]
CHANNELS = ("red", "green", "blue")
BINS = 40


@dataclass(frozen=True)
class Fed:
    """What the network is given: its own normalised tensors (n, 3, H, W), and what the declared numbers make of the images."""

    given: torch.Tensor
    declared: torch.Tensor


def check_pixels(subject: Subject) -> Verdict:
    """Compare what leaves the network's normalisation with the declared one, and the declared numbers with the images.

    The first comparison is exact up to rounding, for every normalisation. The second holds only where the numbers are said to
    be those of this data set, and looks at whole images, as the statistics do: a resize would smooth them. A channel's mean and
    deviation over NUM_IMAGES images may be off by TOLERANCE of the deviation and STANDARD_ERRORS of their own error, which
    follows from how much images differ (to first order; Cochran, "Sampling Techniques", 1977).
    """
    fed = _feed(subject, list(_images(subject)))
    reached = float((fed.given - fed.declared).abs().max())
    scale = 1 + float(fed.declared.abs().max())
    of_data = _is_of_data(subject)
    expected = f"(pixels / {subject.spec.scale} - mean) / std as declared"
    expected += f", with the mean and deviation of the training images +- {TOLERANCE:.0%}" if of_data else ""
    blocks = (_tiles(subject), _figures(fed), _histogram(fed))
    if not reached <= ROUNDING * scale:
        low, high = float(fed.given.min()), float(fed.given.max())
        what = "the images are not normalised" if high > 100 else "they are normalised with other numbers"
        why = (
            f"what enters the first layer lies between {low:.3g} and {high:.3g}, up to {reached:.3g} from the declared: {what}"
        )
        return Verdict("pixels", "red", reached, expected, why, blocks)
    faults = list(_unlike_images(subject)) if of_data else []
    if faults:
        why = f"the declared numbers are not those of these images: {'; '.join(faults)}"
        return Verdict("pixels", "red", reached, expected, why, blocks)
    means = ", ".join(f"{mean:.2f}" for mean in fed.given.mean(dim=(0, 2, 3)).tolist())
    stds = ", ".join(f"{std:.2f}" for std in fed.given.std(dim=(0, 2, 3)).tolist())
    return Verdict("pixels", "green", reached, expected, f"normalised as declared: mean {means}, deviation {stds}", blocks)


def draw_first_batch(subject: Subject) -> bytes:
    """A PNG of the first images as they are trained on, augmented, each over its label."""
    return draw_grid(*_first_images(subject))


def _first_images(subject: Subject) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Pixels (n, H, W, 3) and labels of the first batch."""
    batch = subject.first_batch(augmented=True, size=TILES)
    fed = _feed(subject, [batch])
    return undo_normalisation(subject.spec, fed.given), [subject.label_names(label) for label in batch["label"]]


def undo_normalisation(spec: PreprocessSpec, tensors: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Pixels (n, H, W, 3) of normalised tensors (n, 3, H, W), by the declared numbers: what was done by others looks wrong."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    images = ((tensors.cpu().float() * std + mean) * spec.scale).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).numpy()


def _is_of_data(subject: Subject) -> bool:
    """Whether mean and deviation are said to be those of images that can be looked at."""
    # Those of a merged data set are pooled as if all images had one size.
    is_merged = subject.manifest.preparation.get("source") == "merge"
    is_preset = subject.config.preprocess.normalization in PRESETS or subject.weights is not None
    return not (is_preset or is_merged or subject.is_streamed)


def _images(subject: Subject) -> Iterator[Batch]:
    if subject.is_streamed:
        yield subject.first_batch(augmented=False)
    else:
        yield from subject.sampled("train", NUM_IMAGES)


def _feed(subject: Subject, batches: list[Batch]) -> Fed:
    normalize = subject.build_network(subject.config.seed).eval()[0]
    images = torch.cat([batch["image"] for batch in batches])
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (subject.spec.mean, subject.spec.std))
    with torch.no_grad():
        given = torch.cat([normalize(batch["image"]) for batch in batches]).cpu().double()
    return Fed(given, (images.cpu().double() / subject.spec.scale - mean) / std)


def _unlike_images(subject: Subject) -> Iterator[str]:
    dataset = subject.dataset()
    sums = [_sums(dataset.encoded(row), subject.spec) for row in draw_rows(dataset, NUM_IMAGES, subject.config.seed).tolist()]
    counts, firsts, seconds = (np.array(values) for values in zip(*filter(None, sums), strict=True))  # (n, 1), (n, 3), (n, 3)
    total = counts.sum()
    mean, second = firsts.sum(axis=0) / total, seconds.sum(axis=0) / total
    std = np.sqrt(np.maximum(second - mean**2, 0))
    # What each image adds to mean and variance beyond its share; nothing is left to chance where every image was looked at.
    of_mean = firsts - counts * mean
    of_variance = seconds - counts * second - 2 * mean * of_mean
    chance = np.sqrt(1 - len(sums) / len(dataset)) / total
    mean_error = chance * np.sqrt((of_mean**2).sum(axis=0))
    std_error = chance * np.sqrt((of_variance**2).sum(axis=0)) / (2 * np.maximum(std, 1e-6))
    declared_mean, declared_std = np.array(subject.spec.mean), np.array(subject.spec.std)
    allowed = np.maximum(TOLERANCE * declared_std, LEVEL)  # (3,)
    wrong_mean = ~(abs(mean - declared_mean) <= allowed + STANDARD_ERRORS * mean_error)
    wrong_std = ~(abs(std - declared_std) <= allowed + STANDARD_ERRORS * std_error)
    for number, channel in enumerate(CHANNELS):
        if wrong_mean[number]:
            yield f"{channel} has mean {mean[number]:.3f}, not {declared_mean[number]:.3f}"
        if wrong_std[number]:
            yield f"{channel} has deviation {std[number]:.3f}, not {declared_std[number]:.3f}"


def _sums(encoded: bytes, spec: PreprocessSpec) -> tuple[Values, Values, Values] | None:
    """Pixels of a whole image, (1,), and the sums of its channels and of their squares, (3,), scaled to 0..1."""
    try:
        pixels = np.asarray(open_image(encoded, spec.background), np.float64).reshape(-1, 3) / 255
    except DataError:
        return None
    return np.array([float(len(pixels))]), pixels.sum(axis=0), (pixels**2).sum(axis=0)


# ---- for the page ----


def _tiles(subject: Subject) -> Pictures:
    images, labels = _first_images(subject)
    pictures = [Picture(draw_tile(pixels), [label]) for pixels, label in zip(images, labels, strict=True)]
    return Pictures(
        [PictureGroup(pictures, "The first batch of the training, augmented; the declared normalisation is undone")]
    )


def _figures(fed: Fed) -> Table:
    channels = [fed.given[:, number] for number in range(3)]
    rows: list[list[Cell]] = [
        [name, float(c.mean()), float(c.std()), float(c.min()), float(c.max())]
        for name, c in zip(CHANNELS, channels, strict=True)
    ]
    return Table(
        ["channel", "mean", "deviation", "smallest", "largest"], rows, f"{len(fed.given)} images as the network gets them"
    )


def _histogram(fed: Fed) -> Histogram | Text:
    low, high = float(fed.given.min()), float(fed.given.max())
    if not high > low:
        return Text(["Every value is the same, or none is a number."])
    counts = [torch.histc(fed.given[:, number], BINS, low, high).int().tolist() for number in range(3)]
    edges = [low + (high - low) * place / BINS for place in range(BINS + 1)]
    return Histogram(edges, CHANNELS, counts, "Values as the network gets them", lambda edge: f"{edge:.2f}")
