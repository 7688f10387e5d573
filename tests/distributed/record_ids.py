"""One real rank that goes through loaders with real worker processes: `record_ids.py DATASETS OUTPUT CASE...` under torchrun.

A case is LAYOUT:WORKERS:START_METHOD. Each rank leaves OUTPUT/rank-N.json: the samples of its batches by case.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from pipeline.data.datamodule import ResumableLoader
from pipeline.manifest import load_dataset
from tests.distributed.id_data import config_of, ids_of, open_module


def main(datasets: Path, output: Path, cases: list[str]) -> None:
    """Go through every case, all ranks together."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    found = {}
    for case in cases:
        layout, num_workers, start_method = case.split(":")
        module = open_module(load_dataset(datasets / layout), rank, world_size, config_of(int(num_workers), start_method))
        loader = module.train_dataloader()
        assert isinstance(loader, ResumableLoader)
        found[case] = {"train": [ids_of(loader, epoch) for epoch in range(2)], "val": ids_of(module.val_dataloader())}
        dist.barrier()
    (output / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
