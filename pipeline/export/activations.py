"""What real images do inside of a model: the values that a smaller form must be able to hold.

A newcomer would trust the answers of a float16 model on a CPU. There onnxruntime computes it in float32 and hides every
overflow and underflow. So the size of each activation is looked at, and the model is asked once more with all of them rounded.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
import onnxruntime
import torch

from pipeline.export.diagnosis import Array, max_abs
from pipeline.export.parity import OPTIMIZATIONS, ask_onnx, open_session
from pipeline.export.quantize import LARGEST_FLOAT16, network_tensors, with_rounded_activations
from pipeline.golden import MOST_ABS

# Entropy calibration cuts off a few percent of an activation on purpose.
MOST_CLIPPED = 0.1
LOOK_BATCH = 8  # all activations of a batch lie in memory
NUM_ROUNDED = 64  # images that are asked with rounded activations


def float16_defects(fp32: onnx.ModelProto, half: onnx.ModelProto, batches: Iterable[torch.Tensor]) -> Iterator[str]:
    """What float16 arithmetic would do to images, batches of uint8 (N, 3, H, W), in `half`, the float16 form of `fp32`."""
    peaks: dict[str, float] = {}
    rounding = with_rounded_activations(fp32)
    sessions = [open_session(model.SerializeToString(), OPTIMIZATIONS["off"]) for model in (rounding, half)]
    found, num_rounded = 0.0, 0
    names = network_tensors(fp32)
    looking = opened(fp32, names)
    for images in batches:
        for name, values in look(looking, names, images):
            peak = float(np.abs(values).max(initial=0.0))
            peaks[name] = max(peaks.get(name, 0.0), math.inf if math.isnan(peak) else peak)
        if num_rounded < NUM_ROUNDED:
            num_rounded += len(images)
            rounded, plain = ({"probabilities": ask_onnx(session, images)["probabilities"]} for session in sessions)
            found = max(found, max_abs(rounded, plain))
    largest = max(peaks, key=lambda name: peaks[name])
    if not peaks[largest] <= LARGEST_FLOAT16:
        yield (
            f"float16 overflows: on real images `{largest}` reaches {peaks[largest]:.1e}, and float16 ends at "
            f"{LARGEST_FLOAT16:.0f}"
        )
        return
    if not found <= MOST_ABS["fp16"]:
        yield (
            "float16 keeps too few digits: with each activation rounded to it, as a GPU does, probabilities differ by "
            f"{found:.1e} (at most {MOST_ABS['fp16']:.0e})"
        )


def clipping_defects(
    fp32: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], batches: Iterable[torch.Tensor]
) -> Iterator[str]:
    """The activation of images, batches of uint8 (N, 3, H, W), of which most lies outside of its range, by its name."""
    there = {name for node in fp32.graph.node for name in node.output}
    outside, total = (dict.fromkeys(ranges, 0.0) for _ in range(2))
    lowest, highest = dict.fromkeys(ranges, math.inf), dict.fromkeys(ranges, -math.inf)
    names = [name for name in ranges if name in there]
    looking = opened(fp32, names)
    for name, values in itertools.chain.from_iterable(look(looking, names, images) for images in batches):
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


def opened(fp32: onnx.ModelProto, names: list[str]) -> onnxruntime.InferenceSession:
    """A session of the model that gives tensors inside of it, too."""
    model = onnx.ModelProto()
    model.CopyFrom(fp32)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    return open_session(model.SerializeToString(), OPTIMIZATIONS["off"])


def look(session: onnxruntime.InferenceSession, names: list[str], images: torch.Tensor) -> Iterator[tuple[str, Array]]:
    """Names and values of tensors inside a model that was `opened` for them."""
    if names:  # onnxruntime would take none for all outputs
        yield from zip(names, session.run(names, {"image": images.numpy()}), strict=True)
