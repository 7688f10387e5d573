"""A copy of a registered model that follows its alias."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ModelError, RunError
from pipeline.files import sha256_of, write_json
from pipeline.tracking import follow
from pipeline.tracking.follow import Follower, main
from pipeline.tracking.registry import register_model
from pipeline.tracking.server import Server
from tests.unit.tracking.conftest import Registry, model_entry


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model of the test's own."""
    return f"followed-{request.node.name[:60]}"


@pytest.fixture
def follower(registry: Registry, run_dir: Path, name: str, tmp_path: Path) -> Follower:
    """Follows the candidate of a model with one version."""
    register_model(registry.client, registry.run(), run_dir, model_entry(run_dir, name))
    return Follower(Server(registry.uri, "registry"), f"models:/{name}@candidate", tmp_path / "followed/model.json")


def register_another(registry: Registry, run_dir: Path, name: str, run_id: str = "") -> Path:
    """A second version, of another file."""
    path = run_dir / "export/model.onnx"
    path.write_bytes(path.read_bytes() + b"\x72\x00")
    register_model(registry.client, run_id or registry.run(), run_dir, model_entry(run_dir, name))
    return path


def test_the_pointer_names_a_copy_of_the_version(follower: Follower, run_dir: Path, name: str) -> None:
    follower.look()
    found = json.loads(follower.pointer.read_text())
    assert (found["name"], found["version"]) == (name, "1")
    assert sha256_of(Path(found["path"])) == sha256_of(run_dir / "export/model.onnx")


def test_an_alias_that_moves_is_followed_and_the_copy_before_stays_a_while(
    follower: Follower, registry: Registry, run_dir: Path, name: str
) -> None:
    follower.look()
    first = json.loads(follower.pointer.read_text())
    follower.look()
    assert json.loads(follower.pointer.read_text()) == first
    path = register_another(registry, run_dir, name)
    follower.look()
    second = json.loads(follower.pointer.read_text())
    assert (second["version"], sha256_of(Path(second["path"]))) == ("2", sha256_of(path))
    assert Path(first["path"]).is_file()
    register_another(registry, run_dir, name)
    follower.look()
    assert (Path(first["path"]).exists(), Path(second["path"]).exists()) == (False, True)


@pytest.mark.parametrize("is_of_this_file", [True, False])
def test_the_proof_comes_along_if_it_is_of_this_file(
    follower: Follower, registry: Registry, run_dir: Path, name: str, is_of_this_file: bool
) -> None:
    run_id = registry.run()
    path = register_another(registry, run_dir, name, run_id)
    golden = run_dir / "export/golden.npz"
    golden.write_bytes(b"golden")
    sha256 = sha256_of(path) if is_of_this_file else "0" * 64
    write_json(run_dir / "export/parity.json", {"sha256": sha256, "golden_sha256": sha256_of(golden)})
    for file in ("parity.json", "golden.npz"):
        registry.client.log_artifact(run_id, str(run_dir / "export" / file), "export")
    follower.look()
    copy = Path(json.loads(follower.pointer.read_text())["path"])
    assert [copy.with_name(file).is_file() for file in ("parity.json", "golden.npz")] == 2 * [is_of_this_file]


def test_a_file_that_is_not_the_one_that_was_registered_is_refused_and_the_pointer_stays(
    follower: Follower, registry: Registry, run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    follower.look()
    before = follower.pointer.read_text()
    register_another(registry, run_dir, name)
    registry.client.set_model_version_tag(name, "2", "onnx_sha256", "0" * 64)
    with pytest.raises(ModelError, match=r"version 2 holds no model\.onnx of the sha256 that it names"):
        follower.look()
    for _ in range(3):
        follower.look_again()
    assert follower.pointer.read_text() == before
    assert capsys.readouterr().out.count("\n") == 1


def test_trouble_is_told_once_and_so_is_its_end(
    follower: Follower, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follower.look()

    def fail(*_: Any) -> None:
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(follow, "version_of", fail)
    for _ in range(3):
        follower.look_again()
    monkeypatch.undo()
    follower.look_again()
    trouble, end = capsys.readouterr().out.splitlines()
    assert "cannot be reached" in trouble
    assert trouble.endswith("The model that is there goes on.")
    assert end == f"serve: {follower.model} is followed again"


def test_any_trouble_with_files_is_told_and_outlived(
    follower: Follower, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follower.look()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(follow, "version_of", fail)
    follower.look_again()
    assert capsys.readouterr().out == "serve: [Errno 28] No space left on device The model that is there goes on.\n"


def test_one_that_takes_the_place_of_a_dead_follower_leaves_the_copy_that_workers_read(follower: Follower) -> None:
    follower.look()
    first = json.loads(follower.pointer.read_text())
    Follower(follower.server, follower.model, follower.pointer).look()
    second = json.loads(follower.pointer.read_text())
    assert second["version"] == first["version"]
    assert second["path"] != first["path"]
    assert Path(first["path"]).is_file()
    assert Path(second["path"]).is_file()


def test_a_model_that_is_not_there_is_one_line_and_exit_2(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([registry.uri, "registry", "", "models:/nobody@champion", "1", str(tmp_path / "model.json")])
    assert code == 2
    assert "models:/nobody@champion: there is no such version at sqlite:///" in capsys.readouterr().err
    nowhere = Server(f"sqlite:///{tmp_path}/none.db", "e", str(tmp_path))
    with pytest.raises(RunError, match="nothing was tracked there"):
        Follower(nowhere, "models:/nobody@champion", tmp_path / "model.json").look()
    assert not (tmp_path / "none.db").exists()


def test_it_ends_with_whoever_started_it_and_leaves_nothing(follower: Follower) -> None:
    words = [*follower.server.arguments(), follower.model, "60", str(follower.pointer)]
    process = subprocess.Popen([sys.executable, "-m", "pipeline.tracking.follow", *words], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not follower.pointer.is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
        assert not follower.pointer.parent.exists()
    finally:
        process.kill()
