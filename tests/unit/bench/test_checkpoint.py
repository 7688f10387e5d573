from pathlib import Path

import pytest

from pipeline.bench import checkpoint
from pipeline.bench.checkpoint import checkpoint_costs


def test_a_save_is_measured_by_its_size_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "NETWORKS", ("squeezenet1_1",))
    ((name, figures),) = checkpoint_costs(tmp_path, rounds=2).items()
    assert name == "squeezenet1_1"
    assert figures["million parameters"] == pytest.approx(1.235496)  # as torchvision's page of the weights says
    assert figures["MB"] == pytest.approx(2 * 4 * figures["million parameters"], rel=0.05), "weights and momentum in float32"
    assert 0 < figures["cpu seconds"] < 5
    assert list(tmp_path.iterdir()) == []
