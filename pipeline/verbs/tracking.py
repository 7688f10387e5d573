"""`sync`, `ui`, `promote` and `lineage`: the verbs of a run's place in MLflow."""

import contextlib
import dataclasses
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.config import Config, load_config, parse_arguments, parse_config
from pipeline.console import closing_box, say
from pipeline.errors import ConfigError, DataError, GateError, RunError
from pipeline.manifest import MANIFEST_NAME, load_dataset, read_manifest
from pipeline.remote import is_url
from pipeline.run import CONFIG_NAME, RunRecord
from pipeline.verbs.parsing import parser_of, settle_run, without_options

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.tracking.lineage import Link
    from pipeline.tracking.server import Server


Answer = TypeVar("Answer")


def sync(argv: list[str]) -> int:
    """Deliver to MLflow what a run could not while its server was away."""
    parser = parser_of(sync, settings=False)
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
    parser = parser_of(ui)
    parser.add_argument("--port", type=int, default=5000, help="port on this machine; 0 for any free one")
    config, options = parse_config(parser, argv)
    from pipeline.tracking.ui import show_ui

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must not outlive this process
    with contextlib.suppress(KeyboardInterrupt):
        show_ui(config, options.port)
    return 0


def promote(argv: list[str]) -> int:
    """Make the candidate the champion, if the same test images do not speak against it; exit 3 if they do."""
    parser = parser_of(promote)
    parser.add_argument("--force", action="store_true", help="move the alias whatever the numbers say; this is recorded")
    config, options = parse_config(parser, argv)
    from pipeline.tracking.promotion import promote as decide
    from pipeline.tracking.server import server_of

    name, server = config.registered_model, server_of(config)
    if config.run_dir.is_dir():
        settle_run(config, 0)  # an export of a moment ago may still be on its way
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
    words = without_options(argv, {"--force": 0})
    closing_box("promoted", facts, shlex.join(["shardline", "lineage", f"models:/{name}@champion", *words]))
    return 0


def lineage(argv: list[str]) -> int:
    """Trace a model back to its data and verify every link; exit 3 when one is broken."""
    parser = parser_of(lineage, positional="MODEL ")
    parser.add_argument("exported", nargs="?", metavar="MODEL", help="model.onnx, models:/NAME@ALIAS or models:/NAME/VERSION")
    config, options = parse_config(parser, argv)
    if options.exported is None:
        raise ConfigError("name a model: `shardline lineage runs/NAME/export/model.onnx`, or models:/NAME@champion.")
    import tempfile

    from pipeline.console import show_marked
    from pipeline.tracking.lineage import COLOURS, check_links, find_chain, first_broken
    from pipeline.tracking.server import client_of, server_of

    with tempfile.TemporaryDirectory() as folder:
        server = server_of(config)
        try:
            client, trouble = client_of(server), ""
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


def _asking(server: "Server", ask: Callable[["MlflowClient"], Answer]) -> Answer:
    from pipeline.tracking.server import client_of

    return _guarded(server, lambda: ask(client_of(server)))


def _guarded(server: "Server", ask: Callable[[], Answer]) -> Answer:
    """Turn a server that fails into one line. Raises RunError."""
    from mlflow.exceptions import MlflowException

    from pipeline.tracking.deliver import describe_trouble

    try:
        return ask()
    except (MlflowException, ConnectionError, TimeoutError) as error:
        raise RunError(f"{describe_trouble(error, server.uri)}. Is it up, and the right --tracking.uri?") from error
