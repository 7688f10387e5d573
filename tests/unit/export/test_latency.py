import time

import numpy as np
import onnx
import pytest

from pipeline.export import latency
from pipeline.export.latency import measure_latency, percentile_ms, take_turns, times_as_long


def test_contenders_take_turns_in_both_directions_and_warm_up_uncounted() -> None:
    called = list[str]()
    turns = take_turns({name: lambda name=name: called.append(name) for name in "ab"}, rounds=2, seconds=0.0)  # type: ignore[misc]
    each = latency.LEAST_CALLS + 1
    assert "".join(called) == "a" * each + "b" * 2 * each + "a" * each
    assert {name: [len(taken) for taken in rounds] for name, rounds in turns.items()} == {"a": [3, 3], "b": [3, 3]}


def test_a_turn_lasts_as_long_as_it_should() -> None:
    ((taken,),) = take_turns({"a": lambda: time.sleep(0.001)}, rounds=1, seconds=0.02).values()
    assert 0.02 <= sum(taken) < 0.2
    assert min(taken) >= 0.001


def test_ratios_are_of_the_same_round() -> None:
    busy_in_the_second = [[1.0], [9.0], [1.0]]
    assert times_as_long(busy_in_the_second, [[2.0], [18.0], [2.0]]) == 0.5
    assert times_as_long([[2.0], [18.0], [1.0]], busy_in_the_second) == 2.0
    assert percentile_ms(busy_in_the_second, 50) == 1000


def test_each_model_is_timed_beside_fp32_with_one_image_and_with_all(
    exported_model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "SECONDS_A_TURN", 0.001)
    content = exported_model.SerializeToString()
    images = np.zeros((4, 3, 16, 16), np.uint8)
    found = measure_latency({"fp32": content, "int8": content}, images)
    assert [(each.batch, each.threads, each.times_fp32) for each in found["fp32"]] == [(1, 1, 1.0), (4, 1, 1.0)]
    assert [each.batch for each in found["int8"]] == [1, 4]
    assert all(0 < each.median_ms <= each.p90_ms for rows in found.values() for each in rows)
