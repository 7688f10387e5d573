"""`predict` and `serve`: the verbs of an exported model alone, where no torch is installed."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, parse_arguments, parse_config
from pipeline.errors import DataError, ModelError
from pipeline.verbs.parsing import parser_of

if TYPE_CHECKING:
    from jsonargparse import Namespace

MODEL_NAME = "model.onnx"
EXPORTED = f"export/{MODEL_NAME}"
REFUSED = "parity-refused.json"


def predict(argv: list[str]) -> int:
    """Classify images with an exported model; needs no torch."""
    parser = parser_of(predict, settings=False)
    parser.add_argument("model", help="model.onnx, its folder, or RUN")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--json", action="store_true", help="print a JSON array with every class's probability")
    options = parse_arguments(parser, argv)
    from pipeline.predictor import Predictor

    predictor = Predictor(model_file(Path(options.model)))
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


def serve(argv: list[str]) -> int:
    """Answer requests for predictions over HTTP with an exported or registered model; needs no torch."""
    from pipeline.serving.settings import ServeSettings

    parser = parser_of(serve, positional="[MODEL] ")
    parser.add_argument(
        "served",
        nargs="?",
        metavar="MODEL",
        help="model.onnx, its folder, RUN, or models:/NAME@ALIAS; default: the run's export",
    )
    for item in dataclasses.fields(ServeSettings):
        option = f"--{item.name.replace('_', '-')}"
        if isinstance(item.default, bool):
            parser.add_argument(option, action="store_true", help=item.metadata["help"])
        else:
            parser.add_argument(option, type=type(item.default), default=item.default, help=item.metadata["help"])
    config, options = parse_config(parser, argv)
    settings = ServeSettings(**{item.name: getattr(options, item.name) for item in dataclasses.fields(ServeSettings)})
    from pipeline.serving.supervisor import serve as serve_model

    if options.served is not None and options.served.startswith("models:"):
        return serve_model(settings, None, _following(options.served, config, settings.poll_seconds))
    model = config.run_dir / EXPORTED if options.served is None else Path(options.served)
    return serve_model(settings, model_file(model), [])


def model_file(path: Path) -> Path:
    """The file that a path names: itself, or the one in an export folder or a run. Raises ModelError where there is none."""
    candidates = [path / EXPORTED, path / MODEL_NAME] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    reports = (path / "export" / REFUSED, path / REFUSED, path.with_name(REFUSED))
    refused = next((found for found in reports if found.is_file()), None)
    why = f" {refused} says why it was refused." if refused else ""
    raise ModelError(f"{candidates[0]}: no such model file. `shardline export` makes one.{why}")


def _following(model: str, config: Config, poll_seconds: float) -> list[str]:
    """The command that keeps a pointer to a registered model. Raises RunError for what names none."""
    from pipeline.tracking.registry import require_registered
    from pipeline.tracking.server import server_of

    require_registered(model)
    server = server_of(config).arguments()
    return [sys.executable, "-m", "pipeline.tracking.follow", *server, model, str(poll_seconds)]
