import pytest

from pipeline.recipe.gap import judge_gap


@pytest.mark.parametrize(
    ("train", "val", "commonest", "samples", "verdict"),
    [
        (0.999, 0.99, 0.1, 500, "fine"),
        (1.0, 0.90, 0.1, 500, "overfits"),
        (1.0, 0.90, 0.1, 20, "fine"),  # two of twenty images are no evidence
        (0.60, 0.30, 0.5, 500, "overfits"),  # the more urgent of two troubles
        (0.52, 0.50, 0.1, 500, "underfits"),
        (0.92, 0.91, 0.9, 500, "underfits"),  # hardly better than always saying the commonest class
        (0.80, 0.82, 0.1, 500, "fine"),
    ],
)
def test_the_verdict_follows_its_rule(train: float, val: float, commonest: float, samples: int, verdict: str) -> None:
    gap = judge_gap(train, val, commonest, (samples, samples))
    assert gap.verdict == verdict
    assert gap.gap == pytest.approx(train - val, abs=1e-12)
    assert str(gap).startswith(f"gap {train - val:.3f}: {verdict} (accuracy {train:.3f} on training images, {val:.3f} on")
