"""Karpathy's advice for during the training: watch what the network says of a fixed batch, and how its layers live.

At each validation (and once before the first step) rank 0 looks at the same validation images: RUN/dynamics.png shows how the
probability of the right answer moves, RUN/dynamics.json holds it with a table of the layers, and a few figures of all layers
become curves. Nothing is computed at other steps. What was seen so far travels in the checkpoint and both files are written
from it, so that a run which goes on leaves the files of an undisturbed one.
"""

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from pipeline.config import Config, DataConfig
from pipeline.console import say
from pipeline.data.dataset import Batch, ShardDataset, decodable
from pipeline.data.order import SampleRef
from pipeline.files import write_bytes, write_json
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.recipe.gap import RULE, Gap, judge_gap
from pipeline.recipe.layers import copy_weights, measure_gradients, measure_updates, observe, summarise
from pipeline.report.heatmap import draw_heatmap
from pipeline.tracking.run import RunTracker

PICTURE, FIGURES = Path("dynamics.png"), Path("dynamics.json")
COLOURS = "right answer's probability: blue 1, orange 0;\nnumber: class given instead"
NUM_WATCHED = 24
NUM_JUDGED = 512  # of each split, for the gap at the end
JUDGED_AT_ONCE = 64


class Answers(Protocol):
    """What a task makes of logits (n, outputs)."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, K)."""


class Dynamics(L.Callback):
    """Looks at a fixed batch and at the layers at every validation; says at the end whether the network overfits."""

    def __init__(
        self, config: Config, manifest: DatasetManifest, spec: PreprocessSpec, answers: Answers, tracker: RunTracker | None
    ) -> None:
        self.config, self.manifest, self.spec, self.answers, self.tracker = config, manifest, spec, answers, tracker
        self.points: list[dict[str, Any]] = []  # of each look: step, epoch, probability and answer of each image, figures
        self.layers: list[dict[str, Any]] = []  # of the last look
        self.logits = torch.zeros(0)  # (n, outputs) of the watched images at the last look
        self.gradients: dict[str, float] = {}
        self.updates: dict[str, float] = {}
        self.before: dict[str, list[torch.Tensor]] = {}

    # ---- the step before a validation ----

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradients of a step that a validation follows, and keep the weights that it is about to move."""
        if trainer.is_global_zero and self._validates_after(trainer):
            self.gradients, self.before = measure_gradients(_network(module)), copy_weights(_network(module))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure how far that step moved them."""
        if self.before:
            self.updates, self.before = measure_updates(_network(module), self.before), {}

    def _validates_after(self, trainer: L.Trainer) -> bool:
        every = self.config.trainer.validate_every_steps
        return (trainer.global_step + 1) % every == 0 if every else trainer.is_last_batch

    # ---- the looks ----

    @functools.cached_property
    def watched(self) -> Batch:
        """The validation samples that are looked at, always the same."""
        return read_samples(self.manifest, "val", self.spec, self.config.data, NUM_WATCHED)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Look before the first step."""
        if trainer.global_step == 0:
            self._look(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Look again."""
        self._look(trainer, module)

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        logits, layers = observe(_network(module), self.watched["image"].to(module.device))
        for layer in layers:
            layer.gradient, layer.update = self.gradients.get(layer.layer), self.updates.get(layer.layer)
        self.logits = logits.float().cpu()
        answers, labels = self.answers.probabilities(self.logits), self.watched["label"]
        right = right_probability(answers, labels)
        figures = {**summarise(layers), "right_probability": float(right.mean())}
        point = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch + 1 if trainer.global_step else 0,
            "right_probability": [round(value, 6) for value in right.tolist()],
            "answer": answers.argmax(dim=1).tolist(),
            "figures": figures,
        }
        self.points = [*(earlier for earlier in self.points if earlier["step"] != point["step"]), point]
        self.layers = [asdict(layer) for layer in layers]
        picture = self._write(gap=None)
        if self.tracker is not None:
            self.tracker.log_image("val/dynamics", picture, trainer.global_step)
            finite = {f"watch/{name}": value for name, value in figures.items() if np.isfinite(value)}
            self.tracker.log(finite, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Compare training and validation images, say the verdict, and keep the picture with the run."""
        if not trainer.is_global_zero or not self.points:
            return
        gap = self._judge(module)
        self._write(gap)
        if gap is not None:
            say(str(gap))
        if self.tracker is not None:
            if gap is not None:
                self.tracker.log_final({"watch/gap": gap.gap})
            for path in (PICTURE, FIGURES):
                self.tracker.log_file(self.config.run_dir / path)

    def _judge(self, module: L.LightningModule) -> Gap | None:
        if "train" in self.manifest.streams:
            return None  # a stream cannot be asked for the same samples again
        samples = {
            split: read_samples(self.manifest, split, self.spec, self.config.data, NUM_JUDGED) for split in ("train", "val")
        }
        train, val = (float(self._correct(module, batch).mean()) for batch in samples.values())
        sizes = (len(samples["train"]["label"]), len(samples["val"]["label"]))
        return judge_gap(train, val, commonest_share(samples["train"]["label"]), sizes)

    @torch.no_grad()
    def _correct(self, module: L.LightningModule, batch: Batch) -> torch.Tensor:
        """1.0 where an answer is right: (n,), or (n, K) of several labels."""
        network = _network(module)
        modes = {each: each.training for each in network.modules()}
        network.eval()
        logits = [network(images.to(module.device)).float().cpu() for images in torch.split(batch["image"], JUDGED_AT_ONCE)]
        for each, is_training in modes.items():
            each.training = is_training
        answers = self.answers.probabilities(torch.cat(logits))
        if batch["label"].ndim == 1:
            return (answers.argmax(dim=1) == batch["label"]).float()
        return ((answers >= 0.5) == (batch["label"] > 0)).float()

    # ---- what is left ----

    def _write(self, gap: Gap | None) -> bytes:
        labels = self.watched["label"]
        values = {
            "format_version": 1,
            "class_names": self.manifest.class_names,
            "watched": {"index": self.watched["index"].tolist(), "label": labels.tolist()},
            "points": self.points,
            "layers": self.layers,
            "gap": None if gap is None else {**asdict(gap), "rule": RULE, "summary": str(gap)},
        }
        write_json(self.config.run_dir / FIGURES, values)
        picture = draw_heatmap(
            self.watched["image"].permute(0, 2, 3, 1).numpy(),
            [self._title(row) for row in range(len(labels))],
            [point["right_probability"] for point in self.points],
            [[_mark(point, row, labels) for row in range(len(labels))] for point in self.points],
            [str(point["epoch"]) for point in self.points],
            f"The same {len(labels)} validation images by epoch\n{COLOURS}",
        )
        write_bytes(self.config.run_dir / PICTURE, picture)
        return picture

    def _title(self, row: int) -> str:
        label = self.watched["label"][row]
        return self.manifest.class_names[int(label)] if label.ndim == 0 else f"sample {int(self.watched['index'][row])}"

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"points": self.points, "layers": self.layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.points, self.layers = state_dict["points"], state_dict["layers"]


def _network(module: L.LightningModule) -> nn.Module:
    network = module.network
    assert isinstance(network, nn.Module)
    return network


def _mark(point: dict[str, Any], row: int, labels: torch.Tensor) -> str:
    """The number of the class that was named instead of the right one."""
    if labels.ndim > 1 or point["answer"][row] == int(labels[row]):
        return ""
    return str(point["answer"][row])


def right_probability(answers: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Probability of the right class, (n,); of several labels the mean of their right answers'. Answers (n, K)."""
    if labels.ndim == 1:
        return answers.gather(1, labels[:, None])[:, 0]
    return torch.where(labels > 0, answers, 1 - answers).mean(dim=1)


def commonest_share(labels: torch.Tensor) -> float:
    """Accuracy of always giving the commonest answer to labels (n,) or (n, K)."""
    if labels.ndim == 1:
        return float(labels.bincount().max()) / len(labels)
    shares = (labels > 0).float().mean(dim=0)
    return float(torch.maximum(shares, 1 - shares).mean())


def read_samples(manifest: DatasetManifest, split: str, spec: PreprocessSpec, config: DataConfig, number: int) -> Batch:
    """Up to `number` samples as evaluation sees them: spread over the split, or its first where shards must be fetched."""
    dataset = ShardDataset(manifest, split, spec, config=config)
    number = min(number, len(dataset))
    spread = dataset.fetcher is None
    indices = np.linspace(0, len(dataset) - 1, number).round().astype(int) if spread else np.arange(number)
    return decodable(dataset.__getitems__([SampleRef(int(index), 0, 1.0) for index in indices]))
