"""`shardline VERB`: finds the verb, and turns what it raises into one line and an exit code.

A user's mistake is one line on stderr and exit code 2; a gate that says no is 3; stopped after saving is 128 + signal.
"""

import os
import signal
import sys
from collections.abc import Callable

import pipeline
from pipeline.errors import ConfigError, ShardlineError, explain_os_error, nearest
from pipeline.verbs.dataset import index, inspect, repack, shard, verify
from pipeline.verbs.machine import bench, doctor
from pipeline.verbs.model import predict, serve
from pipeline.verbs.parsing import summary_of
from pipeline.verbs.run import check, evaluate, export, replay, train
from pipeline.verbs.tracking import lineage, promote, sync, ui


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
        if arguments[0] == "serve":
            return _fail(ConfigError(f"{needed}: pip install 'shardline[serve]'."))
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
    lines += [f"  {name:<10} {summary_of(verb)}" for name, verb in VERBS.items()]
    lines += ["", "`shardline VERB --help` lists every setting. Exit codes: 0 done, 2 a mistake to mend, 3 a gate said no,"]
    lines += ["143 / 130 stopped by SIGTERM or SIGUSR1 / SIGINT after saving, 1 a lost process or a bug."]
    return "\n".join(lines)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "shard": shard,
    "repack": repack,
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
    "serve": serve,
    "doctor": doctor,
    "bench": bench,
}
