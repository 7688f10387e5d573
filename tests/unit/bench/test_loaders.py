from pathlib import Path

from pipeline.bench import contenders, loaders
from pipeline.bench.contenders import CONTENDERS, OURS
from pipeline.bench.measure import Figures
from pipeline.bench.results import Benchmark


def test_loaders_take_turns_and_one_that_fails_is_left_out_from_then_on() -> None:
    order: list[str] = []

    def turn(name: str, fails_at: int = 99) -> Figures:
        order.append(name)
        if order.count(name) == fails_at:
            raise RuntimeError("out of memory")
        return {"cpu_ms": float(order.count(name))}

    benchmark = Benchmark({}, [], {})
    turns = {"one": lambda: turn("one"), "two": lambda: turn("two", fails_at=2), "three": lambda: turn("three")}
    loaders.take_rounds(benchmark, "loader", turns, rounds=3)
    assert order == ["one", "two", "three", "one", "two", "three", "one", "three"]
    assert benchmark.left_out == {"two": "failed: out of memory"}
    assert benchmark.figures["loader"] == {"one": {"cpu_ms": 2.0}, "three": {"cpu_ms": 2.0}}
    assert benchmark.rounds["loader"]["one"] == [{"cpu_ms": 1.0}, {"cpu_ms": 2.0}, {"cpu_ms": 3.0}]


def test_every_goal_is_judged_and_a_peer_that_is_not_there_is_not() -> None:
    peers = {name: {"images_a_second": 1000.0 / goal, "cpu_ms": 3.0} for name, goal in loaders.GOALS.items() if name != "timm"}
    ours = {"images_a_second": 1000.0, "cpu_ms": 1.0, "startup_seconds": 0.6}
    one_worker = {"images_a_second": 500.0, "cpu_ms": 1.0}
    rounds = {OURS: ours, loaders.MARKED: {**ours, "cpu_ms": 0.9}, loaders.ONE_WORKER: one_worker, **peers}
    rounds |= {loaders.BARE: {"cpu_ms": 1.2}, loaders.BARE_MARKED: {"cpu_ms": 1.1}}
    benchmark = Benchmark({"loader": rounds}, [], {}, {"loader": {name: [figures] for name, figures in rounds.items()}})
    loaders.judge_loader(benchmark)
    verdicts = {target.what: (round(target.value, 3), target.met) for target in benchmark.targets}
    assert verdicts["CPU of the loader beside a bare full decode, ordinary shards"] == (0.833, True)
    assert verdicts["CPU of the loader beside a bare full decode, restart markers"] == (0.818, False)
    assert verdicts["images/s beside FFCV (JPEG)"] == (1.8, True)
    assert verdicts["images/s beside the best, FFCV (JPEG) (an aim)"] == (1.8, False)
    assert verdicts["two workers beside one, images/s"] == (2.0, True)
    assert verdicts["seconds from opening 8 indexed shards to the first batch"] == (0.6, False)
    assert len(verdicts) == len(peers) + 5 and not any("timm" in what for what in verdicts)


def test_a_peer_that_is_not_installed_is_named() -> None:
    missing = [name for name, peer in CONTENDERS.items() if not peer.is_installed]
    benchmark = Benchmark({}, [], {})
    for name in missing:
        assert not loaders._is_prepared(benchmark, loaders.Sets(Path("nowhere"), 1), name)
    assert benchmark.left_out == dict.fromkeys(missing, "not installed")
    assert not contenders._is_there("nvidia.nobody") and not contenders._is_there("nobody.at.all")
    assert set(loaders.GOALS) <= set(CONTENDERS) and CONTENDERS[OURS].is_installed
