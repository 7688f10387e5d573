"""Labels for images from an ONNX file alone: it carries its class names and preprocessing in its metadata.

onnxruntime, numpy and Pillow are all that is needed; nothing here may import torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, ModelError
from pipeline.files import sha256_of
from pipeline.golden import GOLDEN, GoldenVectors, compare_golden, require_golden
from pipeline.manifest import FORMAT_VERSION
from pipeline.preprocess import Pixels, PreprocessSpec, decode_image, spec_from_dict

PREFIX = "shardline."
NO_PROOF = "no parity.json beside it"
Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """The answer to an image: its class; where an image has several labels, every one of probability 0.5 or more."""

    labels: list[str]  # the most probable first
    probabilities: dict[str, float]  # of every class

    @property
    def label(self) -> str:
        """The most probable class."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.probabilities[self.label]


class Predictor:
    """A loaded model. Raises ModelError when the file is not a Shardline model.

    `threads` are those of a server's session, which must not spin between two requests; by default onnxruntime decides.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime  # 0.3 s that no --help should pay

        if not path.is_file():
            raise ModelError(f"{path}: no such model file. `shardline export` makes one.")
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime has no common base for its errors
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{path}: cannot be loaded as an ONNX model ({reason}).") from error
        self.path = path
        self.metadata = self._read_metadata()
        self._require_signature()
        self.class_names = self._read_classes()
        self.is_multi = self.metadata.get("task") == "multi"
        # Files of before these were written say nothing of them.
        self.precision: str = self.metadata.get("precision", "fp32")
        self.license: str = self.metadata.get("license", "")
        self.metrics: dict[str, Any] = self.metadata["metrics"]  # of the evaluation before the export
        self.spec: PreprocessSpec = spec_from_dict(self.metadata["preprocess"])
        if self.spec.hash() != self.metadata.get("preprocess_hash"):
            raise ModelError(f"{path}: its preprocessing was changed after export: the hash differs. Export it again.")

    def _read_metadata(self) -> dict[str, Any]:
        found = self.session.get_modelmeta().custom_metadata_map
        try:
            version = int(found[f"{PREFIX}format_version"])
            if version > FORMAT_VERSION:
                raise ModelError(
                    f"{self.path}: format_version {version} is newer than {FORMAT_VERSION}, which this Shardline reads. "
                    "Upgrade it."
                )
            values: dict[str, Any] = {key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)}
            for name in ("class_names", "preprocess", "versions"):
                values[name] = json.loads(values[name])
            values["metrics"] = json.loads(values.get("metrics", "{}"))
        except (KeyError, ValueError) as error:
            raise ModelError(f"{self.path}: is not a Shardline model: its metadata lacks {error}.") from error
        return values

    def _read_classes(self) -> list[str]:
        names = self.metadata["class_names"]
        (number,) = {output.shape[1] for output in self.session.get_outputs() if output.name == "probabilities"}
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or number not in (len(names), None):
            raise ModelError(f"{self.path}: its class names are not those of its {number} answers. Export it again.")
        return names

    def _require_signature(self) -> None:
        inputs = [item.name for item in self.session.get_inputs()]
        outputs = [item.name for item in self.session.get_outputs()]
        if inputs != ["image"] or "probabilities" not in outputs:
            raise ModelError(
                f"{self.path}: takes {inputs} and gives {outputs}; a Shardline model takes `image` and gives `probabilities`."
            )

    def probabilities(self, images: list[Pixels]) -> Probabilities:
        """Class probabilities, (N, K), of preprocessed images, each uint8 (H, W, 3)."""
        batch = np.stack(images).transpose(0, 3, 1, 2)  # (N, 3, H, W)
        (probabilities,) = self.session.run(["probabilities"], {"image": np.ascontiguousarray(batch)})
        return np.asarray(probabilities, dtype=np.float32)

    def predict(self, path: Path) -> Prediction:
        """Classify one image file. Raises DataError when it is missing or cannot be decoded."""
        try:
            pixels = decode_image(path.read_bytes(), self.spec)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such image.") from error
        except IsADirectoryError as error:
            raise DataError(f"{path}: is a folder; name image files.") from error
        except OSError as error:  # not allowed, or a name that no file can have
            raise DataError(f"{str(path)[:200]}: cannot be read ({error.strerror}).") from error
        except DataError as error:
            raise DataError(f"{path}: cannot be decoded ({error}).") from error
        row = self.probabilities([pixels])[0]  # (K,)
        if not np.isfinite(row).all():
            raise DataError(f"{path}: the model has no finite answer to it.")
        by_class = {name: float(value) for name, value in zip(self.class_names, row, strict=True)}
        chosen = np.flatnonzero(row >= 0.5) if self.is_multi else np.array([row.argmax()])
        labels = [self.class_names[number] for number in chosen[np.argsort(-row[chosen], kind="stable")]]
        return Prediction(labels, by_class)


def verify_model(path: Path) -> dict[str, str]:
    """Load a model, compare it with the parity report beside it, and let it answer once. Raises ModelError.

    Returns facts for people: classes, input, the training it came from.
    """
    return prove(Predictor(path))


def prove(predictor: Predictor) -> dict[str, str]:
    """What `verify_model` does with a model that is loaded."""
    path, spec, metadata = predictor.path, predictor.spec, predictor.metadata
    proof = NO_PROOF
    parity_path = path.with_name("parity.json")
    if parity_path.is_file():
        proof = _require_proof(path, parity_path)
    replayed = f"no {GOLDEN} beside it"
    if path.with_name(GOLDEN).is_file():
        replayed = _replay(predictor, path.with_name(GOLDEN))
    assert spec.fixed_size is not None
    empty = np.zeros((*spec.fixed_size, 3), dtype=np.uint8)
    answer = predictor.probabilities([empty, empty])  # (2, K)
    are_probabilities = ((answer >= 0) & (answer <= 1)).all()
    if not predictor.is_multi:
        are_probabilities &= np.allclose(answer.sum(axis=1), 1.0, rtol=0, atol=1e-3)
    if answer.shape != (2, len(predictor.class_names)) or not are_probabilities:
        raise ModelError(f"{path}: does not answer with one probability for each of its classes.")
    return {
        "labels an image": "several" if predictor.is_multi else "one",
        "classes": f"{len(predictor.class_names)}: {', '.join(predictor.class_names[:10])}",
        "input": f"{spec.fixed_size[0]} x {spec.fixed_size[1]} RGB",
        "precision": predictor.precision,
        **_accuracy_of(path, predictor.metrics, predictor.precision),
        "proof": proof,
        "replayed": replayed,
        "licence": predictor.license or "not stated",
        "data set": str(metadata.get("data_digest", ""))[:12],
        "job": str(metadata.get("job_id", "")),
    }


def _accuracy_of(path: Path, metrics: Any, precision: str) -> dict[str, str]:
    """What the evaluation of the trained network measured; nothing where the model was exported without one."""
    if metrics == {}:
        return {}
    whose = "" if precision == "fp32" else " (of the trained network)"  # a smaller form may lose some of it
    try:
        return {"accuracy": f"{metrics['accuracy']:.4f} on {metrics['num_samples']:,} images of {metrics['split']}{whose}"}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its metrics cannot be read ({error}). Export it again.") from error


def _replay(predictor: Predictor, golden_path: Path) -> str:
    """Decode and answer the golden vectors on this machine. Raises ModelError when it does otherwise than the exporting one."""
    golden = GoldenVectors.read(golden_path)
    fits = golden.probabilities.shape[1] == len(predictor.class_names)
    if not fits or golden.pixels.shape[1:3] != predictor.spec.fixed_size:
        raise ModelError(f"{golden_path}: belongs to another model. Export the model again.")
    answers = predictor.probabilities([*golden.pixels])  # (N, K)
    return require_golden(predictor.path, compare_golden(golden, predictor.spec, answers), predictor.precision)


def _require_proof(path: Path, parity_path: Path) -> str:
    """What the parity report says of the model, in words. Raises ModelError when it proves nothing, or another file."""
    try:
        parity = json.loads(parity_path.read_text())
        passed, sha256 = parity["passed"], parity["sha256"]
        proof = f"top-1 agreement {parity['top1_agreement']:.4f} on {parity['num_samples']:,} images"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{parity_path}: is not a parity report ({error}). Export the model again.") from error
    if passed is not True:
        raise ModelError(f"{path}: did not pass its parity test ({parity_path}). Export it again.")
    golden_path = path.with_name(GOLDEN)
    if parity.get("golden_sha256") and golden_path.is_file() and parity["golden_sha256"] != sha256_of(golden_path):
        raise ModelError(f"{golden_path}: is not the file that was exported with the model. Export it again.")
    if sha256 != sha256_of(path):
        raise ModelError(f"{path}: is not the file that {parity_path} proved: its sha256 differs. Export it again.")
    return proof
