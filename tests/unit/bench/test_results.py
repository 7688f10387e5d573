import json
from pathlib import Path

import pytest

from pipeline.bench.results import Benchmark, Target, median, require_parts
from pipeline.errors import ConfigError

KNOWN = ("loader", "read")


def test_parts_are_checked_before_anything_is_measured() -> None:
    assert require_parts("read, loader", KNOWN) == ["read", "loader"]
    assert require_parts("", KNOWN) == ["loader", "read"]
    with pytest.raises(ConfigError, match=r"`--parts` names 'laoder'\. Did you mean 'loader'"):
        require_parts("read,laoder", KNOWN)


def test_the_median_is_taken_of_each_figure_alone() -> None:
    assert median([{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]) == {"a": 2.0, "b": 8.0}


def test_a_ratio_is_taken_round_by_round_and_judged_by_its_median() -> None:
    rounds = {"ours": [{"ms": 1.0}, {"ms": 2.0}, {"ms": 9.0}], "theirs": [{"ms": 2.0}, {"ms": 4.0}, {"ms": 10.0}]}
    benchmark = Benchmark({}, [], {}, {"loader": rounds})
    benchmark.judge("loader", "cost", "ms", "ours", "theirs", most=0.5)
    benchmark.judge("loader", "cost", "ms", "ours", "theirs", most=0.49)
    benchmark.judge("loader", "speed", "ms", "theirs", "ours", least=2.0)
    benchmark.judge("loader", "beside who is not there", "ms", "ours", "nobody", least=2.0)
    assert [(target.value, target.goal, target.met, target.spread) for target in benchmark.targets] == [
        (0.5, "<= 0.5 x", True, (0.5, 0.9)),
        (0.5, "<= 0.49 x", False, (0.5, 0.9)),
        (2.0, ">= 2 x", True, (10 / 9, 2.0)),
    ]


def test_figures_are_written_with_the_machine_they_hold_for(tmp_path: Path) -> None:
    benchmark = Benchmark(
        {"read": {"ours": {"seconds": 1.5}}}, [Target("reading", 3.5, ">= 3 x", met=True)], {"timm": "not installed"}
    )
    benchmark.write(tmp_path / "bench.json", ["numpy", "no-such-package"])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["figures"]["read"]["ours"]["seconds"] == 1.5 and written["targets"][0]["met"]
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["versions"]["numpy"] and written["machine"]["versions"]["no-such-package"] is None
