"""docs/scaling.md says what follows from its own inputs: each cell of its tables is computed anew."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs/scaling.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    lines = [line for line in TEXT.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(cell: str) -> float:
    """What a cell says, in bytes where it names a unit of them."""
    found = re.match(r"([\d.]+) ?([KMGT]B)?", cell)
    assert found, cell
    return float(found[1]) * {None: 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[found[2]]


INPUTS = {row[0]: number(row[1]) for row in rows("Inputs")}
DECODE = INPUTS["bare decode"] * (
    1 - INPUTS["entropy decoding"] + INPUTS["entropy decoding"] * INPUTS["ImageNet file"] / INPUTS["measured file"]
)
MS = [DECODE * INPUTS["loader"], DECODE * INPUTS["loader, restart markers"], INPUTS["loader, 256 px"]]
RESNET = 16621.0


def check(cells: list[str], expected: list[float]) -> None:
    """Each cell is the figure, to half of its last digit or 1 %, whatever is more."""
    for cell, value in zip(cells, expected, strict=True):
        digits = len(cell.partition(".")[2].split()[0]) if "." in cell else 0
        unit = number(f"1 {cell.split()[1]}") if " " in cell else 1.0
        assert number(cell) == pytest.approx(value, rel=0.01, abs=0.5 * 10**-digits * unit), (cells, expected)


def test_what_a_file_of_imagenet_costs() -> None:
    assert (round(DECODE, 2), round(MS[0], 2), round(MS[1], 2)) == (1.62, 1.46, 1.30)
    assert "= 1.62 ms, so the loader 1.46 ms, and with restart markers\n1.30 ms" in TEXT


def test_what_eight_gpus_eat() -> None:
    table = rows("Eight GPUs")
    for _, _, images, *cells in table:
        each = number(images)
        storage, lanes = each * INPUTS["ImageNet file"] / 1e9, each * INPUTS["crop"] / 8 / 1e9
        check(cells, [each * ms / 1e3 for ms in MS] + [storage, lanes])
    on_a100 = {row[0].split(",")[0]: number(row[2]) for row in table if row[1] == "8 x A100"}
    for name, _, images, *_ in table[4:]:
        check([images], [on_a100[name.split(",")[0]] * INPUTS["A100 to H100"]])


def test_what_many_machines_eat() -> None:
    for gpus, *cells in rows("From one machine to 128"):
        images = RESNET / 8 * number(gpus)
        storage = images * INPUTS["ImageNet file"] / 1e9
        own = storage / (number(gpus) / 8)
        check(cells, [images, storage, 1_281_167 / images, 1e9 / images / 60, own, storage])


def test_what_index_and_order_take() -> None:
    for images, *cells in rows("Caches, index, order"):
        shards = -(-number(images) // 5000)
        sizes = [number(images) * each for each in (INPUTS["ImageNet file"], 23e3, INPUTS["row"])]
        check(cells, [*sizes, 8 * 5000 * 8, shards, 8 * shards])


def test_what_the_cores_beside_a_gpu_can_feed() -> None:
    table = rows("Where GPU decoding would take over")
    assert number(table[0][1]) == INPUTS["cores, A100"] / 8
    assert number(table[1][1]) == INPUTS["cores, H100"] / 8
    for _, cores, *cells in table:
        check(cells, [number(cores) / ms * 1e3 for ms in MS])
    pixels = INPUTS["hardware decoder"] * (551 * 676) / (500 * 375)
    assert round(pixels, -2) == 15_600 and "15,600 of 500 x 375" in TEXT
