import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import pipeline.serving
from pipeline.serving.metrics import GAUGES, STATUSES, Board, exposition


def samples_of(text: str) -> dict[tuple[str, ...], float]:
    """Every sample, by its name and the values of its labels, as Prometheus' own parser reads them."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def test_any_worker_speaks_for_all_of_them() -> None:
    first = Board(2)
    second = Board(2, 1, first.descriptor)
    for board, number in ((first, 3), (second, 4)):
        for _ in range(number):
            board.count_request("predict", 200, 0.003)
        board.show("connections", number)
        board.add("images_total", 10 * number)
    second.count_request("predict", 422, 7.0)
    for board in (first, second):
        samples = samples_of(exposition(board, {"name": 'a"b\\c\nd'}))
        assert samples["shardline_requests_total", "predict", "200"] == 7
        assert samples["shardline_requests_total", "predict", "422"] == 1
        assert samples["shardline_connections",] == 7
        assert samples["shardline_images_total",] == 70
        assert samples["shardline_request_seconds_count",] == 8
        assert samples["shardline_request_seconds_sum",] == pytest.approx(7 * 0.003 + 7.0)
        assert samples["shardline_request_seconds_bucket", "0.0025"] == 0
        assert samples["shardline_request_seconds_bucket", "0.005"] == 7
        assert samples["shardline_request_seconds_bucket", "10.0"] == 8
        assert samples["shardline_request_seconds_bucket", "+Inf"] == 8
        assert samples["shardline_model_info", 'a"b\\c\nd'] == 1


def test_a_worker_that_takes_the_place_of_a_dead_one_goes_on_with_its_counters_but_not_its_gauges() -> None:
    board = Board(2)
    dead = Board(2, 1, board.descriptor)
    dead.add("images_total", 5)
    for name in GAUGES:
        dead.show(name, 9)
    board.forget(1)
    heir = Board(2, 1, board.descriptor)
    assert heir.total("images_total") == 5
    assert all(heir.total(name) == 0 for name in GAUGES)


def test_a_value_at_a_bound_belongs_below_it() -> None:
    board = Board(1)
    for value in (1, 2, 3, 1000):
        board.observe("batch_images", value)
    samples = samples_of(exposition(board, {}))
    assert [samples["shardline_batch_images_bucket", bound] for bound in ("1.0", "2.0", "4.0", "128.0", "+Inf")] == [
        1,
        2,
        3,
        3,
        4,
    ]


def test_every_status_of_the_server_is_counted_under_its_own_number() -> None:
    folder = Path(pipeline.serving.__file__).parent
    used = {
        int(number)
        for path in folder.glob("*.py")
        for number in re.findall(r"(?:RefusedError|Response)\((\d{3})\b", path.read_text())
    }
    assert used <= set(STATUSES)
