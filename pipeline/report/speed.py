"""How fast a training was and where its steps' time went, in words, with what could be done about it."""

import math
from collections.abc import Mapping

PERCENTILES = (50, 90, 99)
# What a sampled step is made of beside its wait for data: `callbacks` is what is done around the network's own work, and
# `lightning` what is left.
SAMPLED = ("transfer", "forward", "backward", "optimizer", "callbacks", "lightning")
# A smaller share of waiting is not worth another process.
MUCH_WAITING = 0.2


def describe_speed(figures: Mapping[str, float], num_workers: int, num_cores: int) -> dict[str, str]:
    """Facts for people from a run's final figures `perf/*`, none where no step was measured.

    `num_workers` loader processes belong to each of the processes that train, and `num_cores` may be used by each of them.
    """
    if "perf/step_ms_p50" not in figures:
        return {}
    share = figures["perf/data_wait_share"]
    stages = [stage for stage in ("data", *SAMPLED) if f"perf/{stage}_ms_p50" in figures]
    facts = {
        "speed": f"{figures['perf/images_per_second']:,.0f} images/s, {share:.0%} of the time waiting for data",
        "ms (p50/p90/p99)": ", ".join(f"{stage} {_percentiles(figures, stage)}" for stage in ("step", *stages)),
    }
    return facts | ({"data-bound": advise(share, num_workers, num_cores)} if share > MUCH_WAITING else {})


def advise(wait_share: float, num_workers: int, num_cores: int) -> str:
    """What to do about much waiting: as many loader processes as keep up with the rest of a step, if cores are left."""
    bound = f"{wait_share:.0%} of a step waits for data; "
    if num_workers >= num_cores:
        return f"{bound}loader processes have all {num_cores} cores: shard smaller images (`dataset.max_side`)"
    rest = max(1 - wait_share, 0.01)
    # Without loader processes the wait is the work itself, which the first of them would do beside the rest of the step.
    needed = math.ceil((num_workers or wait_share) / rest)
    return f"{bound}raise `data.num_workers` from {num_workers} to {min(max(needed, num_workers + 1), num_cores)}"


def _percentiles(figures: Mapping[str, float], stage: str) -> str:
    return "/".join(f"{figures[f'perf/{stage}_ms_p{number}']:.3g}" for number in PERCENTILES)
