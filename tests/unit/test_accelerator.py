import pytest
import torch

from pipeline import accelerator
from pipeline.config import TrainerConfig
from pipeline.errors import ConfigError


def test_without_a_gpu_everything_is_the_cpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (accelerator.kind(), accelerator.backend(), str(accelerator.device())) == ("cpu", "gloo", "cpu")
    assert [accelerator.pins_memory(wanted) for wanted in (None, True, False)] == [False, True, False]


def test_with_gpus_each_rank_has_the_one_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (accelerator.kind(), str(accelerator.device())) == ("cuda", "cuda:3")
    assert accelerator.backend() == "cpu:gloo,cuda:nccl"
    assert [accelerator.pins_memory(wanted) for wanted in (None, True, False)] == [True, True, False]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainerConfig(precision="16-mixed"), r"16-mixed needs a GPU\. Use 32-true"),
        (TrainerConfig(sync_batchnorm=True), r"sync_batchnorm` needs GPUs\. On a CPU use `model\.norm: group`"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(monkeypatch: pytest.MonkeyPatch, config: TrainerConfig, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        accelerator.require_possible(config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_that_is_there_can_do_what_is_allowed_on_it() -> None:
    accelerator.require_possible(TrainerConfig(precision="16-mixed", sync_batchnorm=True))
    assert torch.ones(2, device=accelerator.device()).sum().item() == 2.0
