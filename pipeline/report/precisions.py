"""The smaller forms of a model beside float32, as a table: in the terminal, on the run's page, in the model card."""

from typing import Any

NONE = "\N{EN DASH}"
PRECISION_CAPTION = "Time of a call on one thread of the exporting machine's CPU: median, 90th percentile, beside fp32"


def precision_table(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of precisions.json."""
    batches = [latency["batch"] for latency in results[0]["latency"]] if results else []
    heads = ["precision", "published", "MB", "accuracy", "lost", "same answers"]
    heads += [f"{batch} image{'s' if batch > 1 else ''}, ms (p90)" for batch in batches]
    return heads, [_row(result, len(batches)) for result in results]


def _row(result: dict[str, Any], num_batches: int) -> list[str]:
    cells = [result["precision"], "yes" if result["published"] else "REFUSED"]
    if result["accuracy"] is None:
        return [*cells, *[NONE] * (4 + num_batches)]
    cells += [f"{result['num_bytes'] / 1e6:.2f}", f"{result['accuracy']:.4f}", f"{result['drop']:.4f}"]
    cells.append(f"{result['top1_agreement']:.4f}")
    for latency in result["latency"]:
        cells.append(f"{latency['median_ms']:.2f} ({latency['p90_ms']:.2f}), {latency['times_fp32']:.2f} x")
    return cells


def precision_sentences(results: list[dict[str, Any]]) -> dict[str, str]:
    """What speaks for or against each form, without fp32."""
    return {
        result["precision"]: result["why"] if result["published"] else f"refused: {result['why']}"
        for result in results
        if result["precision"] != "fp32"
    }
