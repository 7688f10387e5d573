import pytest

from pipeline.report.speed import advise, describe_speed


@pytest.mark.parametrize(
    ("wait_share", "num_workers", "num_cores", "advice"),
    [
        # Four processes deliver a batch in the time of a step, of which 69 % is work: 4 / 0.69 keep up with that.
        (0.31, 4, 16, "31% of a step waits for data; raise `data.num_workers` from 4 to 6"),
        (0.75, 4, 8, "75% of a step waits for data; raise `data.num_workers` from 4 to 8"),
        # Without processes the wait is three times the work: three of them do it meanwhile.
        (0.75, 0, 8, "75% of a step waits for data; raise `data.num_workers` from 0 to 3"),
        (0.25, 0, 8, "25% of a step waits for data; raise `data.num_workers` from 0 to 1"),
        (1.0, 1, 8, "100% of a step waits for data; raise `data.num_workers` from 1 to 8"),
        (
            0.5,
            8,
            8,
            "50% of a step waits for data; loader processes have all 8 cores: shard smaller images (`dataset.max_side`)",
        ),
    ],
)
def test_advice_is_as_many_processes_as_keep_up_and_have_cores(
    wait_share: float, num_workers: int, num_cores: int, advice: str
) -> None:
    assert advise(wait_share, num_workers, num_cores) == advice


def figures_of(wait_share: float) -> dict[str, float]:
    times = {"step": 4.0, "data": 0.5, "forward": 1.25}
    percentiles = {f"perf/{name}_ms_p{p}": ms * p / 50 for name, ms in times.items() for p in (50, 90, 99)}
    return {"perf/images_per_second": 2000.0, "perf/data_wait_share": wait_share, **percentiles}


def test_the_stages_that_were_measured_are_named_with_their_percentiles() -> None:
    assert describe_speed(figures_of(0.125), 2, 8) == {
        "speed": "2,000 images/s, 12% of the time waiting for data",
        "ms (p50/p90/p99)": "step 4/7.2/7.92, data 0.5/0.9/0.99, forward 1.25/2.25/2.48",
    }


def test_much_waiting_comes_with_advice_and_no_step_with_nothing() -> None:
    assert list(describe_speed(figures_of(0.31), 2, 8)) == ["speed", "ms (p50/p90/p99)", "data-bound"]
    assert describe_speed({}, 2, 8) == {}
