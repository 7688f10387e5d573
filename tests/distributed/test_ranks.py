"""The same training on one, two and three ranks: the same samples at every step, equal weights, equal figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.processes import shardline

GLOBAL_BATCH_SIZE = 48  # one, two and three ranks share it
NUM_EPOCHS = 2
STEPS_PER_EPOCH = 22  # 1,069 training samples
# Group norm and no dropout: nothing in the network depends on how the batch is shared. One convolution a stage and a low
# learning rate: else the rounding of sums is multiplied a hundredfold within a few steps, on any number of ranks.
SETTINGS = [
    f"--data.global_batch_size={GLOBAL_BATCH_SIZE}",
    f"--trainer.max_epochs={NUM_EPOCHS}",
    "--trainer.log_every_steps=1",
    "--model.norm=group",
    "--model.dropout=0",
    "--model.convs_per_stage=1",
    "--data.augment.rotate_degrees=10",
    "--scheduler.args.max_lr=0.005",
    "--dataset.path=data/digits",
]
WORLD_SIZES = (1, 2, 3)
Step = list[tuple[int, str]]


def run_ranks(
    workspace: Path, name: str, world_size: int, stop_after: int = 0, settings: list[str] = SETTINGS
) -> list[dict[str, Any]]:
    """Train under plain torchrun, to the end or to a stop by SIGTERM after a step; returns what each rank wrote down."""
    folder = workspace / f"records-{name}-{world_size}-{stop_after}"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command += [str(Path(__file__).with_name("record_rank.py")), "train", f"--name={name}", *settings]
    environment = {**os.environ, "RECORD_DIR": str(folder), "STOP_AFTER": str(stop_after), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=150, check=False)
    if stop_after:
        assert f"stopped by SIGTERM after step {stop_after}, saved" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def records(workspace: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank wrote down, by world size."""
    found = {}
    for world_size in WORLD_SIZES:
        found[world_size] = run_ranks(workspace, f"ranks-{world_size}", world_size)
    return found


def samples_by_step(ranks: list[dict[str, Any]]) -> dict[int, Step]:
    """The global batch of every step, put together from the ranks in their order."""
    return {
        int(step): [(index, pixels) for rank in ranks for index, pixels in rank["steps"][step]] for step in ranks[0]["steps"]
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_sees_the_same_augmented_samples_at_every_step(
    records: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    alone, together = samples_by_step(records[1]), samples_by_step(records[world_size])
    assert len(alone) == NUM_EPOCHS * STEPS_PER_EPOCH
    assert together == alone


def test_an_epoch_sees_each_sample_at_most_once_and_each_epoch_another_order(
    records: dict[int, list[dict[str, Any]]],
) -> None:
    steps = samples_by_step(records[2])
    first, second = (
        [index for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH) for index, _ in steps[step]]
        for epoch in range(NUM_EPOCHS)
    )
    assert len(set(first)) == len(first) == STEPS_PER_EPOCH * GLOBAL_BATCH_SIZE
    assert len(set(second)) == len(second)
    assert first != second
    assert set(first) != set(second), "the tail that is dropped must differ between epochs"


def losses_of(workspace: Path, name: str) -> dict[int, float]:
    """The training loss of every step, as MLflow has it once all is delivered: ranks do not wait for that."""
    assert shardline("sync", f"runs/{name}", cwd=workspace).returncode == 0
    run_id = json.loads((workspace / f"runs/{name}/run.json").read_text())["mlflow"]["run_id"]
    history = mlflow.MlflowClient(f"sqlite:///{workspace}/runs/mlflow.db").get_metric_history(run_id, "train/loss")
    assert len({point.step for point in history}) == len(history)
    return {point.step: point.value for point in history}


def test_a_run_may_go_on_with_other_numbers_of_ranks(workspace: Path, records: dict[int, list[dict[str, Any]]]) -> None:
    undisturbed = samples_by_step(records[2])
    seen: dict[int, Step] = {}
    for world_size, stop_after in ((2, 10), (1, 25), (3, 35), (2, 0)):
        seen |= samples_by_step(run_ranks(workspace, "elastic", world_size, stop_after))
    assert seen == undisturbed
    losses, expected = losses_of(workspace, "elastic"), losses_of(workspace, "ranks-2")
    assert list(losses) == list(expected) == list(range(1, NUM_EPOCHS * STEPS_PER_EPOCH + 1))
    # Sums in another order: a rounding of 2**-24 a step in float32, over 44 steps.
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_end_with_the_same_weights_after_as_many_steps(
    records: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    ranks = records[world_size]
    assert all(rank["weights"] == ranks[0]["weights"] for rank in ranks)
    assert len({len(rank["steps"]) for rank in ranks}) == 1


def test_the_evaluation_is_the_same_on_any_number_of_ranks(workspace: Path, records: dict[int, list[dict[str, Any]]]) -> None:
    results, predictions = [], []
    folder = workspace / "runs/ranks-3/evaluation"
    for world_size in (1, 3):
        (folder / "test.json").unlink(missing_ok=True)
        done = shardline("evaluate", "--name=ranks-3", *SETTINGS, cwd=workspace, PROCS=str(world_size))
        assert done.returncode == 0, done.stderr
        results.append(json.loads((folder / "test.json").read_text()))
        predictions.append([row.split(",")[:4] for row in (folder / "predictions.csv").read_text().splitlines()])
    assert predictions[0] == predictions[1]
    assert len(predictions[0]) == 1 + results[0]["num_samples"] == 365
    alone, together = results
    # float32 logits are rounded by batch shape; 364 losses of up to a few nats, summed in float64.
    assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=0, abs=1e-6)
    assert together == alone
