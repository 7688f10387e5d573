"""One rank of a real training, which also writes down what it saw: RECORD_DIR/rank-N.json.

Run under torchrun: `record_rank.py train --name ...` is `shardline train --name ...`.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import ClassVar

import torch

from pipeline.cli import main
from pipeline.data.dataset import Batch
from pipeline.training.classifier import Classifier


class Recorder(Classifier):
    """The classifier of the product, with an eye on its batches."""

    steps: ClassVar[dict[int, list[tuple[int, str]]]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Note the samples of the step, and their pixels after augmentation."""
        images = batch["image"] if self.changes is None else self.changes(batch["image"], batch["seed"])
        self.steps[self.global_step] = [
            (int(index), hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16])
            for index, image in zip(batch["index"], images, strict=True)
        ]
        if self.global_step + 1 == int(os.environ.get("STOP_AFTER", "0")):
            self.leave()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        """Leave the record."""
        self.leave()

    def leave(self) -> None:
        """Write down what this rank saw, and the digests of its weights."""
        weights = {name: hashlib.sha256(each.detach().numpy().tobytes()) for name, each in self.network.named_parameters()}
        record = {"steps": self.steps, "weights": {name: digest.hexdigest() for name, digest in weights.items()}}
        path = Path(os.environ["RECORD_DIR"]) / f"rank-{self.global_rank}.json"
        path.write_text(json.dumps(record))


if __name__ == "__main__":
    import pipeline.training.fit

    vars(pipeline.training.fit)["Classifier"] = Recorder
    raise SystemExit(main(sys.argv[1:]))
