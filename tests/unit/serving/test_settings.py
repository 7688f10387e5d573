import dataclasses
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.errors import ConfigError
from pipeline.serving import settings
from pipeline.serving.settings import ServeSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000), ("port", -1), ("workers", 0), ("max_batch", 0), ("batch_delay_ms", -1.0), ("max_body_mb", 0.0),
        ("max_pixels_mp", 101.0),
        ("max_images", 0), ("max_queue", 0), ("timeout_seconds", 0.0), ("top_k", 0), ("poll_seconds", 0.0),
    ],
)  # fmt: skip
def test_a_number_that_cannot_work_is_refused_by_its_option(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`--{name.replace('_', '-')}` is {value}"):
        dataclasses.replace(ServeSettings(), **{name: value})


def test_a_request_may_not_have_more_images_than_can_wait() -> None:
    with pytest.raises(ConfigError, match="no more than 4 can wait"):
        ServeSettings(max_queue=4)


def test_workers_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "allowed_cpus", lambda: 8)
    assert [ServeSettings(workers=number).session_threads for number in (1, 2, 8, 20)] == [8, 4, 1, 1]
    assert ServeSettings(workers=8, threads=3).session_threads == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prot", "80"], "unknown option `--prot`. Did you mean `--port`?"),
        (["--port", "web"], "`port`"),
        (["--workers", "0"], "`--workers` is 0"),
        (["nowhere/model.onnx"], "nowhere/model.onnx: no such model file"),
        (["models:/digits"], "'models:/digits' names no version"),
        (["--runs_dir", "nowhere"], "nowhere/digits/export/model.onnx: no such model file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shardline: error: ")
    assert words in line
