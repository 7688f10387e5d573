"""Do the labels belong to the images? A network learns wrong ones by heart without a word; only the test score would tell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from pipeline.data.labels import SampleRule
from pipeline.data.order import SampleRef
from pipeline.data.shards import read_samples
from pipeline.recipe.features import Described
from pipeline.recipe.verdict import Subject, Verdict, draw_rows
from pipeline.report.charts import BarChart
from pipeline.report.html import Block, Table, Text

# Held-out labels must be guessed by so many standard deviations better than permuted ones: chance does so once in 30,000.
LEAST_SCORE = 4.0
# A split in which even perfect guesses would score less than this says nothing.
TELLING_SCORE = 6.0
# So many equal images are no accident.
LEAST_EQUAL = 3
SHARDS_READ, SAMPLES_OF_A_SHARD, LABELS_ASKED = 4, 1000, 256
CLASSES_SHOWN = 30

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Control:
    """How well quick features guess the labels of held-out images, beside the same guesses for permuted labels."""

    part: str
    num_images: int
    accuracy: float
    permuted: float
    score: float  # standard deviations between the two
    best: float  # the score of perfect guesses

    @property
    def says_something(self) -> bool:
        """Whether there are images enough for a verdict."""
        return self.best >= TELLING_SCORE


def check_labels(subject: Subject) -> Verdict:
    """Look for absent classes, classes of one repeated image, labels unlike those in the shards, and labels that mean nothing.

    For the last a linear classifier on quick features guesses the labels of held-out images: of each half of the training
    sample from the other, of the other splits from all of it. The same guesses are scored against permuted labels, whose mean
    and deviation are known exactly (`permutation_score`); what is no better by LEAST_SCORE deviations is red. Labels of which
    only a part is wrong pass; a task of which colour, place and edges say nothing at all is refused, and needs --skip.
    """
    expected = (
        "every class present, none of one repeated image, labels as in the shards, "
        f"guesses of held-out labels {LEAST_SCORE:g} deviations better than of permuted ones"
    )
    if subject.is_streamed:
        return Verdict(
            "labels", "skipped", None, expected, "the training shards are streamed: without an index no label can be looked up"
        )
    controls = _control(subject)
    telling = [control for control in controls if control.says_something]
    faults = [
        *_absent(subject),
        *_constant(subject.described("train"), subject.manifest.class_names),
        *_unlike_shards(subject),
        *(
            f"labels of {control.part} are guessed no better ({control.accuracy:.3f}) than permuted ({control.permuted:.3f})"
            for control in telling
            if not control.score >= LEAST_SCORE
        ),
    ]
    value = min((control.score for control in telling), default=None)
    blocks = tuple(_blocks(subject, controls))
    if faults:
        return Verdict("labels", "red", value, expected, "; ".join(faults), blocks)
    why = (
        "; ".join(f"{c.part} {c.accuracy:.3f} (permuted {c.permuted:.3f})" for c in telling) or "too few images to guess labels"
    )
    return Verdict("labels", "green", value, expected, f"quick features guess the labels: {why}", blocks)


# ---- counts ----


def _absent(subject: Subject) -> Iterator[str]:
    counts = subject.manifest.split("train").class_counts
    absent = [name for name, count in zip(subject.manifest.class_names, counts, strict=True) if not count]
    if absent:
        yield f"no image to train on of {_listed(absent)}"


def _constant(described: Described, class_names: list[str]) -> Iterator[str]:
    labels, digests = described.labels, np.array([digest[:8] for digest in described.digests]).view(np.uint64)
    constant = []
    for number, name in enumerate(class_names):
        of_class = digests[labels[:, number] > 0 if labels.ndim > 1 else labels == number]
        if len(of_class) >= LEAST_EQUAL and len(np.unique(of_class)) == 1:
            constant.append(name)
    if constant:
        yield f"all images are the same one of {_listed(constant)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- the member beside the image ----


def _unlike_shards(subject: Subject) -> Iterator[str]:
    """Splits of which a sample, delivered as in training, has another label than the one stored beside its image."""
    if subject.manifest.preparation.get("source") == "merge":
        return  # the labels of a merged set are translated by class name
    for split in subject.manifest.splits:
        wrong, asked = _compare_with_shards(subject, split)
        if wrong:
            yield f"{wrong} of {asked} labels of {split} are not those stored beside the images"


def _compare_with_shards(subject: Subject, split: str) -> tuple[int, int]:
    dataset = subject.dataset(split)
    rule = SampleRule.of(subject.manifest)
    shards = dict.fromkeys(dataset.rows["shard"][draw_rows(dataset, LABELS_ASKED, subject.config.seed)].tolist())
    stored: dict[tuple[int, int], set[int]] = {}
    for shard in islice(shards, SHARDS_READ):
        path = subject.manifest.folder / dataset.shards[shard].name if dataset.fetcher is None else dataset.fetcher(shard)
        for sample in islice(read_samples(path, rule), SAMPLES_OF_A_SHARD):
            stored[shard, sample.offset] = {rule.class_number(label) for label in sample.labels}
    rows = [
        number for number, row in enumerate(zip(dataset.rows["shard"], dataset.rows["offset"], strict=True)) if row in stored
    ]
    rows = rows[:: -(-len(rows) // LABELS_ASKED)] if rows else []
    labels = dataset.__getitems__([SampleRef(row, 0, 1.0) for row in rows])["label"]
    wrong = 0
    for row, label in zip(rows, labels, strict=True):
        expected = stored[int(dataset.rows["shard"][row]), int(dataset.rows["offset"][row])]
        found = set(label.nonzero().flatten().tolist()) if label.ndim else {int(label)}
        wrong += found != expected
    return wrong, len(rows)


# ---- the control ----


def _control(subject: Subject) -> list[Control]:
    train = subject.described("train")
    target = _chosen_label(train.labels)
    labels = _targets(train.labels, target)
    order = np.random.default_rng(subject.config.seed).permutation(len(train))
    one, other = order[::2], order[1::2]
    guessed = np.zeros(len(train), np.int64)
    guessed[other] = _guess(train.features[one], labels[one], train.features[other])
    guessed[one] = _guess(train.features[other], labels[other], train.features[one])
    controls = [_scored("train", guessed, labels)]
    for split in subject.manifest.splits:
        if split != "train" and len(subject.described(split)):
            held_out = subject.described(split)
            guessed = _guess(train.features, labels, held_out.features)
            controls.append(_scored(split, guessed, _targets(held_out.labels, target)))
    return controls


def _chosen_label(labels: Numbers) -> int | None:
    """With several labels an image, (n, K), the one that nearest to half of the images have: guessing it says most."""
    return int(np.abs(labels.mean(axis=0) - 0.5).argmin()) if labels.ndim > 1 else None


def _targets(labels: Numbers, chosen: int | None) -> Numbers:
    return labels if chosen is None else labels[:, chosen]


def _guess(features: npt.NDArray[np.float32], labels: Numbers, held_out: npt.NDArray[np.float32]) -> Numbers:
    """Labels of `held_out` features (m, D), from features (n, D) and their labels."""
    if len(np.unique(labels)) < 2:
        return np.full(len(held_out), labels[0] if len(labels) else 0)
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # One solve for all classes; the penalty is that of about as many images as there are features.
    model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=float(features.shape[1])))
    return np.asarray(model.fit(features, labels).predict(held_out), np.int64)


def _scored(part: str, guessed: Numbers, labels: Numbers) -> Control:
    permuted, score = permutation_score(guessed, labels)
    best = permutation_score(labels, labels)[1]
    return Control(part, len(labels), float((guessed == labels).mean()), permuted, score, best)


def permutation_score(guessed: Numbers, labels: Numbers) -> tuple[float, float]:
    """Expected accuracy of guesses (n,) for permuted labels (n,), and by how many deviations the true ones do better.

    Over all permutations the number of hits has mean sum(g_k l_k) / n and variance sum(d^2) / (n - 1), d being the n x n table
    of hits with its row and column means taken out (Hoeffding, "A Combinatorial Central Limit Theorem", 1951); equal rows and
    columns are counted together here.
    """
    number, size = len(labels), int(max(guessed.max(), labels.max())) + 1
    says = np.bincount(guessed, minlength=size).astype(float)  # (K,)
    has = np.bincount(labels, minlength=size).astype(float)
    mean = says @ has / number
    centred = np.eye(size) - has[:, None] / number - says[None] / number + mean / number
    variance = says @ centred**2 @ has / max(1, number - 1)
    hits = int((guessed == labels).sum())
    return float(mean / number), float((hits - mean) / np.sqrt(variance)) if variance > 1e-12 else 0.0


# ---- for the page ----


def _blocks(subject: Subject, controls: list[Control]) -> Iterator[Block]:
    rows = [[c.part, c.num_images, c.accuracy, c.permuted, c.score if c.says_something else "too few images"] for c in controls]
    yield Table(
        ["labels of", "images", "guessed right", "if permuted", "deviations"], rows, "Quick features, linear classifier"
    )
    splits = subject.manifest.splits
    counts = list(zip(subject.manifest.class_names, *(splits[name].class_counts for name in splits), strict=True))
    if len(counts) > CLASSES_SHOWN:
        yield Text([f"The first {CLASSES_SHOWN} of {len(counts)} classes; `shardline inspect` shows them all."], faint=True)
    shown = counts[:CLASSES_SHOWN]
    yield BarChart([name for name, *_ in shown], list(splits), [numbers for _, *numbers in shown])
