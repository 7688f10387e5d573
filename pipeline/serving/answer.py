"""Answers as JSON: the same labels and probabilities that `shardline predict` gives.

Written by hand: of a small network, building dicts for `json.dumps` took as long as decoding the image. Labels are escaped once
a model, and the shortest digits that give a float back are what `json.dumps` writes, too.
"""

import numpy as np

from pipeline.serving.exchange import JSON, Response
from pipeline.serving.served import Answers, Floats, ServedModel


def prediction_response(model: ServedModel, answers: Answers, top_k: int, *, all_classes: bool) -> Response:
    """One prediction for each image, and the model that made them."""
    predictions = ", ".join(_prediction(model, row, top_k, all_classes) for row in answers.probabilities)
    return Response(200, f'{{"model": {model.head}, "predictions": [{predictions}]}}'.encode(), JSON)


def _prediction(model: ServedModel, row: Floats, top_k: int, all_classes: bool) -> str:
    """What is said of one image, given its finite probabilities (K,). Equal ones are in the order of the classes."""
    labels, values = model.labels, row.tolist()
    order = (-row).argsort(kind="stable")
    top = [f'{{"label": {labels[place]}, "probability": {values[place]!r}}}' for place in order[:top_k].tolist()]
    said = f'{top[0][:-1]}, "top_k": [{", ".join(top)}]'
    if model.predictor.is_multi:
        chosen = order[np.flatnonzero(row[order] >= 0.5)].tolist()
        said += f', "labels": [{", ".join(labels[place] for place in chosen)}]'
    if all_classes:
        pairs = ", ".join(f"{label}: {value!r}" for label, value in zip(labels, values, strict=True))
        said += f', "probabilities": {{{pairs}}}'
    return said + "}"
