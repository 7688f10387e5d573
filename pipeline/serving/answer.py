"""Answers about images: the same labels and probabilities that `shardline predict` gives."""

from typing import Any

import numpy as np

from pipeline.serving.exchange import Response, json_response
from pipeline.serving.served import Answers, Floats, ServedModel


def prediction_response(model: ServedModel, answers: Answers, top_k: int, *, all_classes: bool) -> Response:
    """One prediction for each image, and the model that made them."""
    predictions = [_prediction(model, row, top_k, all_classes) for row in answers.probabilities]
    return json_response({"model": model.head, "predictions": predictions})


def _prediction(model: ServedModel, row: Floats, top_k: int, all_classes: bool) -> dict[str, Any]:
    """What is said of one image, given its finite probabilities (K,). Equal ones are in the order of the classes."""
    names, values = model.class_names, row.tolist()
    order = (-row).argsort(kind="stable")
    top = [{"label": names[place], "probability": values[place]} for place in order[:top_k].tolist()]
    said: dict[str, Any] = {**top[0], "top_k": top}
    if model.predictor.is_multi:
        said["labels"] = [names[place] for place in order[np.flatnonzero(row[order] >= 0.5)].tolist()]
    if all_classes:
        said["probabilities"] = dict(zip(names, values, strict=True))
    return said
