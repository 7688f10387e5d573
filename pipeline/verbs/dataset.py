"""`shard`, `repack`, `index`, `verify` and `inspect`: the verbs of a data set; `verify` proves a model, too."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config, parse_config
from pipeline.console import closing_box
from pipeline.errors import ConfigError, DataError
from pipeline.files import locked
from pipeline.manifest import MANIFEST_NAME, DatasetManifest, load_dataset, read_manifest
from pipeline.remote import is_url
from pipeline.verbs.model import EXPORTED, MODEL_NAME, REFUSED, model_file
from pipeline.verbs.parsing import command_line, parser_of, up_to_date, without_options

if TYPE_CHECKING:
    from jsonargparse import Namespace

# Settings that are often given to `shard` by hand; the other verbs know only the long form. `repack` has those of images.
SHORT_OPTIONS = {
    "--restart": "--dataset.restart",
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
    parser = parser_of(shard)
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
        return up_to_date("shard", config.dataset_location)
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
        return up_to_date("shard", config.dataset_dir)
    closing_box(
        "data set ready",
        _dataset_facts(manifest, config.dataset_dir),
        command_line("check", without_options(argv, SHARD_OPTIONS)),
    )
    return 0


def _shard_part(config: Config, options: "Namespace", part: tuple[int, int], argv: list[str]) -> int:
    if config.dataset.merge:
        raise ConfigError("`--part` writes shards; `dataset.merge` only refers to those of other data sets.")
    from pipeline.data.writer import write_part

    outcome = write_part(config.dataset, config.dataset_dir, *part, workers=options.workers, trust=options.trust)
    if outcome is None:
        return up_to_date("shard", config.dataset_dir)
    left = ", ".join(f"{shards} of part {number}/{part[1]}" for number, shards in outcome.missing.items())
    facts = {
        "shards": f"{outcome.num_done} of {outcome.num_shards} are there",
        "left": left or "nothing",
        "in": str(config.dataset_dir),
    }
    merge = shlex.join(["shardline", "shard", *without_options(argv, SHARD_OPTIONS), "--merge"])
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
    if manifest.info.get("num_kept"):
        named, more = "; ".join(manifest.info["kept"]), manifest.info["num_kept"] - len(manifest.info["kept"])
        named += f"; and {more:,} more" if more else ""
        facts["kept as is"] = f"{manifest.info['num_kept']:,} that cannot be rewritten: {named}"
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


def repack(argv: list[str]) -> int:
    """Rewrite the JPEGs of a data set into another one: with restart markers, smaller, or both."""
    argv = _with_long_options(argv)
    parser = parser_of(repack, positional="IN OUT ")
    parser.add_argument("source", nargs="?", metavar="IN", help="folder or URL of a data set of shards; it is only read")
    parser.add_argument(
        "folder", nargs="?", metavar="OUT", help="folder for the new one: same samples, order, keys, labels and splits"
    )
    parser.add_argument("--workers", type=int, help="processes; default: one for each CPU that may be used")
    for short in ("--restart", "--max-side"):
        parser.add_argument(short, help=f"short for {SHORT_OPTIONS[short]}")
    config, options = parse_config(parser, argv)
    if options.folder is None:
        raise ConfigError("say which data set and where to: `shardline repack IN OUT --restart 4`.")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"`--workers` is {options.workers}; it must be 1 or more.")
    if is_url(options.folder):
        raise ConfigError(f"{options.folder}: a data set cannot be written there. Give a folder, and copy it there afterwards.")
    from pipeline.data.repack import repack_dataset

    source, folder = load_dataset(options.source, config.data.cache_folder), Path(options.folder)
    with locked(folder, wait_seconds=SECONDS_TO_END):
        manifest, made = repack_dataset(source, folder, config.dataset, config.data, options.workers)
    if not made:
        return up_to_date("repack", folder)
    facts = _dataset_facts(manifest, folder) | {"bytes": _change_of_bytes(source, manifest)}
    closing_box("data set repacked", facts, shlex.join(["shardline", "inspect", str(folder)]))
    return 0


def _change_of_bytes(before: DatasetManifest, after: DatasetManifest) -> str:
    old, new = (
        sum(shard.num_bytes for split in manifest.splits.values() for shard in split.shards) for manifest in (before, after)
    )
    return f"{new:,}, {new / old - 1:+.1%}"


def index(argv: list[str]) -> int:
    """Adopt shards that others wrote: an index and a manifest beside them."""
    parser = parser_of(index, positional="[FOLDER] ")
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
        return up_to_date("index", folder)
    facts = _dataset_facts(manifest, folder)
    if manifest.streams:
        from pipeline.data.labels import TRADE_OFFS

        facts["streamed"] = f"{sum(map(len, manifest.streams.values()))} shards for training; {TRADE_OFFS}"
    next_command = shlex.join(["shardline", "inspect", str(folder)])
    closing_box("shards adopted", facts, next_command)
    return 0


def verify(argv: list[str]) -> int:
    """Re-hash a data set, or prove that a model is the one that was exported."""
    parser = parser_of(verify, positional="[PATH] ")
    parser.add_argument("path", nargs="?", help="data set folder, model.onnx or its folder; the run's data set when left out")
    config, options = parse_config(parser, argv)
    location = config.dataset_location if options.path is None else str(options.path)
    if is_url(location):
        return _verify_dataset(load_dataset(location, config.data.cache_folder), config)
    path = Path(location)
    is_model = any((path / name).exists() for name in (MODEL_NAME, EXPORTED, "run.json", REFUSED))
    if options.path is None or path.name == MANIFEST_NAME or (path.is_dir() and not is_model):
        return _verify_dataset(read_manifest(path.parent if path.name == MANIFEST_NAME else path), config)
    if not path.exists():
        raise DataError(f"{path}: no such data set folder or model file.")
    from pipeline.predictor import verify_model

    path = model_file(path)
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
    parser = parser_of(inspect, positional="[PATH] ")
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
    words = without_options(argv, INSPECT_OPTIONS)
    if options.path is not None:
        words = [*without_options(words, {options.path: 0, "--dataset.path": 1}), "--dataset.path", location]
    facts = {"page": str(output / PAGE), "figures": str(output / FIGURES), "findings": str(inspection.num_findings)}
    closing_box("data set inspected", facts, command_line("check", words))
    return 0
