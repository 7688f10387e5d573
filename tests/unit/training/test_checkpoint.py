import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import RunError
from pipeline.run import RunRecord
from pipeline.training.checkpoint import identity_of, load_checkpoint, load_network_weights

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, record: RunRecord) -> Save:
    """A function that writes a small checkpoint of `record`'s run, with some of its facts changed."""

    def write(**changed: Any) -> Path:
        path = tmp_path / "last.ckpt"
        facts = {"format_version": 1, **identity_of(record), **changed}
        torch.save({"state_dict": {"network.features.0.weight": torch.arange(6.0)}, "shardline": facts}, path)
        return path

    return write


def test_a_checkpoint_of_the_run_is_read_with_the_network_s_own_names(save: Save, record: RunRecord) -> None:
    path = save()
    facts = load_checkpoint(path, record)["shardline"]
    assert (facts["job_id"], facts["run_id"]) == ("a" * 32, "e" * 32)
    weights = load_network_weights(path, record)
    assert list(weights) == ["features.0.weight"]
    assert torch.equal(weights["features.0.weight"], torch.arange(6.0))


@pytest.mark.parametrize("name", ["config_digest", "data_digest", "preprocess_hash"])
def test_a_checkpoint_of_another_run_is_refused_saying_what_differs(save: Save, record: RunRecord, name: str) -> None:
    path = save(**{name: "f" * 64})
    message = f"last.ckpt: its {name} is ffffffffffff, but the run's is {getattr(record, name)[:12]}. It belongs to another"
    with pytest.raises(RunError, match=message):
        load_checkpoint(path, record)


def test_a_job_that_was_started_anew_may_read_its_own_weights(save: Save, record: RunRecord) -> None:
    load_checkpoint(save(), dataclasses.replace(record, job_id="b" * 32))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_checkpoint_is_refused(save: Save, record: RunRecord, share: float) -> None:
    path = save()
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(RunError, match=r"last\.ckpt: cannot be read as a Shardline checkpoint .* Use --fresh"):
        load_checkpoint(path, record)


def test_garbage_is_refused(tmp_path: Path, record: RunRecord) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(RunError, match=r"last\.ckpt: cannot be read as a Shardline checkpoint"):
        load_checkpoint(path, record)


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {}}, [1, 2], {"shardline": {}}, {"shardline": "1"}, {"shardline": {"format_version": 1}}],
    ids=["another tool's", "a list", "without facts", "facts that are text", "facts that are missing"],
)
def test_a_file_of_tensors_that_is_no_checkpoint_of_ours_is_refused(tmp_path: Path, record: RunRecord, content: Any) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    with pytest.raises(RunError, match=r"last\.ckpt: cannot be read as a Shardline checkpoint"):
        load_checkpoint(path, record)


def test_a_newer_format_is_refused_by_its_number(save: Save, record: RunRecord) -> None:
    with pytest.raises(RunError, match="format_version 2 is newer than this Shardline reads"):
        load_checkpoint(save(format_version=2), record)


class Evil:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path, record: RunRecord, container: str) -> None:
    witness, path = tmp_path / "was-here", tmp_path / "last.ckpt"
    content = {"state_dict": {}, "shardline": {"format_version": 1, **identity_of(record)}, "x": Evil(f"touch {witness}")}
    if container == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(RunError, match=r"last\.ckpt: cannot be read as a Shardline checkpoint"):
        load_checkpoint(path, record)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Evil(f"touch {witness}")))
    assert witness.exists(), "an unguarded reader would have run it"
