"""Everything that differs between a GPU and the CPU is asked here: device, collectives, pinned memory, what is possible.

The rest of the code takes the answers and goes through torch's and Lightning's public interface. Other accelerators than CUDA
would be added here.
"""

import os
from typing import TYPE_CHECKING, Literal

import torch

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import TrainerConfig

Kind = Literal["cuda", "cpu"]
# Instructions that multiply bfloat16. Without them autocast is 10 to 14 times slower than float32 (AVX2, small and large CNN).
BFLOAT16 = ("avx512_bf16", "amx_bf16", "avx10_2")


def num_gpus() -> int:
    """GPUs that this process may use (CUDA_VISIBLE_DEVICES)."""
    return torch.cuda.device_count()


def names() -> list[str]:
    """The GPUs of this machine in words: `8 x NVIDIA H100`."""
    found = [torch.cuda.get_device_name(number) for number in range(num_gpus())]
    return [f"{found.count(name)} x {name}" for name in dict.fromkeys(found)]


def kind() -> Kind:
    """What the networks run on."""
    return "cuda" if num_gpus() else "cpu"


def device() -> torch.device:
    """The device of this rank: the GPU of its number on this machine, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if num_gpus() else torch.device("cpu")


def backend() -> str:
    """The collectives: NCCL for tensors on GPUs, and gloo for those on the CPU (flags, names), which then need no GPU sync."""
    return "cpu:gloo,cuda:nccl" if num_gpus() else "gloo"


def pins_memory(wanted: bool | None) -> bool:
    """Whether batches are page-locked: wherever a GPU takes them, unless the configuration says no."""
    return bool(num_gpus()) and wanted is not False


def emulates_bfloat16() -> bool:
    """Whether the CPU is an x86 without instructions for bfloat16. Others are not judged."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not any(has.get(name) for name in BFLOAT16)


def require_possible(config: "TrainerConfig") -> None:
    """Refuse what this machine's accelerator cannot do. Raises ConfigError."""
    if num_gpus():
        if config.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError("`trainer.precision` bf16-mixed needs a GPU of compute capability 8.0. Use 16-mixed.")
        return
    if config.precision == "16-mixed":
        raise ConfigError("`trainer.precision` 16-mixed needs a GPU. Use 32-true.")
    if config.precision == "bf16-mixed" and emulates_bfloat16():
        raise ConfigError(
            "`trainer.precision` bf16-mixed is only emulated by this CPU, which has neither avx512_bf16 nor amx_bf16: a step "
            "would take 10 times as long. Use 32-true."
        )
    if config.sync_batchnorm:
        raise ConfigError("`trainer.sync_batchnorm` needs GPUs. On a CPU use `model.norm: group`.")
