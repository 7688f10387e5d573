import errno
import signal

import pytest

from pipeline.errors import (
    ConfigError,
    DataError,
    GateError,
    ModelError,
    RunError,
    ShardlineError,
    StoppedError,
    explain_os_error,
    nearest,
)


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (RunError("x"), 2),
        (ModelError("x"), 2),
        (GateError("x"), 3),
        (StoppedError("x", signal.SIGTERM), 143),
        (StoppedError("x", signal.SIGINT), 130),
    ],
)
def test_every_kind_of_mistake_has_the_promised_exit_code(error: ShardlineError, exit_code: int) -> None:
    assert error.exit_code == exit_code


def test_the_nearest_known_word_is_suggested_and_a_far_one_is_not() -> None:
    assert nearest("dropuot", ["channels", "dropout"]) == " Did you mean 'dropout'?"
    assert nearest("zebra", ["channels", "dropout"]) == ""


def test_a_full_disk_is_explained_with_the_file_and_a_remedy() -> None:
    explained = explain_os_error(OSError(errno.ENOSPC, "No space left on device", "/data/train-000000.tar"), doing="/data")
    assert str(explained).startswith("/data/train-000000.tar: No space left on device. The disk is full: free some space")


def test_an_operating_system_error_without_a_file_is_explained_with_what_was_being_done() -> None:
    assert str(explain_os_error(OSError(errno.EROFS, "Read-only file system"), doing="/data")).startswith("/data: Read-only")
    assert str(explain_os_error(OSError(errno.EROFS, "Read-only file system"))).startswith("Read-only file system. The file")


@pytest.mark.parametrize("error", [OSError("no number"), OSError(errno.EBADF, "Bad file descriptor")])
def test_an_operating_system_error_that_no_user_can_mend_stays_what_it_is(error: OSError) -> None:
    assert explain_os_error(error) is None
