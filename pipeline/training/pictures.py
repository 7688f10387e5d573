"""Pictures of what a network answers: of the watched validation images, its mistakes, and what it takes for what.

They are drawn by rank 0 at each validation from the answers that the evaluation counted, and once before the first step, when
there are only those to the watched images. Nothing here draws random numbers, runs the network or changes its mode.
"""

import functools

import lightning as L
import numpy as np
import torch

from pipeline.answers import Answers, confusion_of
from pipeline.data.dataset import ShardDataset
from pipeline.metrics import EvaluationSums
from pipeline.recipe.dynamics import Dynamics
from pipeline.report.answers import AnsweredImage, draw_answers
from pipeline.report.confusion import LabelCounts, draw_confusion, draw_label_counts
from pipeline.task import label_text
from pipeline.tracking.run import RunTracker
from pipeline.training.classifier import Classifier

NUM_MISTAKES = 24
MOST_LABELS = 30  # in a picture of the counts of each


class Pictures(L.Callback):
    """Sends `val/samples`, `val/misclassified` and `val/confusion_matrix` to MLflow, one picture each by step; rank 0 only."""

    def __init__(self, dynamics: Dynamics, tracker: RunTracker) -> None:
        self.dynamics, self.tracker = dynamics, tracker

    @functools.cached_property
    def dataset(self) -> ShardDataset:
        """The validation split as evaluation reads it."""
        return ShardDataset(self.dynamics.manifest, "val", self.dynamics.spec, config=self.dynamics.config.data)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Draw what the watched images are taken for before the first step."""
        assert isinstance(module, Classifier)
        if trainer.global_step == 0:
            watched = self.dynamics.watched
            sums = EvaluationSums(module.task, len(self.dataset), torch.device("cpu"))
            sums.add(self.dynamics.logits, watched["label"], watched["weight"], watched["index"])
            self._send(sums.answers(), 0, "watched validation images before the first step")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Draw what the evaluation counted."""
        assert isinstance(module, Classifier)
        step = trainer.global_step
        self._send(module.sums.answers(), step, f"validation images after step {step:,}")

    def _send(self, answers: Answers, step: int, of_what: str) -> None:
        watched = answers.at(self.dynamics.watched["index"])
        title = f"{len(watched):,} watched images: {int((watched.num_wrong == 0).sum())} right after step {step:,}"
        self.tracker.log_image("val/samples", draw_answers(show_answers(self.dataset, watched), title), step)
        self.tracker.log_image("val/misclassified", self._draw_mistakes(answers, of_what), step)
        self.tracker.log_image("val/confusion_matrix", draw_mistakes_by_class(self.dataset, answers, of_what), step)

    def _draw_mistakes(self, answers: Answers, of_what: str) -> bytes:
        scope = f"{len(answers):,} {of_what}"
        if self.dataset.fetcher is not None:  # one shard is at hand; others would be fetched for a picture
            answers = answers[answers.index < self.dataset.shards[0].num_samples]
            scope = f"the first {len(answers):,} of {scope}"
        num_wrong = int((answers.num_wrong > 0).sum())
        worst = answers.most_wrong(NUM_MISTAKES)
        title = f"{num_wrong:,} wrong of {scope}"
        if num_wrong > len(worst):
            title += f": the {len(worst)} " + ("surest" if answers.label.ndim == 1 else "with most wrong labels")
        return draw_answers(show_answers(self.dataset, worst), title)


def show_answers(dataset: ShardDataset, answers: Answers) -> list[AnsweredImage]:
    """The images of some answers, as the network sees them, with label and answer in words."""
    shown = []
    for index, label, predicted, confidence in zip(*_columns(dataset, answers), strict=True):
        pixels = dataset.image(index).permute(1, 2, 0).numpy()  # (H, W, 3)
        is_right = label == predicted
        # Of several labels the confidence is that of the wrong ones.
        sure = None if is_right and answers.label.ndim == 2 else confidence
        shown.append(AnsweredImage(pixels, label, "" if is_right else predicted, sure))
    return shown


def _columns(dataset: ShardDataset, answers: Answers) -> tuple[list[int], list[str], list[str], list[float]]:
    labels, predicted = (answer_texts(each, dataset.manifest.class_names) for each in (answers.label, answers.predicted))
    return answers.index.tolist(), labels, predicted, answers.confidence.tolist()


def answer_texts(answers: torch.Tensor, class_names: list[str]) -> list[str]:
    """Labels or answers, (n,) or (n, K), in words."""
    return [label_text(answer, class_names) or "(none)" for answer in answers]


def draw_mistakes_by_class(dataset: ShardDataset, answers: Answers, of_what: str) -> bytes:
    """The confusion matrix of one label an image, or of several how often each was found, missed and invented."""
    names = dataset.manifest.class_names
    title = f"{len(answers):,} {of_what}: {answers.accuracy:.4f} "
    if answers.label.ndim == 2:
        rows, note = count_labels(answers, names), ""
        if len(rows) > MOST_LABELS:
            rows = sorted(rows, key=lambda row: -(row.missed + row.invented))[:MOST_LABELS]
            note = f"the {MOST_LABELS} of {len(names):,} labels with the most mistakes"
        return draw_label_counts(rows, f"{title}with every label right", note)
    confusion = confusion_of(answers, len(names))
    note = ""
    if len(confusion.classes) < len(names):
        note = f"the {len(confusion.classes)} of {len(names):,} classes that are most confused with one another"
    return draw_confusion([names[number] for number in confusion.classes], confusion.counts.numpy(), f"{title}right", note)


def count_labels(answers: Answers, class_names: list[str]) -> list[LabelCounts]:
    """Count each label's right and wrong answers."""
    label, predicted = answers.label.numpy() > 0, answers.predicted.numpy() > 0  # (n, K)
    counts = np.stack([(label & predicted).sum(axis=0), (label & ~predicted).sum(axis=0), (~label & predicted).sum(axis=0)])
    return [LabelCounts(name, *row) for name, row in zip(class_names, counts.T.tolist(), strict=True)]
