"""Keeps a copy of a registered model, and a pointer to it, for a server that must not import MLflow.

`python -m pipeline.tracking.follow URI EXPERIMENT ARTIFACTS MODEL SECONDS POINTER` asks every so many seconds which version
models:/NAME@ALIAS is, brings a new one beside POINTER, and then replaces POINTER as a whole. It ends when its standard input
does: whoever started it has ended, in whatever way. A server that is away later on changes nothing but a line in the log.
"""

import contextlib
import json
import select
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import say
from pipeline.errors import ModelError, RunError, ShardlineError
from pipeline.files import sha256_of, write_json
from pipeline.golden import GOLDEN
from pipeline.tracking.deliver import describe_trouble
from pipeline.tracking.registry import SHA256_TAG, download_model, version_of
from pipeline.tracking.server import Server, client_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PARITY = "parity.json"
# Whoever reads the pointer may still be loading the version before.
NUM_KEPT = 2


class Follower:
    """Follows `model` (models:/NAME@ALIAS or models:/NAME/VERSION) and keeps `pointer` to its newest copy."""

    def __init__(self, server: Server, model: str, pointer: Path) -> None:
        self.server, self.model, self.pointer = server, model, pointer
        self.client: MlflowClient | None = None
        self.current: tuple[str, str] | None = None  # version and sha256 that the pointer names
        self.copies: list[Path] = []
        self.trouble = ""

    def look(self) -> None:
        """Bring a new version, if the alias has moved. Raises RunError or ModelError, one line, when that cannot be done."""
        from mlflow.exceptions import MlflowException

        try:
            self.client = self.client or client_of(self.server)
            version = version_of(self.client, self.model)
            if (str(version.version), str(version.tags.get(SHA256_TAG, ""))) != self.current:
                self._bring(self.client, version)
        except (MlflowException, ConnectionError, TimeoutError) as error:
            raise RunError(f"{describe_trouble(error, self.server.uri)}. Is it up, and the right --tracking.uri?") from error

    def _bring(self, client: "MlflowClient", version: "ModelVersion") -> None:
        self.pointer.parent.mkdir(parents=True, exist_ok=True)
        # Never a folder of before: a pointer that a follower before this one left may name it, and workers read it.
        folder = Path(tempfile.mkdtemp(prefix=f"version-{version.version}-", dir=self.pointer.parent))
        tagged = str(version.tags.get(SHA256_TAG, ""))
        try:
            path = download_model(client, version, folder)
            if not path.is_file() or tagged not in ("", sha256_of(path)):
                raise ModelError(f"{self.model}: version {version.version} holds no model.onnx of the sha256 that it names.")
            _bring_proof(client, version, path)
            write_json(self.pointer, {"path": str(path), "name": version.name, "version": str(version.version)})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.current = (str(version.version), tagged)
        self.copies.append(folder)
        for old in self.copies[:-NUM_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def look_again(self) -> None:
        """As `look`, but trouble is only told, once, and so is its end."""
        try:
            self.look()
        except (ShardlineError, OSError) as error:
            if not self.trouble:
                say(f"serve: {error} The model that is there goes on.")
            self.trouble = str(error)
        else:
            if self.trouble:
                say(f"serve: {self.model} is followed again")
            self.trouble = ""


def _bring_proof(client: "MlflowClient", version: "ModelVersion", path: Path) -> None:
    """Put the parity report and the golden vectors of the run beside the model, if they are of this very file."""
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException, OSError, ValueError, KeyError, TypeError):
        folder = path.parent / "proof"
        folder.mkdir()
        parity_path = Path(client.download_artifacts(str(version.run_id), f"export/{PARITY}", str(folder)))
        parity = json.loads(parity_path.read_text())
        if parity["sha256"] != sha256_of(path):
            return  # of a later export
        golden_path = Path(client.download_artifacts(str(version.run_id), f"export/{GOLDEN}", str(folder)))
        if parity["golden_sha256"] == sha256_of(golden_path):
            golden_path.replace(path.with_name(GOLDEN))
        parity_path.replace(path.with_name(PARITY))


def main(arguments: list[str]) -> int:
    """Follow until standard input ends; the exit code. The first look must succeed."""
    *server, model, seconds, pointer = arguments
    follower = Follower(Server.from_arguments(server), model, Path(pointer))
    try:
        follower.look()
    except ModuleNotFoundError as error:
        extra = "tracking" if follower.server.artifacts is None else "train"  # a database needs all of MLflow
        needed = f"{model} needs the package {error.name}, which is not installed here"
        return _fail(f"{needed}: pip install 'shardline[{extra}]'.", 2)
    except ShardlineError as error:
        return _fail(str(error), error.exit_code)
    while not select.select([sys.stdin], [], [], float(seconds))[0]:
        follower.look_again()
    shutil.rmtree(follower.pointer.parent, ignore_errors=True)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"shardline: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
