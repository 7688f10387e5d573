"""A new model takes the place of the old one, or does not."""

import asyncio
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.errors import ModelError
from pipeline.files import sha256_of, write_bytes, write_json
from pipeline.serving import reload
from pipeline.serving.metrics import Board
from pipeline.serving.reload import ModelSource, Reloader
from pipeline.serving.served import name_of
from tests.unit.serving.conftest import SETTINGS


class Shelf:
    """Where a batcher keeps its model."""

    model: Any = None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "SETTLE_SECONDS", 0.01)


@pytest.fixture
def path(exported_model: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "runs/colours/export/model.onnx"
    write_bytes(path, exported_model.SerializeToString())
    return path


@pytest.fixture
def other(exported_model: onnx.ModelProto) -> bytes:
    """Another good model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(exported_model)
    copy.producer_version = "2"
    return bytes(copy.SerializeToString())


def reloader_of(source: ModelSource, board: Board) -> Reloader:
    shelf: Any = Shelf()
    made = Reloader(source, dataclasses.replace(SETTINGS, threads=1), shelf, board, speaks=True)
    asyncio.run(made.load_first())
    return made


def prove(path: Path, content: bytes) -> None:
    """Replace a model as `export` does: the proof first."""
    import hashlib

    write_json(
        path.with_name("parity.json"),
        {"passed": True, "sha256": hashlib.sha256(content).hexdigest(), "top1_agreement": 1.0, "num_samples": 12},
    )
    write_bytes(path, content)


def test_a_file_that_was_replaced_by_a_proved_one_is_taken(
    path: Path, other: bytes, board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    reloader = reloader_of(ModelSource(path), board)
    old = reloader.batcher.model
    assert old is not None
    asyncio.run(reloader.look())
    assert reloader.batcher.model is old
    prove(path, other)
    asyncio.run(reloader.look())
    new = reloader.batcher.model
    assert new is not None
    assert (new.name, new.sha256, new.version) == ("colours", sha256_of(path), sha256_of(path)[:12])
    assert capsys.readouterr().out == f"serve: colours {new.version} has taken the place of colours {old.version}\n"
    assert board.total("reloads_total") == 1


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def unprove(path: Path) -> None:
    write_json(path.with_name("parity.json"), {"passed": True, "sha256": "0" * 64, "top1_agreement": 1.0, "num_samples": 12})


def fail_parity(path: Path) -> None:
    write_json(
        path.with_name("parity.json"), {"passed": False, "sha256": sha256_of(path), "top1_agreement": 0.5, "num_samples": 12}
    )


def lose_proof(path: Path) -> None:
    path.with_name("parity.json").unlink(missing_ok=True)
    path.write_bytes(path.read_bytes().replace(b"shardline.job_id", b"shardline.job_iD"))  # another file, as good


def test_one_without_a_proof_does_not_take_the_place_of_a_proved_one(
    path: Path, board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    prove(path, path.read_bytes())
    reloader = reloader_of(ModelSource(path), board)
    old = reloader.batcher.model
    lose_proof(path)
    asyncio.run(reloader.look())
    assert reloader.batcher.model is old
    assert "has no parity.json beside it, which the one before had" in capsys.readouterr().out


@pytest.mark.parametrize("harm", [damage, unprove, fail_parity])
def test_a_bad_one_is_refused_once_and_the_old_one_goes_on_until_a_good_one_comes(
    path: Path, other: bytes, board: Board, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    reloader = reloader_of(ModelSource(path), board)
    old = reloader.batcher.model
    harm(path)
    for _ in range(3):
        asyncio.run(reloader.look())
    assert reloader.batcher.model is old
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("serve: the new model is refused, version ")
    assert board.total("refused_models_total") == 1
    prove(path, other)
    asyncio.run(reloader.look())
    assert reloader.batcher.model is not old


def test_whatever_a_new_model_raises_the_old_one_goes_on_and_the_next_is_taken(
    path: Path, other: bytes, board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reloader = reloader_of(ModelSource(path), board)
    old = reloader.batcher.model

    def fail(*_: Any) -> None:
        raise RuntimeError("an error of the runtime")

    with monkeypatch.context() as patch:
        patch.setattr(reload, "load_served", fail)
        prove(path, other)
        asyncio.run(reloader.look())
    assert reloader.batcher.model is old
    assert "an error of the runtime" in capsys.readouterr().out
    prove(path, other + b"\x72\x00")
    asyncio.run(reloader.look())
    assert reloader.batcher.model is not old


def test_a_file_that_is_gone_or_still_being_written_is_waited_for(
    path: Path, other: bytes, board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reloader = reloader_of(ModelSource(path), board)
    old = reloader.batcher.model
    path.rename(path.with_name("aside"))
    asyncio.run(reloader.look())
    path.write_bytes(other[:100])

    async def write_on(_: float) -> None:
        path.write_bytes(other)

    monkeypatch.setattr(asyncio, "sleep", write_on)
    asyncio.run(reloader.look())
    assert reloader.batcher.model is old
    monkeypatch.undo()
    asyncio.run(reloader.look())
    assert reloader.batcher.model is not old
    assert "refused" not in capsys.readouterr().out


def test_a_file_that_was_only_touched_is_the_same_model(path: Path, board: Board) -> None:
    reloader = reloader_of(ModelSource(path), board)
    old = reloader.batcher.model
    os.utime(path, (1, 1))
    asyncio.run(reloader.look())
    assert reloader.batcher.model is old
    assert board.total("reloads_total") == 0


def test_a_pointer_names_path_name_and_version(path: Path, other: bytes, board: Board, tmp_path: Path) -> None:
    pointer, second = tmp_path / "model.json", tmp_path / "second" / "model.onnx"
    write_json(pointer, {"path": str(path), "name": "pets", "version": "3"})
    reloader = reloader_of(ModelSource(pointer, is_pointer=True), board)
    old = reloader.batcher.model
    assert old is not None
    assert (old.name, old.version) == ("pets", "3")
    write_bytes(second, other)
    write_json(pointer, {"path": str(second), "name": "pets", "version": "4"})
    asyncio.run(reloader.look())
    new = reloader.batcher.model
    assert new is not None
    assert (new.name, new.version, new.sha256) == ("pets", "4", sha256_of(second))
    pointer.write_text("{")
    asyncio.run(reloader.look())
    assert reloader.batcher.model is new


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"path": "x"})])
def test_a_pointer_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.json: cannot be read as a pointer"):
        ModelSource(tmp_path / "model.json", is_pointer=True).locate()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/pets/export/model.onnx", "pets"),
        ("runs/pets/export/int8/model.onnx", "pets"),
        ("models/cats and dogs/model.onnx", "cats-and-dogs"),
    ],
)
def test_a_file_is_called_after_its_run_or_its_folder(path: str, name: str) -> None:
    assert name_of(Path("/") / path) == name
