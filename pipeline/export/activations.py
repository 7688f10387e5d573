"""What real images do inside of a model: the values that a smaller form must be able to hold.

A newcomer would trust the answers of a float16 model on a CPU. There onnxruntime computes it in float32 and hides every
overflow and underflow. So the size of each activation is looked at, and the model is asked once more with all of them rounded.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import torch

from pipeline.export.diagnosis import Array, max_abs
from pipeline.export.parity import OPTIMIZATIONS, ask_onnx, open_session
from pipeline.export.quantize import LARGEST_FLOAT16, network_tensors, with_rounded_activations
from pipeline.golden import MOST_ABS

# Entropy calibration cuts off a few percent of an activation on purpose.
MOST_CLIPPED = 0.1
LOOK_BATCH = 8  # all activations of a batch lie in memory


def float16_defects(fp32: onnx.ModelProto, half: onnx.ModelProto, images: torch.Tensor) -> Iterator[str]:
    """What float16 arithmetic would do to `images`, uint8 (N, 3, H, W), in `half`, the float16 form of `fp32`."""
    peaks: dict[str, float] = {}
    for name, values in look(fp32, network_tensors(fp32), images):
        peak = float(np.abs(values).max(initial=0.0))
        peaks[name] = max(peaks.get(name, 0.0), math.inf if math.isnan(peak) else peak)
    largest = max(peaks, key=lambda name: peaks[name])
    if not peaks[largest] <= LARGEST_FLOAT16:
        yield (
            f"float16 overflows: on real images `{largest}` reaches {peaks[largest]:.1e}, and float16 ends at "
            f"{LARGEST_FLOAT16:.0f}"
        )
        return
    rounding = with_rounded_activations(fp32)
    sessions = [open_session(model.SerializeToString(), OPTIMIZATIONS["off"]) for model in (rounding, half)]
    found = 0.0
    for first in range(0, len(images), LOOK_BATCH):
        rounded, plain = (ask_onnx(session, images[first : first + LOOK_BATCH]) for session in sessions)
        found = max(found, max_abs({"probabilities": rounded["probabilities"]}, {"probabilities": plain["probabilities"]}))
    if not found <= MOST_ABS["fp16"]:
        yield (
            "float16 keeps too few digits: with each activation rounded to it, as a GPU does, probabilities differ by "
            f"{found:.1e} (at most {MOST_ABS['fp16']:.0e})"
        )


def clipping_defects(fp32: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], images: torch.Tensor) -> Iterator[str]:
    """The activation of `images` of which most lies outside of the range that it was given, by the tensor's name."""
    there = {name for node in fp32.graph.node for name in node.output}
    outside, total = (dict.fromkeys(ranges, 0.0) for _ in range(2))
    lowest, highest = dict.fromkeys(ranges, math.inf), dict.fromkeys(ranges, -math.inf)
    for name, values in look(fp32, [name for name in ranges if name in there], images):
        low, high = ranges[name]
        half_level = (high - low) / 510  # which rounding would bring back
        outside[name] += float(((values < low - half_level) | (values > high + half_level)).sum())
        total[name] += values.size
        lowest[name], highest[name] = min(lowest[name], float(values.min())), max(highest[name], float(values.max()))
    worst = max(ranges, key=lambda name: outside[name] / max(1.0, total[name]), default="")
    if worst and outside[worst] > MOST_CLIPPED * total[worst]:
        low, high = ranges[worst]
        yield (
            f"it was calibrated on images unlike these: {outside[worst] / total[worst]:.0%} of the values of `{worst}`, "
            f"{lowest[worst]:.3g} to {highest[worst]:.3g}, lie outside of its range, {low:.3g} to {high:.3g}"
        )


def look(fp32: onnx.ModelProto, names: list[str], images: torch.Tensor) -> Iterator[tuple[str, Array]]:
    """Names and values of tensors inside the model, some images at a time."""
    if not names:
        return  # onnxruntime would take it for all outputs
    opened = onnx.ModelProto()
    opened.CopyFrom(fp32)
    outputs = {value.name for value in opened.graph.output}
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    session = open_session(opened.SerializeToString(), OPTIMIZATIONS["off"])
    for first in range(0, len(images), LOOK_BATCH):
        batch = images[first : first + LOOK_BATCH].numpy()
        yield from zip(names, session.run(names, {"image": batch}), strict=True)
