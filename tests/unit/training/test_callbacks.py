import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional

from pipeline.config import Config
from pipeline.data.dataset import Batch
from pipeline.metrics import Metrics
from pipeline.training.bad_samples import BadSampleLedger
from pipeline.training.callbacks import ShowProgress, TrainingCurves, WarmUpBuckets
from pipeline.training.classifier import Classifier
from pipeline.training.monitors import StepMonitor
from tests.unit.training.conftest import Fit, Listener, change, weights_of

CLASS_NAMES = ["blue", "green", "red"]


class EachStep(L.Callback):
    """Computes the figures of each training batch by itself, before the step."""

    def __init__(self) -> None:
        self.figures: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        assert isinstance(module, Classifier)
        logits = module.network(batch["image"]).detach()
        accuracy = (logits.argmax(dim=1) == batch["label"]).double().mean()
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.figures.append((float(functional.cross_entropy(logits, batch["label"])), float(accuracy), rate))


def test_curves_hold_every_nth_batch_and_each_validation(tiny_config: Config, fit: Fit, tmp_path: Path) -> None:
    # Without dropout and running statistics, a second forward pass of a batch gives the first one's logits.
    config = change(change(tiny_config, "model", dropout=0.0, norm="group"), "trainer", max_epochs=2, log_every_steps=3)
    tracker, each = Listener(), EachStep()
    ledger = BadSampleLedger(tmp_path, config.data)
    ledger.total = 5
    monitor = StepMonitor(config)
    measured = (monitor, TrainingCurves(tracker, CLASS_NAMES, 3, ledger, monitor))
    module = fit(config, each, *measured)
    training = {step: metrics for step, metrics in tracker.curves if "train/loss" in metrics}
    validation = {step: metrics for step, metrics in tracker.curves if "val/loss" in metrics}
    assert (list(training), list(validation)) == ([3, 6], [4, 8])  # 4 steps an epoch
    assert len(tracker.curves) == 4
    for step, metrics in training.items():
        loss, accuracy, rate = each.figures[step - 1]
        counts = {"train/bad_samples": 5}
        curves = {"train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm"}
        assert set(metrics) == curves | (counts.keys() if step == 3 else set()), (
            "counts are said when they change, from none on"
        )
        assert counts.items() <= {**counts, **metrics}.items()
        assert metrics["train/gradient_norm"] > 0
        assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)  # float32
        assert metrics["train/accuracy"] == pytest.approx(accuracy, rel=1e-6)
        assert metrics["train/learning_rate"] == rate
    assert tracker.num_flushed == len(tracker.curves), "a validation is saved, and its points must be before"
    assert module.metrics is not None
    names = ("accuracy", "loss", "macro_f1", "auroc", "average_precision", "ece")
    assert validation[8] == {
        **{f"val/{name}": getattr(module.metrics, name) for name in names},
        **{f"val/recall/{name}": recall for name, recall in zip(CLASS_NAMES, module.metrics.recall, strict=True)},
    }


def test_a_class_without_samples_has_no_curve(
    tiny_config: Config, make_classifier: Callable[[Config], Classifier], tmp_path: Path
) -> None:
    tracker, module = Listener(), make_classifier(tiny_config)
    module.metrics = Metrics(2, 0.5, 0.25, [1.0, float("nan"), 0.0])
    ledger, monitor = BadSampleLedger(tmp_path, tiny_config.data), StepMonitor(tiny_config)
    curves = TrainingCurves(tracker, CLASS_NAMES, 1, ledger, monitor)
    curves.on_validation_end(L.Trainer(logger=False, accelerator="cpu"), module)
    ((_, metrics),) = tracker.curves
    assert metrics == {"val/loss": 0.25, "val/accuracy": 0.5, "val/recall/blue": 1.0, "val/recall/red": 0.0}


class Compare(L.Callback):
    """Keeps what `WarmUpBuckets` might have touched, at the moment at which the first step begins."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            assert isinstance(module, Classifier)
            self.weights = weights_of(module)
            self.gradients = [each.grad for each in module.parameters() if each.grad is not None and bool(each.grad.any())]
            self.training = all(each.training for each in module.network.modules())


def test_warming_up_leaves_no_trace(tiny_config: Config, make_classifier: Callable[[Config], Classifier], fit: Fit) -> None:
    config = change(change(tiny_config, "model", dropout=0.5, norm="batch"), "trainer", max_epochs=1)
    fresh = weights_of(make_classifier(config))
    compare, gradients = Compare(), list[torch.Tensor]()

    class Watch(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            next(module.parameters()).register_hook(gradients.append)  # type: ignore[no-untyped-call]

    warmed = weights_of(fit(config, Watch(), WarmUpBuckets((16, 16)), compare))
    assert torch.equal(compare.weights, fresh)
    assert compare.gradients == []
    assert compare.training
    assert torch.equal(warmed, weights_of(fit(config)))
    assert [bool(gradient.any()) for gradient in gradients] == [False, True, True, True, True], "a pass of zeros, then 4 steps"


def test_each_epoch_is_one_line_with_its_figures(tiny_config: Config, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    module = fit(change(tiny_config, "trainer", max_epochs=2), ShowProgress())
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert module.metrics is not None
    figures = f"val/accuracy {module.metrics.accuracy:.4f}  val/loss {module.metrics.loss:.4f}"
    assert re.fullmatch(rf"epoch 2/2  step 8  {figures}  [\d,]+ images/s", second)
    assert first.startswith("epoch 1/2  step 4  val/accuracy ")
