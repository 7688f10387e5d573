"""A folder in which the digits went through every verb, once for all tests of a session."""

from pathlib import Path

import pytest

from tests.processes import shardline


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards of the digits."""
    folder = tmp_path_factory.mktemp("workspace")
    done = shardline("shard", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def chain(workspace: Path) -> dict[str, str]:
    """What each verb said in the workspace, in the order of `make train`."""
    said = {}
    for verb in ("check", "train", "evaluate", "export"):
        done = shardline(verb, cwd=workspace)
        assert done.returncode == 0, f"{verb}: {done.stderr}"
        said[verb] = done.stdout
    return said
