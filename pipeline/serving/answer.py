"""Answers as JSON: the same labels and probabilities that `shardline predict` gives."""

import json
from typing import Any

import numpy as np

from pipeline.serving.exchange import JSON, Response
from pipeline.serving.served import Answers, Floats, ServedModel


def prediction_response(model: ServedModel, answers: Answers, top_k: int, *, all_classes: bool) -> Response:
    """One prediction for each image, and the model that made them."""
    predictions = [_prediction(model, row, top_k, all_classes) for row in answers.probabilities]
    named = {"name": model.name, "version": model.version, "sha256": model.sha256}
    return Response(200, json.dumps({"model": named, "predictions": predictions}).encode(), JSON)


def _prediction(model: ServedModel, row: Floats, top_k: int, all_classes: bool) -> dict[str, Any]:
    """What is said of one image, given its probabilities (K,). Equal ones are in the order of the classes."""
    names, order = model.class_names, (-row).argsort(kind="stable")
    values = row.tolist()
    top = [{"label": names[place], "probability": values[place]} for place in order[:top_k].tolist()]
    found: dict[str, Any] = {"label": top[0]["label"], "probability": top[0]["probability"], "top_k": top}
    if model.predictor.is_multi:
        chosen = np.flatnonzero(row[order] >= 0.5)
        found["labels"] = [names[place] for place in order[chosen].tolist()]
    if all_classes:
        found["probabilities"] = dict(zip(names, values, strict=True))
    return found
