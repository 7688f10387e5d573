import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from pipeline import run
from pipeline.config import Config, add_settings, parse_config
from pipeline.errors import DataError, RunError
from pipeline.manifest import DatasetManifest, ImageStats
from pipeline.run import RunRecord, git_state, open_run, require_run

Change = Callable[[Config, DatasetManifest], tuple[Config, DatasetManifest]]

CHANGES: dict[str, Change] = {
    "the configuration": lambda config, manifest: (dataclasses.replace(config, seed=7), manifest),
    "the data set": lambda config, manifest: (config, dataclasses.replace(manifest, digest="0" * 64)),
    "the preprocessing": lambda config, manifest: (
        config,
        dataclasses.replace(manifest, image_stats=ImageStats("train", [0.0] * 3, [1.0] * 3)),
    ),
}


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def trained(tiny_config: Config, tiny_dataset: DatasetManifest) -> RunRecord:
    """A run that says that its training is done, with a best checkpoint."""
    record, _ = open_run(tiny_config, tiny_dataset)
    path = record.folder / run.BEST
    path.parent.mkdir()
    path.write_bytes(b"weights")
    # sha256 of b"weights", as sha256sum prints it.
    sha256 = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    record.outcome = "done"
    record.best = {"path": str(run.BEST), "sha256": sha256, "monitor": "val/loss", "value": 0.5}
    record.finish_stage("train", record.inputs_of("train", tiny_config, "test"), [path])
    return record


# ---- one run, one configuration ----


def test_a_new_run_says_what_it_is_and_how_it_was_configured(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    record, spec = open_run(tiny_config, tiny_dataset)
    assert RunRecord.require(tiny_config.run_dir) == record
    assert record.identity == (tiny_config.identity(), tiny_dataset.digest, spec.hash())
    assert spec.mean == tiny_dataset.image_stats.mean
    parser = ArgumentParser(exit_on_error=False)
    add_settings(parser)
    assert parse_config(parser, ["--config", str(tiny_config.run_dir / "config.yaml")])[0] == tiny_config


def test_an_unchanged_run_goes_on_under_its_old_job_id(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    first, _ = open_run(tiny_config, tiny_dataset)
    again, _ = open_run(tiny_config, tiny_dataset)
    assert again == first
    assert len(list(tiny_config.run_dir.parent.iterdir())) == 1


def test_a_setting_that_cannot_change_the_weights_does_not_begin_another_run(
    tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    first, _ = open_run(tiny_config, tiny_dataset)
    faster = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, num_workers=3))
    assert open_run(faster, tiny_dataset)[0].job_id == first.job_id
    assert "num_workers: 3" in (faster.run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_run_is_moved_aside_whole_and_said_so(
    what: str, trained: RunRecord, tiny_config: Config, tiny_dataset: DatasetManifest, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(trained.folder)
    record, _ = open_run(*CHANGES[what](tiny_config, tiny_dataset))
    assert record.job_id != trained.job_id
    assert record.stages == {}
    (aside,) = [path for path in trained.folder.parent.iterdir() if path != trained.folder]
    assert files_below(aside) == before
    assert f"{trained.folder}: {what} changed; the earlier run is kept as {aside}\n" == capsys.readouterr().out


@pytest.fixture
def unfinished(tiny_config: Config, tiny_dataset: DatasetManifest) -> RunRecord:
    """A run that was stopped after its first checkpoint."""
    record, _ = open_run(tiny_config, tiny_dataset)
    record.outcome = "stopped"
    record.save()
    (record.folder / "checkpoints").mkdir()
    (record.folder / "checkpoints/step-00000010.ckpt").write_bytes(b"weights")
    return record


REFUSALS = {
    "the configuration": "the configuration changed since it began: `seed` 1999 -> 7. Go on as it was, start anew with --fresh",
    "the data set": r"the data set changed since it began: data set [0-9a-f]{12} -> 000000000000\. Go on",
    "the preprocessing": r"the preprocessing changed since it began: preprocessing [0-9a-f]{12} -> [0-9a-f]{12}\. Go on",
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_unfinished_run_is_neither_changed_nor_moved_without_a_word(
    what: str, unfinished: RunRecord, tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    before = files_below(unfinished.folder.parent)
    with pytest.raises(RunError, match=f"tiny: is not finished, and {REFUSALS[what]}"):
        open_run(*CHANGES[what](tiny_config, tiny_dataset))
    assert files_below(unfinished.folder.parent) == before


@pytest.mark.parametrize("what", CHANGES)
def test_an_unfinished_run_goes_on_changed_where_that_is_allowed(
    what: str, unfinished: RunRecord, tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    config, manifest = CHANGES[what](tiny_config, tiny_dataset)
    record, _ = open_run(config, manifest, allow_changes=True)
    assert record.job_id == unfinished.job_id
    assert record.identity != unfinished.identity
    assert record.earlier == [list(unfinished.identity)]
    assert open_run(config, manifest, allow_changes=True)[0] == record, "a second start finds nothing changed"
    assert open_run(config, manifest)[0] == record


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        ("model", {"channels": [8, 32]}, r"`model\.channels` \[8, 16\] -> \[8, 32\]"),
        ("optimizer", {"name": "AdamW"}, "`optimizer.name` SGD -> AdamW"),
        ("scheduler", {"name": "OneCycleLR"}, "`scheduler.name` None -> OneCycleLR"),
        ("model", {"dropout": 0.7}, ""),
        ("optimizer", {"lr": 0.7}, ""),
    ],
)
def test_changes_that_the_checkpoints_do_not_fit_are_refused_though_changes_are_allowed(
    section: str,
    values: dict[str, Any],
    line: str,
    unfinished: RunRecord,
    tiny_config: Config,
    tiny_dataset: DatasetManifest,
) -> None:
    config = dataclasses.replace(tiny_config, **{section: dataclasses.replace(getattr(tiny_config, section), **values)})
    if not line:
        assert open_run(config, tiny_dataset, allow_changes=True)[0].job_id == unfinished.job_id
        return
    before = files_below(unfinished.folder)
    with pytest.raises(
        RunError, match=f"tiny: its checkpoints do not fit: {line}. Go on as it was, or start anew with --fresh"
    ):
        open_run(config, tiny_dataset, allow_changes=True)
    assert files_below(unfinished.folder) == before


def test_a_changed_run_that_never_saved_is_only_moved_aside(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    first, _ = open_run(tiny_config, tiny_dataset)
    again, _ = open_run(dataclasses.replace(tiny_config, seed=7), tiny_dataset)
    assert again.job_id != first.job_id


def test_a_fresh_start_moves_even_an_unchanged_run_aside(
    trained: RunRecord, tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    before = files_below(trained.folder)
    record, _ = open_run(tiny_config, tiny_dataset, fresh=True)
    assert record.job_id != trained.job_id
    assert before in [files_below(path) for path in trained.folder.parent.iterdir()]


def test_what_a_kill_in_the_first_save_leaves_is_no_obstacle(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    tiny_config.run_dir.mkdir(parents=True)
    (tiny_config.run_dir / ".run.json.tmp").write_text('{"format_')
    record, _ = open_run(tiny_config, tiny_dataset)
    assert RunRecord.load(tiny_config.run_dir) == record


def test_a_folder_with_somebody_elses_files_is_refused(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    tiny_config.run_dir.mkdir(parents=True)
    (tiny_config.run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"tiny: is not a run \(no run\.json\) and not empty\. Choose another --name"):
        open_run(tiny_config, tiny_dataset, fresh=True)
    assert files_below(tiny_config.run_dir) == {"thesis.tex": b"years of work"}


def test_an_empty_folder_becomes_the_run(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    tiny_config.run_dir.mkdir(parents=True)
    open_run(tiny_config, tiny_dataset)
    assert RunRecord.load(tiny_config.run_dir) is not None


def test_a_run_is_required_with_a_hint_where_there_is_none(tiny_config: Config, tiny_dataset: DatasetManifest) -> None:
    with pytest.raises(RunError, match=r"tiny: no run there \(no run\.json\)\. Run `shardline train` first"):
        require_run(tiny_config, tiny_dataset)


def test_a_required_run_is_returned_with_its_preprocessing(
    trained: RunRecord, tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    record, spec = require_run(tiny_config, tiny_dataset)
    assert record == trained
    assert spec.hash() == trained.preprocess_hash


@pytest.mark.parametrize("what", CHANGES)
def test_a_required_run_of_something_else_is_refused_and_left_alone(
    what: str, trained: RunRecord, tiny_config: Config, tiny_dataset: DatasetManifest
) -> None:
    before = files_below(trained.folder.parent)
    with pytest.raises(RunError, match=f"tiny: {what} changed since this run was trained"):
        require_run(*CHANGES[what](tiny_config, tiny_dataset))
    assert files_below(trained.folder.parent) == before


# ---- the record ----


def test_a_record_of_a_newer_shardline_is_refused_by_name(trained: RunRecord) -> None:
    path = trained.folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(DataError, match=r"run\.json: format_version 2 is newer than 1"):
        RunRecord.load(trained.folder)


@pytest.mark.parametrize("change", [{"colour": 1}, {"job_id": None}])
def test_a_record_of_another_form_is_refused_by_name(change: dict[str, Any], trained: RunRecord) -> None:
    path = trained.folder / "run.json"
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None or key not in change}))
    with pytest.raises(RunError, match=rf"run\.json: not a run record \(.*{next(iter(change))}"):
        RunRecord.load(trained.folder)


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def in_repository(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout.strip()


@needs_git
def test_a_run_from_a_checkout_knows_its_commit_and_whether_it_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pipeline" / "run.py"
    path.parent.mkdir()
    path.write_text("")
    in_repository(tmp_path, "init")
    in_repository(tmp_path, "add", ".")
    in_repository(tmp_path, "commit", "-m", "all")
    monkeypatch.setattr(run, "__file__", str(path))
    commit = in_repository(tmp_path, "rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "dirty": False}
    path.write_text("edited")
    assert git_state() == {"commit": commit, "dirty": True}


@needs_git
def test_a_run_outside_of_any_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert git_state() == {"commit": None, "dirty": None}


@needs_git
def test_a_run_is_not_ascribed_to_the_repository_in_which_shardline_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A virtual environment inside one's own project is the usual case, and that project's commit says nothing of ours.
    package = tmp_path / ".venv" / "site-packages" / "pipeline"
    package.mkdir(parents=True)
    (package / "run.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv")
    in_repository(tmp_path, "init")
    in_repository(tmp_path, "add", ".gitignore")
    in_repository(tmp_path, "commit", "-m", "a project of the user")
    monkeypatch.setattr(run, "__file__", str(package / "run.py"))
    assert git_state() == {"commit": None, "dirty": None}


# ---- stages ----


def test_a_stage_is_done_only_on_the_same_inputs(trained: RunRecord, tiny_config: Config) -> None:
    inputs = trained.inputs_of("train", tiny_config, "test")
    read = RunRecord.require(trained.folder)
    assert read.stage_is_done("train", inputs)
    assert not read.stage_is_done("train", "0" * 64)
    assert not read.stage_is_done("evaluate", inputs)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"weight$"), Path.unlink])
def test_a_stage_whose_file_was_changed_is_not_done(
    damage: Callable[[Path], object], trained: RunRecord, tiny_config: Config
) -> None:
    damage(trained.folder / run.BEST)
    assert not trained.stage_is_done("train", trained.inputs_of("train", tiny_config, "test"))


def test_each_stage_depends_on_exactly_what_can_change_its_outcome(trained: RunRecord, tiny_config: Config) -> None:
    stages: tuple[run.Stage, ...] = ("check", "train", "evaluate", "export")
    before = {stage: trained.inputs_of(stage, tiny_config, "test") for stage in stages}

    def depending(record: RunRecord, config: Config, evaluation_split: str = "test") -> set[str]:
        return {stage for stage in stages if record.inputs_of(stage, config, evaluation_split) != before[stage]}

    assert (
        depending(trained, dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, num_workers=3))) == set()
    )
    assert depending(
        trained, dataclasses.replace(tiny_config, check=dataclasses.replace(tiny_config.check, skip=["seed"]))
    ) == {"check"}
    assert depending(trained, dataclasses.replace(tiny_config, export=dataclasses.replace(tiny_config.export, opset=18))) == {
        "export"
    }
    assert depending(trained, tiny_config, evaluation_split="val") == {"evaluate", "export"}
    assert depending(dataclasses.replace(trained, best={"sha256": "other"}), tiny_config) == {"evaluate", "export"}
    assert depending(dataclasses.replace(trained, data_digest="other"), tiny_config) == {"check", "train"}


# ---- the best checkpoint ----


def test_the_best_checkpoint_is_the_file_that_training_left(trained: RunRecord) -> None:
    assert trained.best_checkpoint() == trained.folder / "checkpoints" / "best.ckpt"


@pytest.mark.parametrize("outcome", ["running", "stopped", "failed"])
def test_a_training_that_has_not_finished_has_no_best_checkpoint(outcome: run.Outcome, trained: RunRecord) -> None:
    with pytest.raises(RunError, match=rf"tiny: training has not finished \({outcome}\)"):
        dataclasses.replace(trained, outcome=outcome).best_checkpoint()


def test_a_best_checkpoint_that_was_changed_or_lost_is_refused_by_name(trained: RunRecord) -> None:
    path = trained.folder / run.BEST
    path.write_bytes(b"weight$")
    with pytest.raises(RunError, match=r"best\.ckpt: is not the file that training left"):
        trained.best_checkpoint()
    path.unlink()
    with pytest.raises(RunError, match=r"best\.ckpt: the best checkpoint is gone"):
        trained.best_checkpoint()
