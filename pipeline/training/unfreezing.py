"""Which parts of the network train is decided anew at the start of every epoch (`model.freeze`, `model.unfreeze`).

DDP reduces the gradients of those parameters that could train when it was made, and Lightning makes it once. So all that will
ever train can do so at that moment, and DDP looks which of them take part in a step (`find_unused_parameters`). A parameter
that began to train behind its back would become another one on each rank, without a word.
"""

import lightning as L

from pipeline.config import ModelConfig
from pipeline.models.freezing import freeze_parameters, frozen
from pipeline.training.classifier import Classifier


class Unfreezing(L.Callback):
    """Freezes what an epoch does not train. The optimizer holds what ever trains, and skips what has no gradient."""

    def __init__(self, config: ModelConfig, max_epochs: int) -> None:
        self.config, self.max_epochs = config, max_epochs

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Before DDP and the optimizer are made: whatever trains in the last epoch is theirs."""
        self._freeze(module, self.max_epochs - 1)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """An epoch that is resumed in its middle has no start."""
        self._freeze(module, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Let begin what is due."""
        self._freeze(module, trainer.current_epoch)

    def _freeze(self, module: L.LightningModule, epoch: int) -> None:
        assert isinstance(module, Classifier)
        freeze_parameters(module.network, frozen(self.config, epoch))
