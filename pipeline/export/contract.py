"""Does an exported file say of itself what is true of the training? Asked of the file alone, not of the network.

Parity compares the file with the trained network, so it cannot see what is wrong with both: an order of classes that is not the
data set's, or a checkpoint whose normalisation is not that of its preprocessing. The normalisation is read off the graph: all
256 levels of each channel are sent through its first nodes and held against the PreprocessSpec.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference

from pipeline.errors import GateError, ModelError
from pipeline.export.graph import PREFIX
from pipeline.export.proto import constants, metadata
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec, spec_from_dict
from pipeline.task import Task

# What may stand between the input and the first layer. A gather could turn the channels round, which is then seen.
BEFORE_LAYERS = ("Cast", "Add", "Sub", "Mul", "Div", "Gather", "Identity")
LEVELS = 256
ROUNDINGS = 16  # of the four operations, and of other ways to write them
CHANNELS = ("red", "green", "blue")
Array = npt.NDArray[Any]


def require_contract(model: onnx.ModelProto, manifest: DatasetManifest, task: Task, spec: PreprocessSpec) -> None:
    """Hold the metadata and the normalisation of `model` against data set, task and preprocessing. Raises GateError."""
    defects = [*_metadata_defects(model, manifest, task, spec), *_normalisation_defects(model, spec)]
    if defects:
        raise GateError(f"the exported file contradicts its training: {'; '.join(defects)}.")


def require_metadata(model: onnx.ModelProto, wanted: dict[str, str]) -> None:
    """Hold all that `model` says of itself against what it was given to say. Raises GateError."""
    found = metadata(model)
    other = sorted(key.removeprefix(PREFIX) for key in found.keys() | wanted if found.get(key) != wanted.get(key))
    if other:
        raise GateError(f"the exported file does not say of itself what it was given to say: {', '.join(other)}.")


def _metadata_defects(model: onnx.ModelProto, manifest: DatasetManifest, task: Task, spec: PreprocessSpec) -> Iterator[str]:
    found = {key.removeprefix(PREFIX): value for key, value in metadata(model).items()}
    try:
        names, own = json.loads(found["class_names"]), spec_from_dict(json.loads(found["preprocess"]))
    except (KeyError, ValueError, ModelError) as error:
        yield f"its metadata cannot be read ({error})"
        return
    if names != manifest.class_names:
        pairs = enumerate(zip(names, manifest.class_names, strict=False))
        place = next((at for at, (name, wanted) in pairs if name != wanted), None)
        if place is None:  # one list begins with the other
            yield f"it has {len(names)} classes, the data set {len(manifest.class_names)}"
        else:
            wanted = manifest.class_names[place]
            yield f"of its {len(names)} classes number {place} is '{names[place]}', that of the data set is '{wanted}'"
    if own != spec or found.get("preprocess_hash") != spec.hash():
        yield "its preprocessing is not that of the training"
    for name, wanted in (("task", task.kind), ("data_digest", manifest.digest)):
        if found.get(name) != wanted:
            yield f"its {name} is {found.get(name)}, not {wanted}"
    for output, wanted_size in (("logits", task.num_outputs), ("probabilities", task.num_classes)):
        sizes = [value.type.tensor_type.shape.dim[1].dim_value for value in model.graph.output if value.name == output]
        if sizes != [wanted_size]:
            yield f"`{output}` has {sizes[0] if sizes else 'no'} values an image, not {wanted_size}"


def _normalisation_defects(model: onnx.ModelProto, spec: PreprocessSpec) -> Iterator[str]:
    assert spec.fixed_size is not None
    levels = _all_levels(*spec.fixed_size)  # (n, 3, H, W)
    mean, std = (np.array(numbers, np.float64)[:, None, None] for numbers in (spec.mean, spec.std))
    wanted = (levels.astype(np.float64) / spec.scale - mean) / std
    found = [tensor for tensor in _before_layers(model, levels) if tensor.shape == levels.shape and tensor.dtype.kind == "f"]
    if not found:
        yield "no normalisation follows its input"
        return
    if any(_is_near(tensor, wanted, spec) for tensor in found):
        return
    turned = (levels[:, ::-1].astype(np.float64) / spec.scale - mean) / std
    if any(_is_near(tensor, turned, spec) or _is_near(tensor, wanted[:, ::-1], spec) for tensor in found):
        yield "its channels are swapped: it takes blue for red"
        return
    nearest = min(found, key=lambda tensor: float(np.abs(tensor - wanted).max()))
    worst = np.unravel_index(int(np.abs(nearest - wanted).argmax()), wanted.shape)
    yield (
        f"its normalisation is not that of its preprocessing: level {levels[worst]} of {CHANNELS[worst[1]]} becomes "
        f"{float(nearest[worst]):.4f}, not {wanted[worst]:.4f}"
    )


def _is_near(found: Array, wanted: Array, spec: PreprocessSpec) -> bool:
    eps = float(np.finfo(found.dtype).eps)
    allowed = ROUNDINGS * eps * (1 + max(map(abs, spec.mean))) / min(map(abs, spec.std))
    return bool((np.abs(found.astype(np.float64) - wanted) <= allowed).all())


def _all_levels(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Images (n, 3, H, W) that show each channel every level, and no two channels the same one."""
    number = -(-LEVELS // (height * width))
    ramp = np.arange(number * height * width).reshape(number, 1, height, width)
    return np.asarray((ramp + np.array([0, 85, 170]).reshape(1, 3, 1, 1)) % LEVELS, dtype=np.uint8)


def _before_layers(model: onnx.ModelProto, images: npt.NDArray[np.uint8]) -> Iterator[Array]:
    """What becomes of the images node by node, up to the first layer: where one value goes on, together with constants."""
    known, name = constants(model), "image"
    values: dict[str, Any] = {"image": images}
    while True:
        following = [node for node in model.graph.node if name in node.input and node.op_type != "Shape"]
        if len(following) != 1 or following[0].op_type not in BEFORE_LAYERS:
            return
        (node,) = following
        others = [other for other in node.input if other != name]
        if any(other not in known for other in others):
            return
        feeds = values | {other: onnx.numpy_helper.to_array(known[other]) for other in others}
        evaluator = onnx.reference.ReferenceEvaluator(node, opsets={"": model.opset_import[0].version})
        (value,) = evaluator.run(None, {name: feeds[name] for name in node.input})
        name = node.output[0]
        values = {name: value}
        yield np.asarray(value)
