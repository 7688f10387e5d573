import json
from pathlib import Path

import pytest

from pipeline.bench import checkpoint
from pipeline.bench.checkpoint import checkpoint_costs, start_seconds
from pipeline.training.checkpoint import checkpoints_in, step_of


def test_a_save_is_measured_by_its_size_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "NETWORKS", ("squeezenet1_1",))
    ((name, figures),) = checkpoint_costs(tmp_path, rounds=2).items()
    assert name == "squeezenet1_1"
    assert figures["million parameters"] == pytest.approx(1.235496)  # as torchvision's page of the weights says
    assert figures["MB"] == pytest.approx(2 * 4 * figures["million parameters"], rel=0.05), "weights and momentum in float32"
    assert 0 < figures["cpu seconds"] < 5
    assert list(tmp_path.iterdir()) == []


def test_a_start_and_a_resume_are_measured_to_their_first_steps(tmp_path: Path) -> None:
    figures = start_seconds(tmp_path, rounds=1)
    assert 1 < figures["cold start"]["seconds"] < 120
    assert figures["resume"]["ratio"] == pytest.approx(figures["resume"]["seconds"] / figures["cold start"]["seconds"])
    (run_dir,) = tmp_path.glob("run-*")
    assert json.loads((run_dir / "run.json").read_text())["outcome"] == "stopped", "two starts, one job"
    assert step_of(checkpoints_in(run_dir)[0]) >= 2
