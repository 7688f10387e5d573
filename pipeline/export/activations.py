"""What real images do inside of the float32 model: the values that a smaller form must be able to hold.

A newcomer would trust the answers of a float16 model on a CPU. There onnxruntime computes it in float32 and hides every
overflow, so the range of each activation is looked at instead.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import torch

from pipeline.export.diagnosis import Array
from pipeline.export.parity import OPTIMIZATIONS, open_session
from pipeline.export.quantize import LARGEST_FLOAT16, network_tensors

SMALLEST_FLOAT16 = 2.0**-14  # below it digits are lost
# Entropy calibration cuts off a few percent of an activation on purpose.
MOST_CLIPPED = 0.1
LOOK_BATCH = 8  # all activations of a batch lie in memory


def float16_defects(fp32: onnx.ModelProto, images: torch.Tensor) -> Iterator[str]:
    """Activations of `images`, uint8 (N, 3, H, W), that float16 cannot hold."""
    peaks: dict[str, float] = {}
    for name, values in look(fp32, network_tensors(fp32), images):
        peaks[name] = max(peaks.get(name, 0.0), float(np.abs(values).max(initial=0.0)))
    largest = max(peaks, key=lambda name: peaks[name])
    if not peaks[largest] <= LARGEST_FLOAT16:
        yield (
            f"float16 overflows: on real images `{largest}` reaches {peaks[largest]:.1e}, and float16 ends at "
            f"{LARGEST_FLOAT16:.0f}"
        )
    alive = {name: peak for name, peak in peaks.items() if peak > 0}
    smallest = min(alive, key=lambda name: alive[name], default="")
    if smallest and alive[smallest] < SMALLEST_FLOAT16:
        yield (
            f"float16 underflows: on real images `{smallest}` is at most {alive[smallest]:.1e}, and float16 loses digits "
            f"below {SMALLEST_FLOAT16:.0e}"
        )


def clipping_defects(fp32: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], images: torch.Tensor) -> Iterator[str]:
    """The activation of `images` of which most lies outside of the range that it was given, by the tensor's name."""
    there = {name for node in fp32.graph.node for name in node.output}
    outside, total, lowest, highest = (dict.fromkeys(ranges, 0.0) for _ in range(4))
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
