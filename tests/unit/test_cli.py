import re
import subprocess
import sys
from collections.abc import Callable

import pytest

import pipeline
from pipeline import cli
from pipeline.cli import main
from pipeline.errors import ConfigError, GateError, RunError, StoppedError

VERBS = ("shard", "verify", "inspect", "check", "train", "evaluate", "export", "predict")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """A function that makes the verb `train` end with an error."""

    def install(error: BaseException) -> None:
        def train(argv: list[str]) -> int:
            raise error

        monkeypatch.setitem(cli.VERBS, "train", train)

    return install


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_every_verb_is_listed_with_what_it_does(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 0
    overview = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^  {verb} +[A-Z].*[.;]", overview, re.MULTILINE), verb
    assert "3 a gate said no" in overview


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"shardline {pipeline.__version__}\n"


@pytest.mark.parametrize(
    ("word", "suggestion"), [("trian", " Did you mean 'train'?"), ("exprot", " Did you mean 'export'?"), ("zzz", "")]
)
def test_an_unknown_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str], word: str, suggestion: str) -> None:
    assert main([word]) == 2
    said = capsys.readouterr()
    assert said.err == f"shardline: error: no verb '{word}'.{suggestion} See `shardline --help`.\n"
    assert said.out == ""


def test_a_verb_gets_the_arguments_after_its_name_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []

    def train(argv: list[str]) -> int:
        got.append(argv)
        return 7

    monkeypatch.setitem(cli.VERBS, "train", train)
    assert main(["train", "--seed=1", "train"]) == 7
    assert got == [["--seed=1", "train"]]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("`seed` is\n  odd."), 2, "shardline: error: `seed` is odd."),
        (RunError("runs/a: no run there."), 2, "shardline: error: runs/a: no run there."),
        (GateError("overfit: no."), 3, "shardline: error: overfit: no."),
        (StoppedError("stopped by SIGTERM.", 15), 143, "shardline: error: stopped by SIGTERM."),
        (OSError(28, "No space left on device", "a.tar"), 2, "shardline: error: a.tar: No space left on device. The disk"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    failing(error)
    assert main(["train"]) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(9, "Bad file descriptor")])
def test_a_bug_keeps_its_traceback(failing: Callable[[BaseException], None], error: Exception) -> None:
    failing(error)
    with pytest.raises(type(error), match=str(error.args[-1])):
        main(["train"])


def test_the_command_line_imports_no_torch_before_a_verb_needs_it() -> None:
    script = "import sys; from pipeline.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
