from pipeline.bench.results import Benchmark, Target
from pipeline.bench.table import as_markdown


def test_the_table_has_verdicts_spread_versions_and_what_was_left_out() -> None:
    rounds = {"ours": [{"cpu_ms": 1.0}, {"cpu_ms": 1.5}], "other": [{"cpu_ms": 2.0, "startup_seconds": 250.4}]}
    figures = {"ours": {"cpu_ms": 1.25}, "other": {"cpu_ms": 2.0, "startup_seconds": 250.4}}
    targets = [Target("cost", 0.625, "<= 0.5 x", False, (0.5, 0.75)), Target("start", 0.1, "< 0.5 s", True)]
    text = as_markdown(
        Benchmark({"loader": figures}, targets, {"timm": "not installed"}, {"loader": rounds}), ["numpy", "nope"]
    )
    for line in (
        "| cost | 0.625 (0.5-0.75) | <= 0.5 x | missed |",
        "| start | 0.1 | < 0.5 s | met |",
        "|  | CPU ms an image | s to the first batch |",
        "| ours | 1.25 (1-1.5) |  |",
        "| other | 2 | 250 |",
        "Without timm: not installed.",
    ):
        assert line in text.splitlines(), text
    assert "cores, Python 3" in text.splitlines()[0]
    assert "Versions: numpy " in text and "nope" not in text
