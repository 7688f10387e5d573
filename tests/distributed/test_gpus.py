"""The same promises on GPUs, with NCCL: run by themselves where there are one or two, skipped elsewhere."""

import json
from pathlib import Path

import pytest
import torch

from tests.end_to_end.test_kill_and_resume import weights_of
from tests.processes import kill, processes_of, shardline, started, wait_until

SETTINGS = [
    "--dataset.path=data/digits",
    "--trainer.max_epochs=3",
    "--trainer.checkpoint_every_steps=5",
    "--data.num_workers=1",
]
VARIANTS = {
    "float32": [],
    "half precision": ["--trainer.precision=16-mixed"],
    "bfloat16": ["--trainer.precision=bf16-mixed"],
    "synchronised BatchNorm": ["--trainer.sync_batchnorm=true"],
}
pytestmark = pytest.mark.gpu


def need(gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA GPU{'s' * (gpus > 1)}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_killed_training_on_gpus_goes_on_to_the_same_weights(workspace: Path, gpus: int, variant: str) -> None:
    need(gpus)
    settings, label = [*SETTINGS, *VARIANTS[variant]], f"gpu-{gpus}-{variant.replace(' ', '-')}"
    calm = shardline("train", *settings, f"--name={label}-calm", cwd=workspace, PROCS=str(gpus))
    assert calm.returncode == 0, calm.stderr
    assert (f"{gpus} DDP processes" if gpus > 1 else "1 process (cuda)") in calm.stdout
    assert gpus == 1 or "(nccl, cuda)" in calm.stdout

    run_dir = workspace / f"runs/{label}"
    with started("train", *settings, f"--name={label}", cwd=workspace, log=workspace / f"{label}.log", PROCS=str(gpus)) as door:
        wait_until((run_dir / "checkpoints/last.ckpt").exists, "the first checkpoint")
        kill(door.pid, *processes_of(run_dir))
    wait_until(lambda: not processes_of(run_dir), "the last process to end", seconds=20)
    again = shardline("train", *settings, f"--name={label}", cwd=workspace, PROCS=str(gpus))
    assert again.returncode == 0, again.stderr
    last = "checkpoints/last.ckpt"
    assert weights_of(run_dir / last) == weights_of(workspace / f"runs/{label}-calm" / last)


@pytest.mark.parametrize("gpus", [1, 2])
def test_doctor_looks_at_the_gpus(workspace: Path, gpus: int) -> None:
    need(gpus)
    done = shardline("doctor", "--dataset.path=data/digits", cwd=workspace, PROCS=str(gpus))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {f["check"]: f["found"] for f in json.loads((workspace / "runs/doctor.json").read_text())}
    assert found["gpus"].startswith(f"{torch.cuda.device_count()} x ")
    assert "NCCL" in found["torch"]
