"""`predict`: the verb of an exported model alone, where no torch is installed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import parse_arguments
from pipeline.errors import DataError
from pipeline.verbs.parsing import parser_of

if TYPE_CHECKING:
    from jsonargparse import Namespace


def predict(argv: list[str]) -> int:
    """Classify images with an exported model; needs no torch."""
    parser = parser_of(predict, settings=False)
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
