from pathlib import Path

import pytest
import torch

from pipeline import accelerator
from pipeline.config import TrainerConfig
from pipeline.errors import ConfigError


def test_without_a_gpu_everything_is_the_cpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (accelerator.kind(), accelerator.backend(), str(accelerator.device())) == ("cpu", "gloo", "cpu")
    assert [accelerator.pins_memory(wanted) for wanted in (None, True, False)] == [False, False, False]


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


X86: dict[str, bool | str] = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False, "avx2": True}


def test_a_cpu_that_emulates_bfloat16_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: X86)
    with pytest.raises(ConfigError, match=r"bf16-mixed is only emulated by this CPU.*10 times as long\. Use 32-true") as caught:
        accelerator.require_possible(TrainerConfig(precision="bf16-mixed"))
    assert caught.value.exit_code == 2
    accelerator.require_possible(TrainerConfig(precision="32-true"))


@pytest.mark.parametrize("has", [{**X86, "avx512_bf16": True}, {**X86, "amx_bf16": True}, {"architecture": "aarch64"}])
def test_a_cpu_that_computes_bfloat16_or_is_no_x86_may(monkeypatch: pytest.MonkeyPatch, has: dict[str, bool | str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    accelerator.require_possible(TrainerConfig(precision="bf16-mixed"))


def test_torch_says_of_this_cpu_what_the_kernel_says() -> None:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].splitlines()[0].split()
    has = torch.cpu.get_capabilities()
    if has["architecture"] == "x86_64":
        assert [bool(has[name]) for name in ("avx2", "avx512_bf16")] == [name in flags for name in ("avx2", "avx512_bf16")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_that_is_there_can_do_what_is_allowed_on_it() -> None:
    accelerator.require_possible(TrainerConfig(precision="16-mixed", sync_batchnorm=True))
    assert torch.ones(2, device=accelerator.device()).sum().item() == 2.0
