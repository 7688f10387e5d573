import contextlib
import datetime
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.errors import RunError
from pipeline.files import digest_of, locked, move_aside, sha256_of, write_bytes, write_json


def test_the_digest_of_a_value_is_the_same_on_every_machine_and_for_every_order_of_keys() -> None:
    # sha256 of {"a":[1.5,null],"b":"\u00e9"}, as sha256sum prints it.
    expected = "2bd7701684c2fb877f0a61b9c30da0a7cade739f88d6628edaa69c9ea824756a"
    assert digest_of({"b": "é", "a": [1.5, None]}) == expected
    assert digest_of({"a": (1.5, None), "b": "é"}) == expected


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # The test vector of FIPS 180-2, appendix B.1.
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_is_written_whole_into_folders_that_did_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "value.json"
    write_json(path, {"x": [1, 2]})
    assert json.loads(path.read_text()) == {"x": [1, 2]}
    assert list(path.parent.iterdir()) == [path]


def test_bytes_reach_the_disk_before_their_name_and_the_name_before_we_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        happened.append("fsync of the folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync of the file")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        happened.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_bytes(tmp_path / "file", b"new")
    assert happened == ["fsync of the file", "rename", "fsync of the folder"]


@pytest.mark.parametrize(("owner", "call"), [(Path, "write_bytes"), (os, "fsync"), (Path, "replace")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    owner: Any, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(owner, call, fail)
        with pytest.raises(OSError, match="No space left"):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_moving_aside_within_one_second_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedClock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "StoppedClock":
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(datetime, "datetime", StoppedClock)
    names = []
    for content in ("first", "second", "third"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").write_text(content)
        names.append(move_aside(tmp_path / "run").name)
    assert names == ["run.20260102-030405", "run.20260102-030405-2", "run.20260102-030405-3"]
    assert [(tmp_path / name / "file").read_text() for name in names] == ["first", "second", "third"]


def test_a_folder_can_be_moved_aside_under_the_name_of_another(tmp_path: Path) -> None:
    (tmp_path / "data" / ".partial" / "earlier").mkdir(parents=True)
    aside = move_aside(tmp_path / "data" / ".partial" / "earlier", like=tmp_path / "data")
    assert aside.parent == tmp_path
    assert aside.name.startswith("data.2")
    assert aside.is_dir()


def test_two_jobs_that_write_the_same_file_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    names = {files.temporary_name(tmp_path / "a.json", owner).name for owner in ("", "part-1-of-2", "part-2-of-2")}
    assert names == {".a.json.tmp", ".a.json.part-1-of-2.tmp", ".a.json.part-2-of-2.tmp"}


def test_a_locked_folder_refuses_a_second_job_and_names_the_first(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "digits"
    with locked(run_dir):
        holder = f"process {os.getpid()} on {os.uname().nodename}"
        refusal = rf"digits is locked by another job \({holder}\)\. .* another --name"
        with pytest.raises(RunError, match=refusal), locked(run_dir):
            pass
        with locked(run_dir.with_name("other")):
            pass
    with locked(run_dir):  # free again
        pass


def test_several_jobs_can_share_a_lock_which_then_is_nobody_s_alone(tmp_path: Path) -> None:
    with locked(tmp_path / "run", shared=True):
        with locked(tmp_path / "run", shared=True):
            pass
        with pytest.raises(RunError, match="is locked by another job"), locked(tmp_path / "run"):
            pass
    with locked(tmp_path / "run"), pytest.raises(RunError, match="is locked by another job"):
        locked(tmp_path / "run", shared=True).__enter__()


def test_a_lock_is_free_again_after_an_error_inside_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
        _ = 1 / 0
    with locked(tmp_path / "run"):
        pass


def test_a_job_can_wait_for_the_lock(tmp_path: Path) -> None:
    first = contextlib.ExitStack()
    first.enter_context(locked(tmp_path / "run"))
    threading.Timer(0.02, first.close).start()
    with locked(tmp_path / "run", wait_seconds=30):
        pass


def test_a_killed_job_leaves_no_lock_behind(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from pipeline.files import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    root = Path(files.__file__).parents[1]
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"process {job.pid} on"), locked(tmp_path / "run"):
            pass
        job.send_signal(signal.SIGKILL)
    with locked(tmp_path / "run"):
        pass
