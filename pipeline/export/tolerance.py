"""How far the answers of two runtimes may lie apart, from the numbers that they compute with.

Two programs add up the same products in another order, and each order rounds otherwise. Rounding errors are like the steps of a
random walk: a sum of n products is off by about sqrt(n) units of rounding, and L layers, one after another, by sqrt(L) times
that (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"). So float32 answers may differ by

    eps * sqrt(L * n) * (1 + the largest logit),    eps = 2**-23,

where L counts convolutions and products of matrices and n is the longest sum in one of them. The 1 is the absolute part: a
logit near 0 is the difference of larger numbers. Most sums are shorter than the longest, and eps is the largest rounding, so
true models stay far below: at 3 % of it for a trained small CNN, below 1 % for twelve families of networks with fresh weights.
Weights trained in bfloat16 are exported, and compared, in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from pipeline.export.proto import constants, nodes

WEIGHTED = ("Conv", "Gemm", "MatMul", "Einsum")


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed difference of logits and probabilities: `absolute` + `relative` times the largest logit, and why."""

    absolute: float
    relative: float
    reason: str

    def of(self, scale: float) -> float:
        """What is allowed where the largest logit of a batch, without its sign, is `scale`."""
        return self.absolute + self.relative * scale


def tolerance_of(model: onnx.ModelProto, chosen: float | None) -> Tolerance:
    """What is allowed of `model`: the number that somebody chose (`export.tolerance`), or what its arithmetic explains."""
    if chosen is not None:
        return Tolerance(chosen, 0.0, "export.tolerance")
    layers = max(1, sum(node.op_type in WEIGHTED for node in nodes(model)))
    longest, eps = max(_sums(model), default=1), float(np.finfo(np.float32).eps)
    relative = eps * math.sqrt(layers * longest)
    reason = f"float32: {eps:.3g} * sqrt({layers} layers * sums of {longest:,}) * (1 + the largest logit)"
    return Tolerance(relative, relative, reason)


def _sums(model: onnx.ModelProto) -> Iterator[int]:
    """How many products each output of a layer adds up, for the layers whose weights are constants."""
    shapes = {name: list(tensor.dims) for name, tensor in constants(model).items()}
    for node in model.graph.node:
        weight = shapes.get(node.input[1]) if node.op_type in WEIGHTED else None
        if weight is None:
            continue
        if node.op_type == "Conv":  # (channels, channels of its group, height, width)
            yield math.prod(weight[1:])
        else:
            is_turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            yield weight[-1 if is_turned else -2] if len(weight) > 1 else weight[0]
