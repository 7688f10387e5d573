"""The registered model: every validated ONNX file of a name is one version of it, and says where it came from.

A version is made by the process that delivers a run's journal, which may be killed, or time out and send again, anywhere in
between. So each step first looks for what an earlier try has left: one file of one run makes one version, whatever happens.
"""

import datetime
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import say
from pipeline.errors import RunError
from pipeline.files import sha256_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CANDIDATE, CHAMPION = "candidate", "champion"
LOGGED_NAME = "onnx"
SHA256_TAG = "onnx_sha256"
EXPORTED_TAG = "exported_at"  # the last time, UTC: sorts as text
# models:/NAME/VERSION or models:/NAME@ALIAS
REGISTERED = re.compile(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))")


def register_model(client: "MlflowClient", run_id: str, run_dir: Path, entry: dict[str, Any]) -> str | None:
    """Log the ONNX file that `entry` names as the run's model and register it; return its version.

    `entry` (see `export.publish`): model and example (paths in `run_dir`), name, tags, description, task, metrics, time,
    requirements. A file that is no longer the one that was proved is left out: None. Safe to repeat after any failure.
    """
    path = run_dir / entry["model"]
    if not path.is_file() or sha256_of(path) != entry["tags"][SHA256_TAG]:
        say(f"{path}: is no longer the file that was exported; it is not registered. Run `shardline export` again.")
        return None
    version = _version_of(client, entry["name"], run_id, entry["tags"][SHA256_TAG])
    if version is None:
        logged = _log_once(client, run_id, run_dir, entry)
        _make_registered_model(client, entry)
        version = _make_version(client, run_id, logged, entry)
    _move_candidate(client, version, _utc(entry["time"]))
    return str(version.version)


def _version_of(client: "MlflowClient", name: str, run_id: str, sha256: str) -> "ModelVersion | None":
    """The version that this file of this run has already, the first if a time-out made two."""
    found = client.search_model_versions(f"run_id = '{run_id}'")
    same = [version for version in found if version.name == name and version.tags.get(SHA256_TAG) == sha256]
    return min(same, key=lambda version: int(version.version), default=None)


def _log_once(client: "MlflowClient", run_id: str, run_dir: Path, entry: dict[str, Any]) -> "LoggedModel":
    """The run's logged model of this file. One that a kill left half-made is finished: its files are written again."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run = client.get_run(run_id)
    logged = _find_logged(client, run.info.experiment_id, run_id, entry["tags"][SHA256_TAG])
    if logged is None:
        logged = client.create_logged_model(
            run.info.experiment_id,
            name=LOGGED_NAME,
            source_run_id=run_id,
            tags=entry["tags"],
            params=entry["params"],
            model_type="image-classifier",
        )
    known = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    if logged.model_id not in known:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    if logged.status != LoggedModelStatus.READY:
        _upload(client, run_id, run_dir, logged, entry)
        logged = client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    _log_metrics(client, run_id, logged, entry)
    return logged


def _find_logged(client: "MlflowClient", experiment_id: str, run_id: str, sha256: str) -> "LoggedModel | None":
    from mlflow.entities import LoggedModelStatus

    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    same = [logged for logged in found if logged.tags.get(SHA256_TAG) == sha256]
    return min(same, key=lambda logged: logged.status != LoggedModelStatus.READY, default=None)


def _upload(client: "MlflowClient", run_id: str, run_dir: Path, logged: "LoggedModel", entry: dict[str, Any]) -> None:
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.models import Model

    path = run_dir / entry["model"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        # `mlflow.onnx.log_model` would open a run of its own, end this one, and copy every metric of step 0 to the model.
        mlflow.onnx.save_model(
            onnx.load(path),
            str(target),
            mlflow_model=Model(
                artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id
            ),
            signature=signature_of(path),
            input_example=np.load(run_dir / entry["example"], allow_pickle=False),
            pip_requirements=entry["requirements"],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )
        # It writes the graph anew; what was proved are these bytes.
        shutil.copyfile(path, target / "model.onnx")
        client.log_model_artifacts(logged.model_id, str(target))


def signature_of(path: Path) -> "ModelSignature":
    """What a Shardline model takes and gives, as its own graph states it: `image` uint8 (-1, 3, H, W), outputs (-1, K)."""
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def specs(values: Any) -> Schema:
        return Schema([TensorSpec(np.dtype(_kind(value)), _shape(value), name=value.name) for value in values])

    def _kind(value: Any) -> Any:
        return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)

    def _shape(value: Any) -> tuple[int, ...]:
        return tuple(axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim)

    graph = onnx.load(path, load_external_data=False).graph
    return ModelSignature(inputs=specs(graph.input), outputs=specs(graph.output))


def _log_metrics(client: "MlflowClient", run_id: str, logged: "LoggedModel", entry: dict[str, Any]) -> None:
    """Give the model its figures; they are the run's, too, so nothing else tells them. By its time, each counts once."""
    for key, value in entry["metrics"].items():
        client.log_metric(run_id, key, value, timestamp=entry["time"], step=0, model_id=logged.model_id)


def _make_registered_model(client: "MlflowClient", entry: dict[str, Any]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            entry["name"],
            tags={"task": entry["task"]},
            description=f"Image classifier ({entry['task']}) by Shardline. Every version is an ONNX file that was proved to "
            f"answer as the trained network does. `{CANDIDATE}`: exported last; `{CHAMPION}`: the best (`shardline promote`).",
        )
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise


def _make_version(client: "MlflowClient", run_id: str, logged: "LoggedModel", entry: dict[str, Any]) -> "ModelVersion":
    import mlflow

    # A database that is opened here, without a server, resolves `models:/` by the address of the process, not the client's.
    mlflow.set_tracking_uri(client.tracking_uri)
    run = f"#/experiments/{logged.experiment_id}/runs/{run_id}?workflowType=machine_learning"
    made = client.create_model_version(
        entry["name"],
        source=f"models:/{logged.model_id}",
        run_id=run_id,
        model_id=logged.model_id,
        tags={**entry["tags"], "run_id": run_id, EXPORTED_TAG: _utc(entry["time"])},
        description=f"{entry['description']}\n\n[run]({run})",
    )
    first = _version_of(client, entry["name"], run_id, entry["tags"][SHA256_TAG])
    assert first is not None
    if first.version != made.version:  # a request that had timed out here was served in the end
        client.delete_model_version(made.name, made.version)
    return first


def _move_candidate(client: "MlflowClient", version: "ModelVersion", exported: str) -> None:
    """Point `candidate` to what was exported last: that may be an earlier file again, and what is sent again may be old."""
    if _exported_at(version) < exported:
        client.set_model_version_tag(version.name, version.version, EXPORTED_TAG, exported)
    now = alias_version(client, version.name, CANDIDATE)
    last = (max(_exported_at(version), exported), int(version.version))
    if now is None or (_exported_at(now), int(now.version)) < last:
        client.set_registered_model_alias(version.name, CANDIDATE, version.version)


def _exported_at(version: "ModelVersion") -> str:
    return str(version.tags.get(EXPORTED_TAG) or _utc(version.creation_timestamp))


def _utc(milliseconds: int) -> str:
    moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    return moment.isoformat(timespec="milliseconds")


def require_registered(model: str) -> None:
    """Refuse what is not the name of a registered model. Raises RunError."""
    if REGISTERED.fullmatch(model) is None:
        raise RunError(f"'{model}' names no version: write models:/NAME/VERSION or models:/NAME@ALIAS.")


def version_of(client: "MlflowClient", model: str) -> "ModelVersion":
    """The version that models:/NAME/VERSION or models:/NAME@ALIAS is now. Raises RunError where there is none."""
    from mlflow.exceptions import MlflowException

    match = REGISTERED.fullmatch(model)
    assert match is not None
    name, number, alias = match.groups()
    try:
        return client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise RunError(
            f"{model}: there is no such version at {client.tracking_uri}. Is it the right --tracking.uri? "
            f"(`shardline promote` makes a {CHAMPION}.)"
        ) from error


def download_model(client: "MlflowClient", version: "ModelVersion", folder: Path) -> Path:
    """Bring the ONNX file of a version into `folder`, and return its path."""
    import mlflow

    # A database that is opened here, without a server, resolves `models:/` by the address of the process, not the client's.
    mlflow.set_tracking_uri(client.tracking_uri)
    local = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=str(folder))
    return Path(local) / "model.onnx"


def alias_version(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """The version that an alias points to; None where there is no such alias, or no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
