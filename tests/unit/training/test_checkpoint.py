import dataclasses
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import RunError
from pipeline.run import RunRecord
from pipeline.training.checkpoint import (
    checkpoint_path,
    checkpoints_in,
    checksum_path,
    identity_of,
    load_checkpoint,
    load_network_weights,
    newest_checkpoint,
    remove_temporary,
    step_of,
)
from pipeline.training.checkpoint_writer import DurableCheckpointIO

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


# ---- which one a run goes on from ----


@pytest.fixture
def saved(record: RunRecord) -> list[Path]:
    """Checkpoints of steps 10, 20 and 30 in the run's folder, the newest first."""
    for step in (10, 20, 30):
        facts = {"format_version": 1, **identity_of(record), "global_step": step}
        content = {"state_dict": {"network.0.weight": torch.full((1000,), float(step))}, "shardline": facts}
        DurableCheckpointIO().save_checkpoint(content, checkpoint_path(record.folder, step))
    return checkpoints_in(record.folder)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda path: os.truncate(path, path.stat().st_size // 2), "is damaged: its sha256 is"),
    "empty": (lambda path: path.write_bytes(b""), r"is damaged: .* \(0 bytes are there\)"),
    "a bit flipped": (flip_a_bit, "is damaged: its sha256 is"),
    "without a checksum": (lambda path: checksum_path(path).unlink(), "has no step-00000030.ckpt.sha256 beside it"),
    "another file": (lambda path: shutil.copyfile(path.with_name("step-00000020.ckpt"), path), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    saved: list[Path], record: RunRecord, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = DAMAGES[damage]
    spoil(saved[0])
    newest = newest_checkpoint(record.folder, record)
    assert newest is not None
    assert (newest[0], newest[1]["global_step"]) == (saved[1], 20)
    said = capsys.readouterr().out
    assert re.search(rf"refused {saved[0]}: {message}", said)
    assert f"{saved[1]}: the one before is whole; going on from it" in said


def test_a_whole_checkpoint_of_another_run_is_refused_and_the_one_before_is_used(saved: list[Path], record: RunRecord) -> None:
    content = torch.load(saved[0], weights_only=True)
    content["shardline"]["data_digest"] = "f" * 64
    DurableCheckpointIO().save_checkpoint(content, saved[0])
    newest = newest_checkpoint(record.folder, record)
    assert newest is not None
    assert newest[0] == saved[1]


def test_where_every_checkpoint_is_damaged_nothing_is_thrown_away(saved: list[Path], record: RunRecord) -> None:
    for path in saved:
        flip_a_bit(path)
    with pytest.raises(RunError, match=r"none of its checkpoints can be used \(step-00000030\.ckpt, .*--fresh"):
        newest_checkpoint(record.folder, record)
    assert checkpoints_in(record.folder) == saved


def test_a_run_without_checkpoints_begins_at_the_beginning(record: RunRecord) -> None:
    assert newest_checkpoint(record.folder, record) is None


def test_a_checkpoint_of_an_earlier_identity_of_the_run_is_its_own(saved: list[Path], record: RunRecord) -> None:
    changed = dataclasses.replace(record, config_digest="c" * 64, earlier=[list(record.identity)])
    newest = newest_checkpoint(record.folder, changed)
    assert newest is not None
    assert newest[0] == saved[0]


def test_a_damaged_one_among_the_best_is_named_to_whoever_goes_on(
    saved: list[Path], record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoints_in(record.folder)[0]
    content = torch.load(newest, weights_only=True)
    steps = [step_of(path) for path in checkpoints_in(record.folder)]
    content["shardline"]["ranking"] = [[0.9, steps[1]], [0.8, steps[0]]]
    DurableCheckpointIO().save_checkpoint(content, newest)
    flip_a_bit(checkpoints_in(record.folder)[1])
    found = newest_checkpoint(record.folder, record)
    assert found is not None
    assert found[1]["lost"] == [steps[1]]
    assert "is damaged: its sha256 is" in capsys.readouterr().out


def test_what_a_kill_in_the_middle_of_a_save_left_is_removed(saved: list[Path], record: RunRecord) -> None:
    half = saved[0].with_name(".step-00000099.ckpt.tmp")
    half.write_bytes(b"half")
    remove_temporary(record.folder)
    assert not half.exists()
    assert checkpoints_in(record.folder)
