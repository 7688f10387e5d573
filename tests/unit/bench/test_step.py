from pathlib import Path

from pipeline.bench.step import step_costs


def test_a_step_of_each_contender_is_measured(tmp_path: Path) -> None:
    figures = step_costs(tmp_path, num_steps=100, rounds=1)
    assert list(figures) == ["plain loop", "bare Trainer", "shardline train"]
    assert 50 < figures["plain loop"]["least"] < figures["bare Trainer"]["least"]
    for contender in figures.values():
        assert contender["above bare"] == contender["least"] - figures["bare Trainer"]["least"]
    # The goal is 300; ten times that much is a mistake on any machine, however busy.
    assert figures["shardline train"]["above bare"] < 3000
