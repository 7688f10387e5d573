"""Are the pretrained features worth having? A linear probe on them must beat one on random features of the same network."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.data.dataset import Batch
from pipeline.recipe.verdict import Subject, Verdict
from pipeline.report.html import Cell, Table

NUM_TRAIN, NUM_HELD_OUT = 512, 256
# Of the images on which only one probe is right, pretrained must win by so many deviations of a fair coin.
STANDARD_ERRORS = 2.0
TOO_EASY = 0.95


def check_pretrained(subject: Subject) -> Verdict:
    """Fit a linear classifier on the features of a sample, and judge it on another (a paired sign test: McNemar, 1947)."""
    expected = f"a linear probe that beats random features by {STANDARD_ERRORS:g} deviations"
    unable = _why_not(subject)
    if unable:
        return Verdict("pretrained", "skipped", None, expected, unable)
    train, held_out = (list(subject.sampled(s, n)) for s, n in (("train", NUM_TRAIN), ("val", NUM_HELD_OUT)))
    pretrained = _probe(subject.build_network(subject.config.seed), train, held_out)
    random = _probe(subject.build_random_network(subject.config.seed), train, held_out)
    won, lost = int((pretrained & ~random).sum()), int((~pretrained & random).sum())
    value = (won - lost) / max(1, won + lost) ** 0.5
    shares = (
        f"{pretrained.mean():.3f} of {len(pretrained)} images with pretrained features, {random.mean():.3f} with random ones"
    )
    rows: list[list[Cell]] = [["pretrained", float(pretrained.mean())], ["random", float(random.mean())]]
    blocks = (Table(["features", "accuracy of a linear probe"], rows),)
    if value >= STANDARD_ERRORS:
        return Verdict("pretrained", "green", value, expected, shares, blocks)
    if random.mean() >= TOO_EASY and lost <= won + STANDARD_ERRORS:
        return Verdict("pretrained", "skipped", value, expected, f"too easy to tell: {shares}", blocks)
    why = f"{shares}: the weights do not help here, or are not in the network"
    return Verdict("pretrained", "red", value, expected, why, blocks)


def _why_not(subject: Subject) -> str:
    if subject.weights is None:
        return "`model.weights` is not set: nothing is claimed to be pretrained"
    if subject.is_streamed:
        return "the training shards are streamed: without an index no sample of them can be drawn"
    return "it needs one label an image" if subject.manifest.task == "multi" else ""


def _probe(network: nn.Sequential, train: list[Batch], held_out: list[Batch]) -> npt.NDArray[np.bool_]:
    """Which held-out images, (m,), a linear classifier on the network's features gets right."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network.eval()
    x, y = (np.concatenate(list(values)) for values in zip(*_features(network, train), strict=True))
    other_x, other_y = (np.concatenate(list(values)) for values in zip(*_features(network, held_out), strict=True))
    model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=float(x.shape[1])))
    right: npt.NDArray[np.bool_] = model.fit(x, y).predict(other_x) == other_y
    return right


def _features(network: nn.Sequential, batches: list[Batch]) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Features (n, F), all that comes before the classifier, maps averaged over the image, and labels (n,)."""
    for batch in batches:
        with torch.no_grad():
            features = network[:-1](batch["image"])
        features = features.mean(dim=(2, 3)) if features.ndim == 4 else features.flatten(1)
        yield features.float().cpu().numpy(), batch["label"].cpu().numpy()
