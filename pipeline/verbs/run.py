"""`check`, `train`, `evaluate`, `export` and `replay`: the verbs of a run."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import distributed, launch
from pipeline.config import Config, load_config, parse_arguments, parse_config
from pipeline.console import closing_box, say, show_table
from pipeline.errors import ConfigError, DataError, GateError
from pipeline.files import locked
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.preprocess import PreprocessSpec
from pipeline.pretraining import spec_for
from pipeline.run import CONFIG_NAME, RunRecord, open_run, require_run
from pipeline.verbs.parsing import (
    command_line,
    parser_of,
    settle_run,
    stage_is_done,
    up_to_date,
    without_fresh,
    without_options,
)

CHECK_OPTIONS = {"--only": 1, "--skip": 1}


def check(argv: list[str]) -> int:
    """Run the sanity checks; exit 3 when one is red."""
    parser = parser_of(check)
    parser.add_argument("--only", default="", metavar="A,B", help="run these checks alone; training is not cleared by them")
    parser.add_argument("--skip", default="", metavar="A,B", help="leave these out, too: short for --check.skip=[A,B]")
    config, options = parse_config(parser, argv)
    only = [name for name in options.only.split(",") if name]
    skip = dict.fromkeys([*config.check.skip, *(name for name in options.skip.split(",") if name)])
    config = dataclasses.replace(config, check=dataclasses.replace(config.check, skip=list(skip)))
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    with locked(config.run_dir):
        if not only and stage_is_done("check", config, manifest):
            return up_to_date("check", config.run_dir / "check")
        from pipeline.recipe.gate import OUTPUTS, left_out, require_green, run_checks
        from pipeline.recipe.page import PAGE
        from pipeline.tracking.run import open_tracker, settle
        from pipeline.training.preflight import require_trainable

        without = left_out(config.check.skip, only)
        require_trainable(config, manifest, world_size=1)
        record, spec = open_run(config, manifest)
        _show_network(config, manifest)
        tracker = open_tracker(config, record, status=None, manifest=manifest)
        try:
            verdicts = run_checks(config, manifest, spec, without, tracker)
        finally:
            tracker.leave(record.outcome)
            local = settle(config, record)
        require_green(verdicts)
        if not only:
            outputs = [config.run_dir / path for path in OUTPUTS]
            record.finish_stage("check", record.inputs_of("check", config, manifest.evaluation_split), outputs)
    argv = without_options(argv, CHECK_OPTIONS)
    skipped = [verdict.check for verdict in verdicts if verdict.verdict == "skipped"]
    facts = {"page": str(config.run_dir / PAGE), "skipped": ", ".join(skipped) or "none", **local}
    closing_box(
        "these checks are green" if only else "all checks green", facts, command_line("check" if only else "train", argv)
    )
    return 0


def train(argv: list[str]) -> int:
    """Train on all processes; goes on where an unfinished run stopped."""
    parser = parser_of(train)
    parser.add_argument("--fresh", action="store_true", help="move the run aside and start anew")
    parser.add_argument("--allow-changes", action="store_true", help="go on with an unfinished run though settings changed")
    config, options = parse_config(parser, argv)
    if distributed.is_rank():
        return distributed.run_rank(lambda: _train_rank(config, options.allow_changes), config.run_dir / "exit")
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    with _front_door(config):
        if not options.fresh and stage_is_done("train", config, manifest):
            return up_to_date("train", config.run_dir)
        from pipeline.training.preflight import require_trainable

        processes = launch.processes_here()
        require_trainable(config, manifest, processes * launch.num_nodes())
        if launch.num_nodes() == 1:
            open_run(config, manifest, fresh=options.fresh, allow_changes=options.allow_changes)
        elif options.fresh:
            raise ConfigError("`--fresh` is for one machine: every restart of a job would start anew. Choose another --name.")
        if launch.is_first_node():
            _show_network(config, manifest)
        code = launch.launch(["train", *without_fresh(argv)], config.run_dir, processes)
        if not launch.is_first_node():
            return code
        local = settle_run(config, code)
        if code:
            return code
        record, _ = require_run(config, manifest)
    assert record.best is not None
    facts = {
        "best": f"{config.run_dir / record.best['path']}  {record.best['monitor']} {record.best['value']:.4f}",
        "steps": f"{record.steps:,} on {record.world_size} processes",
        **_speed_of(config),
        **_gap_of(config.run_dir),
        "run": _run_in_mlflow(record, config),
        **local,
    }
    closing_box("trained", facts, _next_of_train("evaluate", argv))
    return 0


def _run_in_mlflow(record: RunRecord, config: Config) -> str:
    from pipeline.tracking.server import server_of

    if record.mlflow["run_id"] is None:
        return f"not made in {record.mlflow['uri'] or server_of(config).uri} yet"
    return f"{record.mlflow['run_id']} in {record.mlflow['uri']} (look at it with `shardline ui`)"


def _speed_of(config: Config) -> dict[str, str]:
    """What the training said of its steps, and what would make them faster."""
    from pipeline.report.speed import describe_speed
    from pipeline.tracking.journal import FOLDER, POINTS, final_figures

    num_cores = max(1, len(os.sched_getaffinity(0)) // launch.processes_here())
    return describe_speed(final_figures(config.run_dir / FOLDER / POINTS), config.data.num_workers, num_cores)


def _gap_of(run_dir: Path) -> dict[str, str]:
    """What the training said of training and validation images, where it could compare them."""
    import json

    path = run_dir / "dynamics.json"
    gap = json.loads(path.read_text())["gap"] if path.is_file() else None
    return {} if gap is None else {"train/val": f"{gap['summary']}  {run_dir / 'dynamics.png'}"}


@contextlib.contextmanager
def _front_door(config: Config) -> Iterator[None]:
    """Keep a second job of this machine out of RUN. Of several machines, rank 0 keeps others out (`fit`)."""
    with locked(config.run_dir) if launch.num_nodes() == 1 else contextlib.nullcontext():
        yield


def _show_network(config: Config, manifest: DatasetManifest) -> None:
    from pipeline.models.sequential import summarise
    from pipeline.models.shapes import COLUMNS

    show_table(COLUMNS, summarise(config, manifest, spec_for(config, manifest)))


def _train_rank(config: Config, allow_changes: bool) -> None:
    from pipeline.training.fit import fit

    fit(config, allow_changes=allow_changes)


def _next_of_train(verb: str, argv: list[str]) -> str:
    return command_line(verb, [argument for argument in argv if argument != "--allow-changes"])


def evaluate(argv: list[str]) -> int:
    """Measure the best checkpoint on every sample of the test split."""
    parser = parser_of(evaluate)
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="RUN", help="folders of runs to compare with, image by image"
    )
    config, options = parse_config(parser, argv)
    others = [Path(folder) for folder in options.against]
    if distributed.is_rank():
        if others:
            raise ConfigError("`--against` is for one process: evaluate without it, then again with it outside of torchrun.")
        return distributed.run_rank(lambda: _evaluate_rank(config), config.run_dir / "exit")
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    argv = without_options(argv, {"--against": len(others)})
    with _front_door(config):
        record, _ = require_run(config, manifest)
        for other in others:
            _require_other(other, config)
        is_done = stage_is_done("evaluate", config, manifest)
        if is_done and not others:
            return up_to_date("evaluate", config.run_dir / "evaluation")
        record.best_checkpoint()
        code = 0 if is_done else _launch_evaluation(config, manifest, argv)
        if launch.is_first_node():
            compared = _compare(config, manifest, others) if others and not code else {}
            local = settle_run(config, code)
    if code == 0 and launch.is_first_node():
        _show_result(config.run_dir, compared | local, command_line("export", argv))
    return code


def _launch_evaluation(config: Config, manifest: DatasetManifest, argv: list[str]) -> int:
    from pipeline.training.preflight import require_trainable

    processes = launch.processes_here()
    require_trainable(config, manifest, processes * launch.num_nodes())
    return launch.launch(["evaluate", *argv], config.run_dir, processes)


def _require_other(other: Path, config: Config) -> None:
    """Refuse at once what cannot be compared with, before an evaluation of minutes."""
    from pipeline.report.against import require_evaluated

    if other.resolve() == config.run_dir.resolve():
        raise ConfigError(f"`--against` names {other}, which is this run itself. Name the folder of another run.")
    require_evaluated(other)


def _compare(config: Config, manifest: DatasetManifest, others: list[Path]) -> dict[str, str]:
    """What the comparison with other runs says, which the run's page says from now on, too."""
    from pipeline.report.against import compare_runs
    from pipeline.report.run_files import AGAINST
    from pipeline.report.run_page import write_report
    from pipeline.tracking.run import open_tracker

    record, _ = require_run(config, manifest)  # as the evaluation left it
    comparisons = compare_runs(config.run_dir, others)
    tracker = open_tracker(config, record, status=None)
    tracker.log_file(config.run_dir / AGAINST, "evaluation")
    write_report(config, manifest, record, tracker)
    tracker.leave(record.outcome)
    return {f"against {comparison['run']}": comparison["sentence"] for comparison in comparisons}


def _evaluate_rank(config: Config) -> None:
    from pipeline.training.evaluate import evaluate as evaluate_rank

    evaluate_rank(config)


def _show_result(run_dir: Path, more: dict[str, str], next_command: str) -> None:
    import json

    from pipeline.report.run_page import PAGE

    path = run_dir / "evaluation" / "test.json"
    result = json.loads(path.read_text())
    worst = sorted((recall, name) for name, recall in result["recall"].items() if recall is not None)[:3]
    others = {"top5": "top-5", "label_accuracy": "of single labels", "macro_f1": "macro F1", "auroc": "AUROC"}
    others |= {"average_precision": "average precision", "ece": "calibration error"}
    facts = {
        "accuracy": f"{result['accuracy']:.4f} on {_which_samples(result)} of {result['split']}",
        "loss": f"{result['loss']:.4f}",
        "also": ", ".join(f"{words} {result[name]:.4f}" for name, words in others.items() if name in result),
        "hardest": ", ".join(f"{name} (recall {recall:.3f})" for recall, name in worst),
        **_beside_baselines(result["baselines"]),
        "in": str(path),
        "report": str(run_dir / PAGE),
        **more,
    }
    closing_box("evaluated", facts, next_command)


def _which_samples(result: dict[str, Any]) -> str:
    number, bad = result["num_samples"], result["num_bad_samples"]
    return f"{number:,} of {number + bad:,} samples ({bad:,} cannot be decoded)" if bad else f"all {number:,} samples"


def _beside_baselines(baselines: dict[str, Any] | None) -> dict[str, str]:
    """What the network is measured against; nothing where `check` left no baselines of these data."""
    if baselines is None:
        return {}
    accuracies = {name: value for name, value in baselines.items() if name != "beaten"}
    best = max(accuracies, key=lambda name: accuracies[name])
    verdict = "beats" if baselines["beaten"] else "DOES NOT BEAT"
    return {"baselines": f"{verdict} {best.replace('_', ' ')} ({accuracies[best]:.4f})"}


def export(argv: list[str]) -> int:
    """Publish the best checkpoint as ONNX, if it gives the trained answers; exit 3 if not."""
    config, _ = parse_config(parser_of(export), argv)
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    with locked(config.run_dir):
        record, spec = require_run(config, manifest)
        has_model, has_targets = (stage_is_done(stage, config, manifest) for stage in ("export", "targets"))
        has_targets |= not config.export.targets
        if has_model and has_targets:
            _require_precisions(config)
            return up_to_date("export", config.run_dir / "export")
        from pipeline.export.targets import require_targets

        require_targets(config.export.targets)
        facts = {}
        if not has_model:
            record.best_checkpoint()
            facts = _export_model(config, manifest, spec, record)
        facts |= _make_targets(config, manifest, record)
    model_path = config.run_dir / "export/model.onnx"
    closing_box("model published" if not has_model else "targets made", facts, f"shardline predict {model_path} IMAGE...")
    _require_precisions(config)
    return 0


def _export_model(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, record: RunRecord) -> dict[str, str]:
    from pipeline.export.publish import MODEL
    from pipeline.export.publish import export as export_model

    parity = export_model(config, manifest, spec, record)
    model_path = config.run_dir / MODEL
    worst = max(parity.cases, key=lambda case: case.max_abs)
    agreement = f"top-1 agreement {parity.top1_agreement:.4f} on {parity.num_samples:,} images"
    accuracy = f"{parity.accuracy['onnx']:.4f} (trained network {parity.accuracy['torch']:.4f})"
    return {
        "model": f"{model_path}  {model_path.stat().st_size / 1e6:.2f} MB, opset {config.export.opset}",
        "parity": f"{agreement}, largest difference {worst.max_abs:.0e}, allowed {worst.tolerance:.0e}",
        "allowed": parity.tolerance_reason,
        "accuracy": f"{accuracy}; {_beside_evaluation(parity.evaluation)}",
        "registry": f"candidate of {config.registered_model}; `shardline promote` compares it with the champion",
        **_show_precisions(config),
        **settle_run(config, 0),
    }


HOW_TO_RUN = {"triton": "tritonserver --model-repository", "web": "python3 -m http.server --directory"}


def _make_targets(config: Config, manifest: DatasetManifest, record: RunRecord) -> dict[str, str]:
    """Make the targets of the published model; where each lies, and how it is run."""
    from pipeline.export.targets import FOLDERS, make_targets

    if not config.export.targets:
        return {}
    made = make_targets(config.run_dir, config.name, config.export.targets, config.export.max_batch_size)
    record.finish_stage("targets", record.inputs_of("targets", config, manifest.evaluation_split), made)
    folders = {target: config.run_dir / folder for target, folder in FOLDERS.items() if target in config.export.targets}
    return {target: f"{folder}  ({HOW_TO_RUN[target]} {folder})" for target, folder in folders.items()}


def _beside_evaluation(evaluation: dict[str, float]) -> str:
    if not evaluation:
        return "not held against an evaluation: there is none of this checkpoint (`shardline evaluate` first)"
    return f"its evaluation says {evaluation['accuracy']:.4f}, at most {evaluation['allowed_difference']:.4f} apart"


def _precisions_of(config: Config) -> list[dict[str, Any]]:
    """What the export says of the smaller forms that the configuration names."""
    import json

    from pipeline.report.run_files import PRECISIONS

    path = config.run_dir / PRECISIONS
    return json.loads(path.read_text()) if config.export.precisions and path.is_file() else []


def _show_precisions(config: Config) -> dict[str, str]:
    from pipeline.report.precisions import precision_sentences, precision_table

    results = _precisions_of(config)
    if results:
        show_table(*precision_table(results))
    return precision_sentences(results)


def _require_precisions(config: Config) -> None:
    """Raises GateError where a smaller form that was asked for was refused; the float32 model stays published."""
    refused = [
        f"{result['precision']} was refused: {result['why']}" for result in _precisions_of(config) if not result["published"]
    ]
    if refused:
        raise GateError(
            f"{'. '.join(refused)}. The fp32 model is proved and published. Leave what was refused out of `export.precisions`."
        )


def replay(argv: list[str]) -> int:
    """Show the very images that entered the network at a past step."""
    parser = parser_of(replay, settings=False)
    parser.add_argument("run", help="run folder, for example runs/digits")
    parser.add_argument("--step", type=int, required=True, help="step as the training curves count it, from 1")
    options = parse_arguments(parser, argv)
    run_dir = Path(options.run)
    record = RunRecord.require(run_dir)
    config = load_config(run_dir / CONFIG_NAME)
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    if manifest.digest != record.data_digest:
        raise DataError(
            f"{config.dataset_location}: holds the data set {manifest.digest[:12]}, but {run_dir} was trained on "
            f"{record.data_digest[:12]}. Put that one back to replay its steps."
        )
    from pipeline.data.replay import draw_step, replay_step

    replayed = replay_step(config, manifest, spec_for(config, manifest), options.step)
    paths = draw_step(replayed, run_dir)
    say(f"{'row':>5} {'index':>8}  {'label':<16} {'shard':<20} key")
    for row, sample in enumerate(replayed.samples):
        label = f"{sample.label} ({sample.note})" if sample.note else sample.label
        say(f"{row:>5} {sample.index:>8}  {label:<16} {sample.shard:<20} {sample.key}")
    place = f"batch {replayed.batch + 1} of epoch {replayed.epoch + 1}, {len(replayed.samples)} images on all processes"
    closing_box(f"step {options.step} of {config.name}", {"place": place, "images": ", ".join(map(str, paths))})
    return 0
