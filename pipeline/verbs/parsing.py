"""What the verbs share: their parsers, the command lines they print, and whether a stage is done already."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config, add_settings
from pipeline.console import say
from pipeline.manifest import DatasetManifest
from pipeline.pretraining import spec_for
from pipeline.run import RunRecord, Stage, wanted_identity

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def summary_of(verb: Callable[[list[str]], int]) -> str:
    """The first line of a verb's docstring, which is its help."""
    return (verb.__doc__ or "").splitlines()[0]


def parser_of(verb: Callable[[list[str]], int], *, settings: bool = True, positional: str = "") -> "ArgumentParser":
    """A parser of the verb's own; with `settings` it knows those of a run's configuration, too."""
    from jsonargparse import ArgumentParser

    # The usage that argparse makes of 50 settings fills a screen before the first word of help.
    usage = f"shardline {verb.__name__} {positional}[--config FILE] [--SETTING VALUE ...]" if settings else None
    parser = ArgumentParser(prog=f"shardline {verb.__name__}", usage=usage, description=summary_of(verb), exit_on_error=False)
    if settings:
        add_settings(parser)
    return parser


def without_options(argv: list[str], options: dict[str, int]) -> list[str]:
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


def without_fresh(argv: list[str]) -> list[str]:
    """`argv` for a verb that goes on with what another has begun anew."""
    return [argument for argument in argv if argument != "--fresh"]


def command_line(verb: str, argv: list[str]) -> str:
    """What to type next, as a closing box shows it."""
    return shlex.join(["shardline", verb, *without_fresh(argv)])


def up_to_date(stage: str, where: Path | str) -> int:
    """Say that a stage has nothing to do; the exit code of its verb."""
    say(f"{stage}: nothing to do, {where} is up to date")
    return 0


def stage_is_done(stage: Stage, config: Config, manifest: DatasetManifest) -> bool:
    """Whether the run of exactly this configuration and data has this stage behind it."""
    record = RunRecord.load(config.run_dir)
    if record is None or record.identity != wanted_identity(config, manifest, spec_for(config, manifest)):
        return False
    return record.stage_is_done(stage, record.inputs_of(stage, config, manifest.evaluation_split))


def settle_run(config: Config, code: int) -> dict[str, str]:
    """What is still local of a run whose ranks have ended well; delivery after another end is not waited for."""
    from pipeline.tracking.deliver import LONGEST_DRAIN_SECONDS
    from pipeline.tracking.run import settle

    return settle(config, RunRecord.load(config.run_dir), 0.0 if code else LONGEST_DRAIN_SECONDS)
