"""A folder with the digits' shards, made once by the command line."""

from pathlib import Path

import pytest

from tests.end_to_end.processes import shardline


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    done = shardline("shard", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder
