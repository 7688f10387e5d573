"""From a trained network to an ONNX model: input `image` uint8 (batch, 3, H, W), outputs `logits` and `probabilities`.

A module left in training mode exports its dropout, and onnxruntime's optimiser hides that from a parity test; so
evaluation mode is forced here, and the finished graph is linted for it.
"""

import contextlib
import json
from collections.abc import Iterator

import onnx
import torch
from torch import nn

from pipeline.export.proto import nodes, parts
from pipeline.preprocess import PreprocessSpec
from pipeline.task import Task

PREFIX = "shardline."
BATCH = "batch"  # the name of the axis


class Answers(nn.Module):
    """The trained network with its logits (N, num_outputs) and, for people, the probabilities of all classes (N, K)."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities of uint8 images (N, 3, H, W)."""
        logits = self.network(image)
        return logits, self.task.probabilities(logits)


def export_graph(
    network: nn.Module, task: Task, spec: PreprocessSpec, opset: int, metadata: dict[str, object]
) -> onnx.ModelProto:
    """Return the ONNX model of `network`, with `metadata` under `shardline.` and nothing of the machine that built it."""
    assert spec.fixed_size is not None
    example = torch.zeros(2, 3, *spec.fixed_size, dtype=torch.uint8)
    with evaluating(network) as plain:
        program = torch.onnx.export(
            Answers(plain, task).eval(),
            (example,),
            dynamo=True,
            input_names=["image"],
            output_names=["logits", "probabilities"],
            dynamic_shapes=({0: torch.export.Dim(BATCH)},),
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    strip_building_machine(model)
    _drop_idle_ceil_mode(model)
    model.producer_name = "shardline"
    model.producer_version = ""
    onnx.helper.set_model_props(model, {f"{PREFIX}{key}": as_text(value) for key, value in metadata.items()})
    return model


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """`network`, not compiled, on the CPU in evaluation mode; afterwards it is where and each module as it was."""
    plain = getattr(network, "_orig_mod", network)  # of torch.compile(network)
    modes = {module: module.training for module in plain.modules()}
    device = next((tensor.device for tensor in [*plain.parameters(), *plain.buffers()]), torch.device("cpu"))
    try:
        yield plain.cpu().eval()
    finally:
        plain.to(device)
        for module, is_training in modes.items():
            module.training = is_training


def as_text(value: object) -> str:
    """A value as metadata hold it: text as it is, and JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def strip_building_machine(model: onnx.ModelProto) -> None:
    """Remove the stack traces and source paths that the exporter notes on nodes, values, tensors and functions."""
    for part in parts(model):
        for name in ("doc_string", "metadata_props"):
            if name in part.DESCRIPTOR.fields_by_name:
                part.ClearField(name)


def _drop_idle_ceil_mode(model: onnx.ModelProto) -> None:
    """Leave out the rounding of pools that move by 1 and so have nothing to round (GoogLeNet).

    Runtimes disagree about it: onnx 1.23's own evaluator pads such a pool's answer by two rows.
    """
    for node in nodes(model):
        strides = next((list(entry.ints) for entry in node.attribute if entry.name == "strides"), [1])
        if node.op_type in ("MaxPool", "AveragePool") and set(strides) == {1}:
            kept = [entry for entry in node.attribute if entry.name != "ceil_mode"]
            del node.attribute[:]
            node.attribute.extend(kept)
