import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline
from pipeline import cli
from pipeline.cli import main
from pipeline.config import Config, TrackingConfig
from pipeline.errors import ConfigError, GateError, RunError, StoppedError
from pipeline.files import sha256_of
from pipeline.manifest import DatasetManifest
from pipeline.run import RunRecord
from pipeline.tracking.run import RunTracker
from pipeline.verbs import dataset, run
from pipeline.verbs.parsing import without_options
from tests.unit.report.given import ANSWERS, evaluate, train

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


@pytest.mark.parametrize(("verb", "extra"), [("train", "train"), ("serve", "serve")])
def test_a_missing_package_is_one_line_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, extra: str
) -> None:
    def missing(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'uvloop'", name="uvloop")

    monkeypatch.setitem(cli.VERBS, verb, missing)
    assert main([verb]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    needed = f"`{verb}` needs the package uvloop, which is not installed here: pip install 'shardline[{extra}]'."
    assert line.startswith(f"shardline: error: {needed}")


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(9, "Bad file descriptor")])
def test_a_bug_keeps_its_traceback(failing: Callable[[BaseException], None], error: Exception) -> None:
    failing(error)
    with pytest.raises(type(error), match=str(error.args[-1])):
        main(["train"])


def test_the_command_line_imports_no_torch_before_a_verb_needs_it() -> None:
    script = "import sys; from pipeline.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# ---- shard ----


@pytest.mark.parametrize(
    ("argv", "long", "for_others"),
    [
        (["--max-side", "512", "--keep-format"], ["--dataset.max_side", "512", "--dataset.keep_format=true"], None),
        (["--restart=4"], ["--dataset.restart=4"], None),
        (["--keep-format=false", "--max-rejected=0.1"], ["--dataset.keep_format=false", "--dataset.max_rejected=0.1"], None),
        (["--fresh", "--workers", "3", "--seed", "1", "--trust"], None, ["--seed", "1"]),
        (["--workers=3", "--part", "1/2", "--seed=1", "--part=1/2", "--merge"], None, ["--seed=1"]),
    ],
)
def test_other_verbs_are_given_what_they_understand(
    argv: list[str], long: list[str] | None, for_others: list[str] | None
) -> None:
    long = long or argv
    assert dataset._with_long_options(argv) == long
    assert without_options(long, dataset.SHARD_OPTIONS) == (for_others or long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part=4/3"], "`--part` is '4/3'; it must be I/N with I from 1 to N, for example 1/4."),
        (["--part=0/3"], "`--part` is '0/3'"),
        (["--part=2"], "`--part` is '2'"),
        (["--part=a/b"], "`--part` is 'a/b'"),
        (["--part=1/2", "--fresh"], "`--fresh` would remove what the other parts have done"),
        (["--part=1/2", "--merge"], "`--merge` completes the parts that are there; leave out `--part`"),
        (["--merge", "--fresh"], "`--merge` completes the parts that are there; leave out `--fresh`"),
        (["--workers=0"], "`--workers` is 0; it must be 1 or more."),
        (["--part=1/2", '--dataset.merge=[{"path": "a"}]'], "`--part` writes shards; `dataset.merge` only refers to"),
        (["--max-sied=3"], "unknown option `--max-sied`. Did you mean `--max-side`?"),
        (["--max-side=0"], "`dataset.max_side` is 0; it must be 1 or more."),
        (["--restart=0"], "`dataset.restart` is 0; it must be 1 or more and at most 65535."),
    ],
)
def test_a_mistake_in_the_options_of_shard_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shard", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"shardline: error: {message}")


# ---- check and evaluate ----


def test_what_only_check_understands_is_not_handed_on() -> None:
    argv = ["--only", "seed,labels", "--seed", "1", "--skip=overfit", "--check.skip=[leakage]"]
    assert without_options(argv, run.CHECK_OPTIONS) == ["--seed", "1", "--check.skip=[leakage]"]


@pytest.fixture
def evaluated(tiny_config: Config, tiny_dataset: DatasetManifest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of an evaluated run `tiny` beside an evaluated run `other` and one without results, `bare`."""
    monkeypatch.chdir(Path(tiny_config.runs_dir).parent)
    monkeypatch.setattr(RunTracker, "start_delivery", lambda tracker: None)  # it would import mlflow
    for name, answers in (("tiny", ANSWERS), ("other", [("red", "blue")] * 12), ("bare", [])):
        config = dataclasses.replace(tiny_config, name=name, runs_dir="runs")
        record = train(config, tiny_dataset)
        if answers:
            checkpoint = config.run_dir / "best.ckpt"
            checkpoint.write_bytes(b"weights")
            record.best = {"path": "best.ckpt", "sha256": sha256_of(checkpoint), "monitor": "val/loss", "value": 0.25}
            evaluate(record, tiny_dataset, answers, checkpoint_sha256=record.best["sha256"])
            outputs = [config.run_dir / "evaluation/test.json"]
            record.finish_stage("evaluate", record.inputs_of("evaluate", config, "test"), outputs)
    return ["evaluate", "--config=runs/tiny/config.yaml"]


def test_an_evaluation_that_is_done_is_still_compared(evaluated: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(evaluated) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*evaluated, "--against", "runs/other", "--seed", "1999"]) == 0
    shown = capsys.readouterr().out
    assert "tiny beats runs/other by 0.917: 0.9167 beside 0.0000" in shown
    assert "shardline export --config=runs/tiny/config.yaml --seed 1999\n" in shown
    assert "tiny beats runs/other by 0.917" in Path("runs/tiny/report.html").read_text()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("runs/tiny", "`--against` names runs/tiny, which is this run itself"),
        ("runs/bare", "runs/bare: no evaluation to compare with"),
        ("runs/gone", "runs/gone: no evaluation to compare with"),
    ],
)
def test_what_cannot_be_compared_with_is_a_mistake(
    evaluated: list[str], capsys: pytest.CaptureFixture[str], other: str, message: str
) -> None:
    assert main([*evaluated, "--against", "runs/other", other]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/tiny/evaluation/against.json").exists()


def test_a_rank_compares_nothing(evaluated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main([*evaluated, "--against", "runs/other"]) == 2


def test_an_evaluation_says_whether_the_network_beats_what_needs_none() -> None:
    figures = {"majority": 0.1, "logistic_regression": 0.9725}
    assert run._beside_baselines(None) == {}
    beaten = run._beside_baselines({**figures, "beaten": True})
    assert beaten == {"baselines": "beats logistic regression (0.9725)"}
    assert run._beside_baselines({**figures, "beaten": False}) == {"baselines": "DOES NOT BEAT logistic regression (0.9725)"}


def test_a_run_that_mlflow_has_not_heard_of_is_not_said_to_be_in_none(tmp_path: Path) -> None:
    config = Config(runs_dir=str(tmp_path), tracking=TrackingConfig(uri="http://127.0.0.1:9"))
    record = RunRecord("digits", "a" * 32, "c" * 64, "d" * 64, "p" * 64, git={}, folder=config.run_dir)
    assert run._run_in_mlflow(record, config) == "not made in http://127.0.0.1:9 yet"
    record.mlflow = {"uri": "http://127.0.0.1:9", "experiment": "shardline", "run_id": "b"}
    assert run._run_in_mlflow(record, config) == "b in http://127.0.0.1:9 (look at it with `shardline ui`)"
