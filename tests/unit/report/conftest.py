"""A run that went through every stage, and one that went through none."""

import dataclasses
import json

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.files import write_bytes
from pipeline.manifest import DatasetManifest
from pipeline.report.grid import draw_tile
from pipeline.report.run_files import RunFiles
from pipeline.run import open_run
from tests.unit.report.given import ANSWERS, BAD, check, evaluate, publish, train


@pytest.fixture
def finished(tiny_config: Config, tiny_dataset: DatasetManifest) -> RunFiles:
    """A run that went through every stage: 11 of 12 right, one red taken for blue."""
    record = train(tiny_config, tiny_dataset)
    check(record)
    evaluate(record, tiny_dataset, ANSWERS)
    publish(record)
    picture = draw_tile(np.zeros((4, 4, 3), np.uint8))
    for name in ("evaluation/confusion_matrix.png", "evaluation/reliability.png", "evaluation/misclassified/0000011.png"):
        write_bytes(record.folder / name, picture)
    lines = [BAD | {"index": 5}, BAD | {"index": 5, "step": 9}, BAD | {"index": 7}]
    write_bytes(record.folder / "bad_samples/rank-0.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return RunFiles.read(tiny_config, tiny_dataset, record)


@pytest.fixture
def untrained(tiny_config: Config, tiny_dataset: DatasetManifest) -> RunFiles:
    """A run that has only been opened."""
    config = dataclasses.replace(tiny_config, name="untrained")
    return RunFiles.read(config, tiny_dataset, open_run(config, tiny_dataset)[0])
