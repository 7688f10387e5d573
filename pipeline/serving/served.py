"""A model that is served: proved, warmed up, with the name and version by which clients ask for it."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.files import sha256_of
from pipeline.predictor import NO_PROOF, Predictor, prove

# What of the metadata says where a model comes from.
LINEAGE = ("data_digest", "job_id", "mlflow_run_id", "checkpoint_sha256", "git_commit")
Floats = npt.NDArray[np.float32]


class Answers(NamedTuple):
    """Probabilities (N, K) and logits (N, outputs) of N images."""

    probabilities: Floats
    logits: Floats

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.probabilities)

    @property
    def is_finite(self) -> bool:
        """Whether they are numbers."""
        return bool(np.isfinite(self.probabilities).all() and np.isfinite(self.logits).all())

    def part(self, first: int, last: int) -> "Answers":
        """Those of some of the images."""
        return Answers(self.probabilities[first:last], self.logits[first:last])

    @classmethod
    def joined(cls, parts: list["Answers"]) -> "Answers":
        """Those of several batches, one after the other."""
        return cls(np.concatenate([part.probabilities for part in parts]), np.concatenate([part.logits for part in parts]))


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model with its name and version."""

    predictor: Predictor
    name: str
    version: str
    sha256: str
    facts: dict[str, str]  # what its proof says

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of its input."""
        assert self.predictor.spec.fixed_size is not None
        return self.predictor.spec.fixed_size

    @property
    def class_names(self) -> list[str]:
        """Its K classes."""
        return self.predictor.class_names

    @functools.cached_property
    def head(self) -> dict[str, str]:
        """The model in an answer."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}

    @property
    def is_proved(self) -> bool:
        """Whether a parity report came with it."""
        return self.facts["proof"] != NO_PROOF

    def answer(self, images: npt.NDArray[np.uint8]) -> Answers:
        """Answers to uint8 images (N, 3, H, W)."""
        logits, probabilities = self.predictor.session.run(["logits", "probabilities"], {"image": images})
        return Answers(probabilities, logits)

    def describe(self) -> dict[str, Any]:
        """What people and programs may want to know of it."""
        metadata, (height, width) = self.predictor.metadata, self.size
        return {
            "name": self.name,
            "version": self.version,
            "sha256": self.sha256,
            "task": metadata.get("task", "single"),
            "class_names": self.class_names,
            "input": {"name": "image", "datatype": "UINT8", "shape": [-1, 3, height, width]},
            "preprocess": metadata["preprocess"],
            "precision": self.predictor.precision,
            "license": self.predictor.license,
            "metrics": self.predictor.metrics,
            "lineage": {name: metadata.get(name, "") for name in LINEAGE},
            "versions": metadata["versions"],
            "proof": self.facts.get("proof", ""),
            "replayed": self.facts.get("replayed", ""),
        }


def load_served(path: Path, name: str, version: str, threads: int, max_batch: int) -> ServedModel:
    """Load a model, hold it against its proof, and warm it up. Raises ModelError.

    `version` may be empty: it is then the beginning of the file's sha256.
    """
    sha256 = sha256_of(path)
    predictor = Predictor(path, threads)
    model = ServedModel(predictor, name, version or version_of(sha256), sha256, prove(predictor))
    for number in {1, 2, max_batch}:
        model.answer(np.zeros((number, 3, *model.size), dtype=np.uint8))
    return model


def version_of(sha256: str) -> str:
    """The version of a file that no registry has numbered."""
    return sha256[:12]


def name_of(path: Path) -> str:
    """What to call a model file: its run, where it lies in one, or its folder. Letters that a URL would escape become `-`."""
    parents = path.resolve().parents
    run = next((folder.parent for folder in parents if folder.name == "export"), parents[0])
    return re.sub(r"[^A-Za-z0-9._-]", "-", run.name) or "model"
