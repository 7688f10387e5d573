"""Importing MLflow costs seconds and making its database as many, so all tests share one file; each test has its own job."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Config, ModelConfig, OptimizerConfig
from pipeline.run import RunRecord
from pipeline.tracking.deliver import Delivery
from pipeline.tracking.run import RunTracker
from pipeline.tracking.server import Server, server_of


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds MLflow's database and artifacts."""
    return tmp_path_factory.mktemp("tracked") / "runs"


@pytest.fixture
def config(runs_dir: Path) -> Config:
    """A run of its own, with some settings that are not the defaults."""
    return Config(
        name=f"run-{uuid.uuid4().hex[:8]}",
        runs_dir=str(runs_dir),
        model=ModelConfig(channels=[8, 16]),
        optimizer=OptimizerConfig(args={"momentum": 0.5}),
    )


@pytest.fixture
def server(config: Config) -> Server:
    """The sqlite file in the runs folder."""
    return server_of(config)


@pytest.fixture
def record(config: Config) -> RunRecord:
    """A new job."""
    git = {"commit": "0" * 40, "dirty": True}
    made = RunRecord(config.name, uuid.uuid4().hex, "c" * 64, "d" * 64, "p" * 64, git=git, folder=config.run_dir)
    made.save()
    return made


@pytest.fixture
def open_here(config: Config, record: RunRecord, server: Server) -> Callable[[], RunTracker]:
    """A tracker of the job as a new try opens it, without the process that delivers."""

    def open_it() -> RunTracker:
        tracker = RunTracker(config.run_dir, server)
        tracker.begin(config, record, "RUNNING", [])
        return tracker

    return open_it


@pytest.fixture
def deliver_here(config: Config, server: Server) -> Callable[[], Delivery]:
    """Delivers what there is in this process."""

    def deliver() -> Delivery:
        delivery = Delivery(config.run_dir, server)
        delivery.round()
        return delivery

    return deliver
