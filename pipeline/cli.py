"""The verbs of `shardline`. Each imports its stage only when it is called, so that `--help` stays fast.

A user's mistake is one line on stderr and exit code 2; a gate that says no is 3; stopped after saving is 128 + signal.
"""

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pipeline
from pipeline import distributed, launch
from pipeline.config import Config, add_settings, load_config, parse_arguments, parse_config
from pipeline.console import closing_box, say, show_table
from pipeline.errors import ConfigError, DataError, GateError, RunError, ShardlineError, explain_os_error, nearest
from pipeline.files import locked
from pipeline.manifest import MANIFEST_NAME, DatasetManifest, load_dataset, read_manifest
from pipeline.pretraining import spec_for
from pipeline.remote import is_url
from pipeline.run import CONFIG_NAME, RunRecord, Stage, open_run, require_run, wanted_identity

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from mlflow import MlflowClient

    from pipeline.tracking.lineage import Link
    from pipeline.tracking.server import Server

Answer = TypeVar("Answer")


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(arguments)
    except ShardlineError as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pipeline"):
            raise
        needed = f"`{arguments[0]}` needs the package {error.name}, which is not installed here"
        return _fail(ConfigError(f"{needed}: pip install 'shardline[train]'. (`predict` and `verify MODEL` do without.)"))
    except BrokenPipeError:
        # Whoever read our output has seen enough (`| head`); what Python flushes at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        known = explain_os_error(error)
        if known is None:
            raise
        return _fail(known)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _fail(error: ShardlineError) -> int:
    print(f"shardline: error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"shardline {pipeline.__version__}")
        return 0
    verb = VERBS.get(arguments[0])
    if verb is None:
        raise ConfigError(f"no verb '{arguments[0]}'.{nearest(arguments[0], VERBS)} See `shardline --help`.")
    return verb(arguments[1:])


def _overview() -> str:
    lines = ["usage: shardline VERB [--config FILE] [--SETTING VALUE ...]", "", (pipeline.__doc__ or "").strip(), "", "verbs:"]
    lines += [f"  {name:<10} {_summary(verb)}" for name, verb in VERBS.items()]
    lines += ["", "`shardline VERB --help` lists every setting. Exit codes: 0 done, 2 a mistake to mend, 3 a gate said no,"]
    lines += ["143 / 130 stopped by SIGTERM or SIGUSR1 / SIGINT after saving, 1 a lost process or a bug."]
    return "\n".join(lines)


def _summary(verb: Callable[[list[str]], int]) -> str:
    return (verb.__doc__ or "").splitlines()[0]


def _parser(verb: Callable[[list[str]], int], *, settings: bool = True, positional: str = "") -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    # The usage that argparse makes of 50 settings fills a screen before the first word of help.
    usage = f"shardline {verb.__name__} {positional}[--config FILE] [--SETTING VALUE ...]" if settings else None
    parser = ArgumentParser(prog=f"shardline {verb.__name__}", usage=usage, description=_summary(verb), exit_on_error=False)
    if settings:
        add_settings(parser)
    return parser


# ---- data ----


# Settings that are often given to `shard` by hand; the other verbs know only the long form.
SHORT_OPTIONS = {
    "--max-side": "--dataset.max_side",
    "--keep-format": "--dataset.keep_format",
    "--max-rejected": "--dataset.max_rejected",
}
# What only `shard` knows, with the number of words that follow.
SHARD_OPTIONS = {"--fresh": 0, "--trust": 0, "--merge": 0, "--workers": 1, "--part": 1}
# The processes of a run that was killed a moment ago still hold its lock.
SECONDS_TO_END = 2.0


def shard(argv: list[str]) -> int:
    """Turn raw images into a data set of shards."""
    argv = _with_long_options(argv)
    parser = _parser(shard)
    parser.add_argument("--fresh", action="store_true", help="move an existing data set aside and write it anew")
    parser.add_argument("--workers", type=int, help="processes; default: one for each CPU that may be used")
    parser.add_argument("--trust", action="store_true", help="store images that look whole without decoding them")
    parser.add_argument("--part", metavar="I/N", help="write only the I-th of N parts, one on each of N machines")
    parser.add_argument("--merge", action="store_true", help="complete a data set that was written in parts")
    for short, long in SHORT_OPTIONS.items():
        parser.add_argument(short, help=f"short for {long}")
    config, options = parse_config(parser, argv)
    if is_url(config.dataset_location):
        load_dataset(config.dataset_location, config.data.cache_folder)
        return _up_to_date("shard", config.dataset_location)
    part = _part_of(options)
    if part:
        return _shard_part(config, options, part, argv)
    from pipeline.data.merge import merge_datasets
    from pipeline.data.writer import merge_parts, prepare_dataset

    with locked(config.dataset_dir, wait_seconds=SECONDS_TO_END):
        if config.dataset.merge:
            manifest, made = merge_datasets(
                config.dataset.merge, config.dataset_dir, config.data.cache_folder, fresh=options.fresh
            )
        elif options.merge:
            manifest, made = merge_parts(config.dataset, config.dataset_dir)
        else:
            manifest, made = prepare_dataset(
                config.dataset, config.dataset_dir, fresh=options.fresh, workers=options.workers, trust=options.trust
            )
    if not made:
        return _up_to_date("shard", config.dataset_dir)
    closing_box("data set ready", _dataset_facts(manifest, config.dataset_dir), _next("check", _without_shard_options(argv)))
    return 0


def _shard_part(config: Config, options: "Namespace", part: tuple[int, int], argv: list[str]) -> int:
    if config.dataset.merge:
        raise ConfigError("`--part` writes shards; `dataset.merge` only refers to those of other data sets.")
    from pipeline.data.writer import write_part

    outcome = write_part(config.dataset, config.dataset_dir, *part, workers=options.workers, trust=options.trust)
    if outcome is None:
        return _up_to_date("shard", config.dataset_dir)
    left = ", ".join(f"{shards} of part {number}/{part[1]}" for number, shards in outcome.missing.items())
    facts = {
        "shards": f"{outcome.num_done} of {outcome.num_shards} are there",
        "left": left or "nothing",
        "in": str(config.dataset_dir),
    }
    merge = shlex.join(["shardline", "shard", *_without_shard_options(argv), "--merge"])
    closing_box(f"part {part[0]}/{part[1]} written", facts, merge if not left else "")
    return 0


def _part_of(options: "Namespace") -> tuple[int, int] | None:
    """The part and the number of parts that were asked for. Raises ConfigError for options that exclude each other."""
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"`--workers` is {options.workers}; it must be 1 or more.")
    if options.merge and (options.part or options.fresh):
        raise ConfigError(f"`--merge` completes the parts that are there; leave out `--{'part' if options.part else 'fresh'}`.")
    if options.part is None:
        return None
    if options.fresh:
        raise ConfigError("`--fresh` would remove what the other parts have done; give a new `--dataset.path` instead.")
    part, slash, num_parts = options.part.partition("/")
    if not (slash and part.isdecimal() and num_parts.isdecimal() and 1 <= int(part) <= int(num_parts)):
        raise ConfigError(f"`--part` is '{options.part}'; it must be I/N with I from 1 to N, for example 1/4.")
    return int(part), int(num_parts)


def _dataset_facts(manifest: DatasetManifest, folder: Path) -> dict[str, str]:
    counts = ", ".join(f"{name} {split.num_samples:,}" for name, split in manifest.splits.items())
    facts = {
        "samples": f"{counts} in {len(manifest.class_names)} classes",
        "shards": str(sum(len(split.shards) for split in manifest.splits.values())),
        "digest": manifest.digest[:12],
        "in": str(folder),
    }
    if manifest.info["num_ignored"]:
        facts["ignored"] = f"{manifest.info['num_ignored']:,} files: no images of a known kind, or in no class folder"
    if manifest.info.get("num_rejected"):
        reasons = "; ".join(f"{number:,} {reason}" for reason, number in manifest.info["rejected"].items())
        facts["rejected"] = f"{reasons} (see rejected.jsonl)"
    return facts


def _with_long_options(argv: list[str]) -> list[str]:
    """`argv` with the short forms of settings written out, so that other verbs understand them too."""
    long = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name == "--keep-format" and not equals:
            equals, value = "=", "true"
        long.append(f"{SHORT_OPTIONS.get(name, name)}{equals}{value}")
    return long


def _without_shard_options(argv: list[str]) -> list[str]:
    kept = []
    words = iter(argv)
    for argument in words:
        name, equals, _ = argument.partition("=")
        if name not in SHARD_OPTIONS:
            kept.append(argument)
        elif not equals:
            for _ in range(SHARD_OPTIONS[name]):
                next(words, None)
    return kept


def index(argv: list[str]) -> int:
    """Adopt shards that others wrote: an index and a manifest beside them."""
    parser = _parser(index, positional="[FOLDER] ")
    parser.add_argument("folder", nargs="?", help="folder of the shards; the run's data set when left out")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", default="", help=f"shards of {split}: glob or brace patterns, separated by commas")
    parser.add_argument("--stream", default="", help="shards to train on as a stream: patterns, URLs, or a listing URL/")
    parser.add_argument("--label", default="cls", help="where labels are: cls, txt or json:FIELD")
    parser.add_argument("--image", default="", help="extension of the images; default: any known one")
    parser.add_argument("--classes", help="file with the class names, one a line; default: classes.txt, or from the labels")
    parser.add_argument("--fresh", action="store_true", help="replace a manifest that is there")
    config, options = parse_config(parser, argv)
    from pipeline.data.adopt import Adoption, adopt_shards

    folder = config.dataset_dir if options.folder is None else Path(options.folder)
    patterns = {split: options[split] for split in ("train", "val", "test") if options[split]}
    classes = Path(options.classes) if options.classes else None
    adoption = Adoption(patterns, options.stream, options.label, options.image.removeprefix(".").lower(), classes)
    with locked(folder):
        manifest, made = adopt_shards(folder, adoption, fresh=options.fresh)
    if not made:
        return _up_to_date("index", folder)
    facts = _dataset_facts(manifest, folder)
    if manifest.streams:
        from pipeline.data.labels import TRADE_OFFS

        facts["streamed"] = f"{sum(map(len, manifest.streams.values()))} shards for training; {TRADE_OFFS}"
    next_command = shlex.join(["shardline", "inspect", str(folder)])
    closing_box("shards adopted", facts, next_command)
    return 0


def verify(argv: list[str]) -> int:
    """Re-hash a data set, or prove that a model is the one that was exported."""
    parser = _parser(verify, positional="[PATH] ")
    parser.add_argument("path", nargs="?", help="data set folder or model file; the run's data set when left out")
    config, options = parse_config(parser, argv)
    location = config.dataset_location if options.path is None else str(options.path)
    if is_url(location):
        return _verify_dataset(load_dataset(location, config.data.cache_folder), config)
    path = Path(location)
    if options.path is None or path.is_dir() or path.name == MANIFEST_NAME:
        return _verify_dataset(read_manifest(path.parent if path.name == MANIFEST_NAME else path), config)
    if not path.exists():
        raise DataError(f"{path}: no such data set folder or model file.")
    from pipeline.serving.predictor import verify_model

    closing_box("model verified", {"model": str(path), **verify_model(path)}, f"shardline predict {path} IMAGE...")
    return 0


def _verify_dataset(manifest: DatasetManifest, config: Config) -> int:
    from pipeline.console import track
    from pipeline.data.verify import num_files, verify_dataset

    number = num_files(manifest)
    defects = []
    for _, found in track(verify_dataset(manifest, config=config.data), "verify", number, "files"):
        defects += found
    if defects:
        for defect in defects[1:]:
            print(defect, file=sys.stderr)
        more = f" ({len(defects) - 1} more above.)" if len(defects) > 1 else ""
        raise DataError(f"{defects[0]} Copy it again or rebuild with `shardline shard --fresh`.{more}")
    num_samples = sum(split.num_samples for split in manifest.splits.values())
    facts = {"samples": f"{num_samples:,}", "files": str(number - 1), "digest": manifest.digest[:12]}
    closing_box("data set verified", facts)
    return 0


INSPECT_OPTIONS = {"--workers": 1, "--output": 1}


def inspect(argv: list[str]) -> int:
    """Look at a data set: classes, sizes, colours, copies and odd images, on a page to read."""
    parser = _parser(inspect, positional="[PATH] ")
    parser.add_argument("path", nargs="?", help="folder or URL of the data set; the run's data set when left out")
    parser.add_argument("--workers", type=int, help="processes; default: one for each CPU that may be used")
    parser.add_argument("--output", help="folder for inspect.html and inspect.json; default: the data set's own")
    config, options = parse_config(parser, argv)
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"`--workers` is {options.workers}; it must be 1 or more.")
    location = options.path or config.dataset_location
    if location == MANIFEST_NAME or location.endswith(f"/{MANIFEST_NAME}"):
        location = location.removesuffix(MANIFEST_NAME).rstrip("/") or "."
    manifest = load_dataset(location, config.data.cache_folder)
    if manifest.url and options.output is None:
        raise ConfigError(f"{location}: a page cannot be written there. Say where with --output FOLDER.")
    output = Path(options.output or manifest.folder)
    from pipeline.data.inspect import FIGURES, PAGE, inspect_dataset, require_writable, say_summary
    from pipeline.data.inspect_page import write_inspection

    require_writable(output)
    inspection = inspect_dataset(manifest, config.data, options.workers)
    write_inspection(inspection, output, config.seed, options.workers)
    say_summary(inspection)
    words = _without_options(argv, INSPECT_OPTIONS)
    if options.path is not None:
        words = [*_without_options(words, {options.path: 0, "--dataset.path": 1}), "--dataset.path", location]
    facts = {"page": str(output / PAGE), "figures": str(output / FIGURES), "findings": str(inspection.num_findings)}
    closing_box("data set inspected", facts, _next("check", words))
    return 0


def _without_options(argv: list[str], options: dict[str, int]) -> list[str]:
    """`argv` without some options and the number of words that follow each."""
    kept = []
    words = iter(argv)
    for argument in words:
        name, equals, _ = argument.partition("=")
        if name not in options:
            kept.append(argument)
        elif not equals:
            for _ in range(options[name]):
                next(words, None)
    return kept


# ---- a run ----


CHECK_OPTIONS = {"--only": 1, "--skip": 1}


def check(argv: list[str]) -> int:
    """Run the sanity checks; exit 3 when one is red."""
    parser = _parser(check)
    parser.add_argument("--only", default="", metavar="A,B", help="run these checks alone; training is not cleared by them")
    parser.add_argument("--skip", default="", metavar="A,B", help="leave these out, too: short for --check.skip=[A,B]")
    config, options = parse_config(parser, argv)
    only = [name for name in options.only.split(",") if name]
    skip = dict.fromkeys([*config.check.skip, *(name for name in options.skip.split(",") if name)])
    config = dataclasses.replace(config, check=dataclasses.replace(config.check, skip=list(skip)))
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    with locked(config.run_dir):
        if not only and _is_done("check", config, manifest):
            return _up_to_date("check", config.run_dir / "check")
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
    argv = _without_options(argv, CHECK_OPTIONS)
    skipped = [verdict.check for verdict in verdicts if verdict.verdict == "skipped"]
    facts = {"page": str(config.run_dir / PAGE), "skipped": ", ".join(skipped) or "none", **local}
    closing_box("these checks are green" if only else "all checks green", facts, _next("check" if only else "train", argv))
    return 0


def train(argv: list[str]) -> int:
    """Train on all processes; goes on where an unfinished run stopped."""
    parser = _parser(train)
    parser.add_argument("--fresh", action="store_true", help="move the run aside and start anew")
    parser.add_argument("--allow-changes", action="store_true", help="go on with an unfinished run though settings changed")
    config, options = parse_config(parser, argv)
    if distributed.is_rank():
        return distributed.run_rank(lambda: _train_rank(config, options.allow_changes), config.run_dir / "exit")
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    with _front_door(config):
        if not options.fresh and _is_done("train", config, manifest):
            return _up_to_date("train", config.run_dir)
        from pipeline.training.preflight import require_trainable

        processes = launch.processes_here()
        require_trainable(config, manifest, processes * launch.num_nodes())
        if launch.num_nodes() == 1:
            open_run(config, manifest, fresh=options.fresh, allow_changes=options.allow_changes)
        elif options.fresh:
            raise ConfigError("`--fresh` is for one machine: every restart of a job would start anew. Choose another --name.")
        if launch.is_first_node():
            _show_network(config, manifest)
        code = launch.launch(["train", *_without_fresh(argv)], config.run_dir, processes)
        if not launch.is_first_node():
            return code
        local = _settle(config, code)
        if code:
            return code
        record, _ = require_run(config, manifest)
    assert record.best is not None
    facts = {
        "best": f"{config.run_dir / record.best['path']}  {record.best['monitor']} {record.best['value']:.4f}",
        "steps": f"{record.steps:,} on {record.world_size} processes",
        **_gap_of(config.run_dir),
        "run": _run_in_mlflow(record, config),
        **local,
    }
    closing_box("trained", facts, _next_of_train("evaluate", argv))
    return 0


def _settle(config: Config, code: int) -> dict[str, str]:
    """What is still local of a run whose ranks have ended well; delivery after another end is not waited for."""
    from pipeline.tracking.deliver import LONGEST_DRAIN_SECONDS
    from pipeline.tracking.run import settle

    return settle(config, RunRecord.load(config.run_dir), 0.0 if code else LONGEST_DRAIN_SECONDS)


def _run_in_mlflow(record: RunRecord, config: Config) -> str:
    from pipeline.tracking.server import server_of

    if record.mlflow["run_id"] is None:
        return f"not made in {record.mlflow['uri'] or server_of(config).uri} yet"
    return f"{record.mlflow['run_id']} in {record.mlflow['uri']} (look at it with `shardline ui`)"


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


def evaluate(argv: list[str]) -> int:
    """Measure the best checkpoint on every sample of the test split."""
    parser = _parser(evaluate)
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
    argv = _without_options(argv, {"--against": len(others)})
    with _front_door(config):
        record, _ = require_run(config, manifest)
        for other in others:
            _require_other(other, config)
        is_done = _is_done("evaluate", config, manifest)
        if is_done and not others:
            return _up_to_date("evaluate", config.run_dir / "evaluation")
        record.best_checkpoint()
        code = 0 if is_done else _launch_evaluation(config, manifest, argv)
        if launch.is_first_node():
            compared = _compare(config, manifest, others) if others and not code else {}
            local = _settle(config, code)
    if code == 0 and launch.is_first_node():
        _show_result(config.run_dir, compared | local, _next("export", argv))
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
    config, _ = parse_config(_parser(export), argv)
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    with locked(config.run_dir):
        record, spec = require_run(config, manifest)
        if _is_done("export", config, manifest):
            return _up_to_date("export", config.run_dir / "export")
        record.best_checkpoint()
        from pipeline.export.publish import MODEL
        from pipeline.export.publish import export as export_model

        parity = export_model(config, manifest, spec, record)
        local = _settle(config, 0)
    model_path = config.run_dir / MODEL
    worst = max(case.max_abs for case in parity.cases)
    agreement = f"top-1 agreement {parity.top1_agreement:.4f} on {parity.num_samples:,} images"
    facts = {
        "model": f"{model_path}  {model_path.stat().st_size / 1e6:.2f} MB, opset {config.export.opset}",
        "parity": f"{agreement}, largest difference {worst:.0e}",
        "registry": f"candidate of {config.registered_model}; `shardline promote` compares it with the champion",
        **local,
    }
    closing_box("model published", facts, f"shardline predict {model_path} IMAGE...")
    return 0


def replay(argv: list[str]) -> int:
    """Show the very images that entered the network at a past step."""
    parser = _parser(replay, settings=False)
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


def _is_done(stage: Stage, config: Config, manifest: DatasetManifest) -> bool:
    """Whether the run of exactly this configuration and data has this stage behind it."""
    record = RunRecord.load(config.run_dir)
    if record is None or record.identity != wanted_identity(config, manifest, spec_for(config, manifest)):
        return False
    return record.stage_is_done(stage, record.inputs_of(stage, config, manifest.evaluation_split))


def _up_to_date(stage: str, where: Path | str) -> int:
    say(f"{stage}: nothing to do, {where} is up to date")
    return 0


def _without_fresh(argv: list[str]) -> list[str]:
    return [argument for argument in argv if argument != "--fresh"]


def _next_of_train(verb: str, argv: list[str]) -> str:
    return _next(verb, [argument for argument in argv if argument != "--allow-changes"])


def _next(verb: str, argv: list[str]) -> str:
    return shlex.join(["shardline", verb, *_without_fresh(argv)])


# ---- the run in MLflow ----


def sync(argv: list[str]) -> int:
    """Deliver to MLflow what a run could not while its server was away."""
    parser = _parser(sync, settings=False)
    parser.add_argument("run", help="run folder, for example runs/digits")
    parser.add_argument("--uri", default="", help="tracking server; default: the run's own")
    options = parse_arguments(parser, argv)
    run_dir = Path(options.run).resolve()
    RunRecord.require(run_dir)
    config = load_config(run_dir / CONFIG_NAME)
    from pipeline.tracking.deliver import deliver_now
    from pipeline.tracking.run import run_in
    from pipeline.tracking.server import place_of, server_of

    # The folder may have been moved, copied or renamed since, and this may be another place than it was trained from.
    known = config.tracking.uri and (place_of(run_dir).uri or config.tracking.uri)
    tracking = dataclasses.replace(config.tracking, uri=options.uri or known)
    moved = dataclasses.replace(config, name=run_dir.name, runs_dir=str(run_dir.parent), tracking=tracking)
    place = deliver_now(run_dir, server_of(moved))
    record = RunRecord.require(run_dir)  # as it is now: another verb may have gone on with the run meanwhile
    if record.mlflow != run_in(place):
        record.mlflow = run_in(place)
        record.save()
    closing_box("delivered", {"run": f"{place.run_id} in {place.uri}", "experiment": place.experiment})
    return 0


def ui(argv: list[str]) -> int:
    """Look at the runs in a browser: MLflow's pages, with links to curves, comparison and model."""
    parser = _parser(ui)
    parser.add_argument("--port", type=int, default=5000, help="port on this machine; 0 for any free one")
    config, options = parse_config(parser, argv)
    from pipeline.tracking.ui import show_ui

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must not outlive this process
    with contextlib.suppress(KeyboardInterrupt):
        show_ui(config, options.port)
    return 0


def promote(argv: list[str]) -> int:
    """Make the candidate the champion, if the same test images do not speak against it; exit 3 if they do."""
    parser = _parser(promote)
    parser.add_argument("--force", action="store_true", help="move the alias whatever the numbers say; this is recorded")
    config, options = parse_config(parser, argv)
    from pipeline.tracking.promotion import promote as decide
    from pipeline.tracking.server import server_of

    name, server = config.registered_model, server_of(config)
    if config.run_dir.is_dir():
        _settle(config, 0)  # an export of a moment ago may still be on its way
    decision = _asking(server, lambda client: decide(client, name, config.tracking.max_drop, force=options.force))
    if decision.kind == "refused":
        how = "`shardline promote --force` moves it all the same"
        raise GateError(f"version {decision.version} of {name} is not promoted: {decision.reason}. {how}.")
    if decision.kind == "nothing":
        say(f"promote: nothing to do, version {decision.version} of {name} is the champion already")
        return 0
    facts = {
        "champion": f"models:/{name}@champion is version {decision.version}"
        + ("" if decision.kind != "forced" else ", by --force"),
        "before": f"version {decision.champion}" if decision.champion else "none",
        "why": decision.reason,
        "rule": f"not worse, or lower by chance and by less than {config.tracking.max_drop:g} (tracking.max_drop)",
    }
    words = _without_options(argv, {"--force": 0})
    closing_box("promoted", facts, shlex.join(["shardline", "lineage", f"models:/{name}@champion", *words]))
    return 0


def lineage(argv: list[str]) -> int:
    """Trace a model back to its data and verify every link; exit 3 when one is broken."""
    parser = _parser(lineage, positional="MODEL ")
    parser.add_argument("exported", nargs="?", metavar="MODEL", help="model.onnx, models:/NAME@ALIAS or models:/NAME/VERSION")
    config, options = parse_config(parser, argv)
    if options.exported is None:
        raise ConfigError("name a model: `shardline lineage runs/NAME/export/model.onnx`, or models:/NAME@champion.")
    import tempfile

    from pipeline.console import show_marked
    from pipeline.tracking.lineage import COLOURS, check_links, find_chain, first_broken
    from pipeline.tracking.server import server_of

    with tempfile.TemporaryDirectory() as folder:
        server = server_of(config)
        try:
            client, trouble = _client_of(server), ""
        except RunError as error:
            client, trouble = None, str(error)
        chain = _guarded(server, lambda: find_chain(options.exported, config, client, trouble, Path(folder)))
        links = [_dataset_link(chain.run_dir, chain.facts["data_digest"], config), *check_links(chain)]
    show_marked([(link.state, COLOURS[link.state], f"{link.name}: {link.what}") for link in links])
    if broken := first_broken(links):
        raise broken
    away = sum(link.state == "not reachable" for link in links)
    reached = f"{len(links) - away} verified, {away} out of reach" if away else f"all {len(links)} verified"
    title = "nothing broken" if away < len(links) else "nothing could be verified"
    closing_box(title, {"model": options.exported, "links": reached})
    return 0


def _dataset_link(run_dir: Path | None, digest: str, config: Config) -> "Link":
    """Whether the data set of the run is there, whole, and the one that the model names."""
    from pipeline.console import track
    from pipeline.data.verify import num_files, verify_dataset
    from pipeline.tracking.lineage import Link, compared

    own = load_config(run_dir / CONFIG_NAME) if run_dir is not None and (run_dir / CONFIG_NAME).is_file() else config
    location = own.dataset_location
    if not is_url(location) and not (Path(location) / MANIFEST_NAME).is_file():
        return Link("data set", "not reachable", f"{location}: no data set there")
    try:
        manifest = load_dataset(location, own.data.cache_folder) if is_url(location) else read_manifest(Path(location))
    except DataError as error:
        return Link("data set", "not reachable" if is_url(location) or run_dir is None else "BROKEN", str(error))
    link = compared("data set", location, {"digest": (manifest.digest, digest)})
    if link.state == "BROKEN" and run_dir is None:  # nobody said that it should be there
        return Link("data set", "not reachable", f"{location}: is another data set; give --dataset.path")
    if link.state == "BROKEN":
        return link
    for _, defects in track(verify_dataset(manifest, config=own.data), "verify", num_files(manifest), "files"):
        if defects:
            return Link("data set", "BROKEN", defects[0])
    return link


def _client_of(server: "Server") -> "MlflowClient":
    """MLflow's client. Raises RunError where nothing was ever tracked, instead of making a database to ask in vain."""
    if server.artifacts is not None and not Path(server.uri.removeprefix("sqlite:///")).is_file():
        raise RunError(f"{server.uri}: nothing was tracked there. Give --tracking.uri, or run `shardline train` first.")
    return server.client()


def _asking(server: "Server", ask: Callable[["MlflowClient"], Answer]) -> Answer:
    return _guarded(server, lambda: ask(_client_of(server)))


def _guarded(server: "Server", ask: Callable[[], Answer]) -> Answer:
    """Turn a server that fails into one line. Raises RunError."""
    from mlflow.exceptions import MlflowException

    from pipeline.tracking.deliver import describe_trouble

    try:
        return ask()
    except (MlflowException, ConnectionError, TimeoutError) as error:
        raise RunError(f"{describe_trouble(error, server.uri)}. Is it up, and the right --tracking.uri?") from error


# ---- the machines ----


def doctor(argv: list[str]) -> int:
    """Look for what a long job would trip over, on every machine; exit 3 when something is red."""
    config, _ = parse_config(_parser(doctor), argv)
    # Beside RUN, which must not come into being before its first verb.
    exit_dir = Path(config.runs_dir) / f".doctor-{config.name}"
    if distributed.is_rank():
        from pipeline.doctor import examine

        return distributed.run_rank(lambda: examine(config), exit_dir / "exit")
    code = _doctor_together(config, ["doctor", *argv], exit_dir)
    if launch.is_first_node():
        shutil.rmtree(exit_dir, ignore_errors=True)
    if code == 0 and launch.is_first_node():
        closing_box("fit for a long job", {"figures": str(Path(config.runs_dir) / "doctor.json")}, _next("train", argv))
    return code


def _doctor_together(config: Config, arguments: list[str], exit_dir: Path) -> int:
    from pipeline.doctor import RENDEZVOUS_SECONDS, examine_alone

    try:
        code = launch.launch(arguments, exit_dir, launch.processes_here(), meet_seconds=RENDEZVOUS_SECONDS)
    except RunError as error:
        examine_alone(config, str(error))
        raise
    if code == 1 and launch.num_nodes() > 1 and not distributed.read_outcomes(exit_dir / "exit"):
        examine_alone(config, f"not all of {launch.num_nodes()} machines came within {RENDEZVOUS_SECONDS:.0f} s")
    return code


# ---- the model alone ----


def predict(argv: list[str]) -> int:
    """Classify images with an exported model; needs no torch."""
    parser = _parser(predict, settings=False)
    parser.add_argument("model", help="model.onnx")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--json", action="store_true", help="print a JSON array with every class's probability")
    options = parse_arguments(parser, argv)
    from pipeline.serving.predictor import Predictor

    predictor = Predictor(Path(options.model))
    rows, mistakes = list[dict[str, Any]](), []
    for image in options.images:
        try:
            answer = predictor.predict(Path(image))
        except DataError as error:
            mistakes.append(str(error))
            rows.append({"image": image, "error": str(error)})
        else:
            found = {"label": answer.label, "probability": answer.probability}
            if predictor.is_multi:
                found = {"labels": answer.labels}
            rows.append({"image": image, **found, "probabilities": answer.probabilities})
    _show_predictions(rows, options)
    if mistakes:
        more = f" (And {len(mistakes) - 1} more.)" if len(mistakes) > 1 else ""
        raise DataError(f"{mistakes[0]}{more}")
    return 0


def _show_predictions(rows: list[dict[str, Any]], options: "Namespace") -> None:
    if options.json:
        import json

        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("image", "label", "probability")
    table.columns[2].justify = "right"
    for row in rows:
        if "error" not in row:
            labels = row.get("labels", [row.get("label")])
            shown = ", ".join(f"{row['probabilities'][label]:.4f}" for label in labels)
            table.add_row(row["image"], ", ".join(labels) or "(none)", shown)
    if table.row_count:
        Console().print(table)


# ---- how fast ----


def bench(argv: list[str]) -> int:
    """Measure the data stage beside other loaders, or what a training step or checkpoints cost, on this machine."""
    parser = _parser(bench, settings=False)
    parser.add_argument("what", choices=["data", "step", "checkpoint"], help="what to measure")
    parser.add_argument("--parts", default="loader,read,open,write", help="loader, read, open, write")
    parser.add_argument("--num-images", type=int, default=4000, help="generated JPEGs to measure with")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--steps", type=int, default=500, help="training steps of each turn")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender has its turn")
    parser.add_argument("--out", default="bench", help="folder of the images, bench.json and bench.png")
    options = parse_arguments(parser, argv)
    from pipeline.bench.data import require_parts, run_benchmark

    parts = require_parts(options.parts)
    for name, least in (("num_images", 64), ("workers", 1), ("steps", 100), ("rounds", 1)):
        if options[name] < least:
            raise ConfigError(f"`--{name.replace('_', '-')}` is {options[name]}; it must be {least} or more.")
    out = Path(options.out)
    if options.what == "checkpoint":
        from pipeline.bench.checkpoint import checkpoint_costs, start_seconds

        _show_figures("network", checkpoint_costs(out, options.rounds))
        _show_figures("training", start_seconds(out, options.rounds))
        return 0
    if options.what == "step":
        from pipeline.bench.step import step_costs

        _show_figures("trainer", step_costs(out, options.steps, options.rounds))
        return 0
    benchmark = run_benchmark(out, parts, options.num_images, options.workers, options.rounds)
    for part, contenders in benchmark.figures.items():
        _show_figures(part, contenders)
    targets = [[t.what, f"{t.value:.3g}", t.goal, "met" if t.met else "missed"] for t in benchmark.targets]
    show_table(["target", "value", "goal", "verdict"], targets)
    facts = {"figures": str(out / "bench.json")}
    if "loader" in parts:
        facts["picture"] = str(out / "bench.png")
    for name, why in benchmark.left_out.items():
        facts[f"without {name}"] = why
    closing_box("measured", facts)
    return 0


def _show_figures(part: str, contenders: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(name for figures in contenders.values() for name in figures))
    rows = [[name, *(f"{figures[c]:,.4g}" if c in figures else "" for c in columns)] for name, figures in contenders.items()]
    show_table([part, *(column.replace("_", " ") for column in columns)], rows)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "shard": shard,
    "index": index,
    "verify": verify,
    "inspect": inspect,
    "check": check,
    "train": train,
    "evaluate": evaluate,
    "export": export,
    "replay": replay,
    "sync": sync,
    "ui": ui,
    "promote": promote,
    "lineage": lineage,
    "predict": predict,
    "doctor": doctor,
    "bench": bench,
}
