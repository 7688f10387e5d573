"""A covering choice of tests/unit/data/test_id_matrix.py with real gloo ranks and real loader processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.datamodule import ResumableLoader
from pipeline.manifest import load_dataset
from tests.distributed.id_data import LAYOUTS, config_of, ids_of, make_dataset, open_module

CASES = {
    1: ["uneven:3:forkserver", "1:0:fork"],
    2: ["7:1:spawn", "uneven:0:fork", "1:3:fork"],
    3: ["5:1:forkserver", "uneven:3:fork"],
    4: ["uneven:1:spawn", "7:3:fork", "5:0:fork", "1:1:fork"],
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set of each layout of shards."""
    folder = tmp_path_factory.mktemp("ids")
    for name, sizes in LAYOUTS.items():
        make_dataset(folder / name, sizes)
    return folder


@pytest.mark.parametrize("world_size", [2, 4, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 3))])
def test_real_ranks_and_loader_processes_see_what_one_process_sees(world_size: int, datasets: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command += [str(Path(__file__).with_name("record_ids.py")), str(datasets), str(tmp_path), *CASES[world_size]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    for case in CASES[world_size]:
        alone = open_module(load_dataset(datasets / case.split(":")[0]), 0, 1, config_of(0, "fork"))
        loader = alone.train_dataloader()
        assert isinstance(loader, ResumableLoader)
        for epoch in range(2):
            assert _together([rank[case]["train"][epoch] for rank in ranks]) == ids_of(loader, epoch), case
        assert _together([rank[case]["val"] for rank in ranks]) == ids_of(alone.val_dataloader()), case


def _together(ranks: list[list[list[int]]]) -> list[list[int]]:
    """The global batches, from the local ones of all ranks."""
    return [[index for local in step for index in local] for step in zip(*ranks, strict=True)]
