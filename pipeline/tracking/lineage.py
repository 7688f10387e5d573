"""`shardline lineage`: from a model back to its data, each link held against what the others say of it.

data set -> run.json -> MLflow run -> checkpoint -> parity.json -> ONNX file -> version in the registry. The metadata inside an
ONNX file says all of it, and counts as soon as the file is proved to be the one that was exported; so a link that was changed
stands out alone. The data set itself is verified by the verb: reading shards belongs to another stage.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import Config
from pipeline.errors import GateError, ModelError, RunError
from pipeline.files import sha256_of
from pipeline.run import RUN_NAME, RunRecord
from pipeline.tracking.deliver import describe_trouble
from pipeline.tracking.provenance import JOB_TAG
from pipeline.tracking.registry import SHA256_TAG, download_model, require_registered, version_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

State = Literal["verified", "not reachable", "BROKEN"]
COLOURS: dict[State, str] = {"verified": "green", "not reachable": "yellow", "BROKEN": "red"}
MODEL, PARITY = "export/model.onnx", "export/parity.json"
# What the metadata of the file, run.json and the version's tags say alike.
FACTS = ("data_digest", "job_id", "checkpoint_sha256")


@dataclass(frozen=True)
class Link:
    """One link of the chain: `what` says what was looked at, and what is wrong with it."""

    name: str
    state: State
    what: str


@dataclass
class Chain:
    """What could be reached of a model's past."""

    path: Path
    version: "ModelVersion | None" = None  # of the registry
    by_version: bool = False  # asked for by its version, not by its file
    run_dir: Path | None = None
    record: RunRecord | None = None
    trouble: str = ""  # why the server was not asked
    mlflow_run: str = ""
    mlflow_job: str | None = None  # the job that the MLflow run says it is of
    metadata: dict[str, str] = field(default_factory=dict)
    sha256: str = ""  # of the file that is there

    @property
    def recorded_sha256(self) -> str:
        """The ONNX file that run.json says was exported last."""
        return str(self._outputs().get(MODEL, ""))

    def _outputs(self) -> dict[str, str]:
        return dict(self.record.stages.get("export", {}).get("outputs", {})) if self.record is not None else {}

    @property
    def recorded_parity(self) -> str:
        """The parity report that run.json says the export left."""
        return str(self._outputs().get(PARITY, ""))

    @property
    def claims(self) -> list[str]:
        """What the file's sha256 should be, by those who know, the nearest first."""
        tagged = self.version.tags.get(SHA256_TAG, "") if self.version is not None else ""
        found = [tagged, self.recorded_sha256] if self.by_version else [self.recorded_sha256, tagged]
        return [claim for claim in found if claim] or [claim for claim in [_proved_sha256(self.parity_path)] if claim]

    @property
    def parity_path(self) -> Path:
        """The parity report beside the file, or in the run folder."""
        return self.path.with_name("parity.json") if self.run_dir is None else self.run_dir / PARITY

    @property
    def is_own_file(self) -> bool:
        """Whether it lies where its run's last export put it."""
        return self.run_dir is not None and self.path.resolve() == (self.run_dir / MODEL).resolve()

    @property
    def is_exported_file(self) -> bool:
        """Whether the file is proved to be the one that was exported. The run's own must be the last that was."""
        return self.sha256 in (self.claims[:1] if self.is_own_file else self.claims)

    @property
    def exported_sha256(self) -> str:
        """The file that this chain is about, whatever lies there now."""
        return self.sha256 if self.is_exported_file or not self.claims else self.claims[0]

    @property
    def facts(self) -> dict[str, str]:
        """Data set, job and checkpoint, by the most trustworthy source that was reached."""
        if self.is_exported_file or (self.record is None and self.version is None):
            return {name: self.metadata.get(name, "") for name in FACTS}
        if self.record is not None:
            best = str(self.record.best["sha256"]) if self.record.best else ""
            return dict(zip(FACTS, (self.record.data_digest, self.record.job_id, best), strict=True))
        assert self.version is not None
        return {name: self.version.tags.get(name, "") for name in FACTS}


def find_chain(model: str, config: Config, client: "MlflowClient | None", trouble: str, folder: Path) -> Chain:
    """Reach what there is of the past of `model`: a file, models:/NAME/VERSION or models:/NAME@ALIAS.

    A registered one is downloaded into `folder`. `trouble` says why there is no `client`. Raises ModelError or RunError where
    there is no such model, or it is none of ours.
    """
    registered = model.startswith("models:")
    chain = _registered(model, client, trouble, folder) if registered else Chain(Path(model), trouble=trouble)
    if not chain.path.is_file():
        raise ModelError(f"{model}: no such model file. `shardline export` makes one.")
    chain.sha256, chain.metadata = sha256_of(chain.path), _metadata_of(chain.path)
    tags = chain.version.tags if chain.version is not None else {}
    chain.run_dir = _run_dir_of(chain, Path(config.runs_dir), chain.metadata.get("job_id") or tags.get("job_id", ""))
    chain.record = RunRecord.load(chain.run_dir) if chain.run_dir is not None else None
    if client is not None:
        _ask_server(chain, config, client)
    if not chain.metadata.get("job_id") and not chain.claims:
        raise ModelError(
            f"{model}: is no model of `shardline export`: neither it nor anything that was reached says of which run."
        )
    return chain


def _registered(model: str, client: "MlflowClient | None", trouble: str, folder: Path) -> Chain:
    require_registered(model)
    if client is None:
        raise RunError(f"{model}: {trouble}")
    version = version_of(client, model)
    return Chain(download_model(client, version, folder), version, by_version=True)


def _metadata_of(path: Path) -> dict[str, str]:
    """What a Shardline model says of itself; nothing where the file is not even ONNX any more."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf's own, which has no type
        return {}
    return {entry.key.removeprefix("shardline."): entry.value for entry in model.metadata_props}


def _run_dir_of(chain: Chain, runs_dir: Path, job_id: str) -> Path | None:
    """The run folder that the file lies in, or that of the job among all runs, also those that were moved aside."""
    own = chain.path.resolve().parent.parent
    if not chain.by_version and (own / RUN_NAME).is_file():
        return own
    for path in sorted(runs_dir.glob(f"*/{RUN_NAME}")):
        try:
            if json.loads(path.read_text())["job_id"] == job_id:
                return path.parent
        except (ValueError, KeyError, TypeError):
            continue  # not this run's
    return None


def _ask_server(chain: Chain, config: Config, client: "MlflowClient") -> None:
    """Reach MLflow's run and, of a file, its version. A server that fails is a link that cannot be reached."""
    from mlflow.exceptions import MlflowException

    try:
        chain.mlflow_run = _mlflow_run_of(chain, config, client)
        if not chain.mlflow_run:
            return
        if chain.version is None:
            chain.version = _version_of_file(chain, client)
        chain.mlflow_job = client.get_run(chain.mlflow_run).data.tags.get(JOB_TAG, "")
    except (MlflowException, OSError) as error:
        if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
            chain.trouble = describe_trouble(error, client.tracking_uri)


def _mlflow_run_of(chain: Chain, config: Config, client: "MlflowClient") -> str:
    if chain.version is not None:
        return str(chain.version.run_id)
    known = chain.record.mlflow["run_id"] if chain.record is not None else chain.metadata.get("mlflow_run_id")
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if known or experiment is None:
        return known or ""
    query = f"tags.`{JOB_TAG}` = '{chain.facts['job_id']}'"
    found = client.search_runs([experiment.experiment_id], query, max_results=1)
    return str(found[0].info.run_id) if found else ""


def _version_of_file(chain: Chain, client: "MlflowClient") -> "ModelVersion | None":
    """The version of this very file, or of the one that should be here; without a run folder to tell, the latest of the run."""
    found = sorted(client.search_model_versions(f"run_id = '{chain.mlflow_run}'"), key=lambda each: -int(each.version))
    for sha256 in [chain.exported_sha256] if chain.is_own_file else [chain.sha256, chain.exported_sha256]:
        for version in found:
            if sha256 in (version.tags.get(SHA256_TAG), _logged_sha256(version, client)):
                return version
    return found[0] if found and chain.record is None else None


def _logged_sha256(version: "ModelVersion", client: "MlflowClient") -> str:
    """What the logged model below a version says its file is: where the version's own tag was changed, this one tells."""
    model_id = str(version.source).removeprefix("models:/")
    return str(client.get_logged_model(model_id).tags.get(SHA256_TAG, "")) if model_id.startswith("m-") else ""


# ---- the links ----


def check_links(chain: Chain) -> list[Link]:
    """Every link after the data set, in the order of the chain."""
    return [
        _run_link(chain),
        _mlflow_link(chain),
        _checkpoint_link(chain),
        _parity_link(chain),
        _file_link(chain),
        _version_link(chain),
    ]


def compared(name: str, where: object, pairs: dict[str, tuple[Any, Any]]) -> Link:
    """A link that is verified if each (found, expected) is the same."""
    wrong = [
        f"{what} is {_short(found)}, expected {_short(wanted)}" for what, (found, wanted) in pairs.items() if found != wanted
    ]
    shown = ", ".join(f"{what} {_short(found)}" for what, (found, _) in pairs.items())
    return Link(name, "BROKEN", f"{where}: {'; '.join(wrong)}") if wrong else Link(name, "verified", f"{where}: {shown}")


def _short(value: Any) -> str:
    return str(value)[:12] if value not in ("", None) else "missing"


def _run_link(chain: Chain) -> Link:
    if chain.record is None or chain.run_dir is None:
        return Link("run", "not reachable", f"no run folder of job {_short(chain.facts['job_id'])} here")
    digest = chain.record.data_digest
    if chain.facts["data_digest"] in (identity[1] for identity in chain.record.earlier):
        digest = chain.facts["data_digest"]  # that the run went on from, with --allow-changes
    pairs = {"job": (chain.record.job_id, chain.facts["job_id"]), "data set": (digest, chain.facts["data_digest"])}
    return compared("run", chain.run_dir / RUN_NAME, pairs)


def _mlflow_link(chain: Chain) -> Link:
    if chain.mlflow_job is None:
        return Link("MLflow run", "not reachable", chain.trouble or "the run is not there; `shardline sync RUN` delivers it")
    return compared("MLflow run", chain.mlflow_run, {"job": (chain.mlflow_job, chain.facts["job_id"])})


def _checkpoint_link(chain: Chain) -> Link:
    if chain.record is None or chain.run_dir is None or chain.record.best is None:
        return Link("checkpoint", "not reachable", "no run folder, or no finished training in it")
    path, wanted = chain.run_dir / str(chain.record.best["path"]), chain.facts["checkpoint_sha256"]
    if not path.is_file():
        return Link("checkpoint", "not reachable", f"{path}: is gone")
    found = sha256_of(path)
    if chain.record.earlier and found == chain.record.best["sha256"] != wanted:
        return Link("checkpoint", "not reachable", f"{path}: is of the training that went on with --allow-changes")
    return compared("checkpoint", path, {"sha256": (found, wanted)})


def _parity_link(chain: Chain) -> Link:
    path = chain.parity_path
    if not path.is_file():
        is_temporary = chain.run_dir is None and chain.by_version
        return Link("parity", "not reachable", "no run folder" if is_temporary else f"{path}: no such report")
    if chain.recorded_sha256 and chain.recorded_sha256 != chain.exported_sha256:
        return Link("parity", "not reachable", f"{path}: is of a later export of the run")
    if chain.recorded_parity and chain.recorded_parity != (found := sha256_of(path)):
        return compared("parity", path, {"sha256": (found, chain.recorded_parity)})
    report = _read_report(path)
    pairs = {"passed": (report.get("passed"), True), "of the ONNX file": (report.get("sha256"), chain.exported_sha256)}
    return compared("parity", path, pairs)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _proved_sha256(path: Path) -> str:
    return str(_read_report(path).get("sha256", "")) if path.is_file() else ""


def _file_link(chain: Chain) -> Link:
    if not chain.claims:
        return Link("ONNX file", "not reachable", f"{chain.path}: nothing was reached that says what its sha256 should be")
    wanted = chain.sha256 if chain.is_exported_file else chain.claims[0]
    kept = f"the file in the registry, {_name(chain.version)}" if chain.by_version and chain.version else chain.path
    return compared("ONNX file", kept, {"sha256": (chain.sha256, wanted)})


def _version_link(chain: Chain) -> Link:
    version = chain.version
    if version is None:
        return Link(
            "version", "not reachable", chain.trouble or "the model is not registered; `shardline sync RUN` delivers it"
        )
    pairs: dict[str, tuple[Any, Any]] = {SHA256_TAG: (version.tags.get(SHA256_TAG, ""), chain.exported_sha256)}
    pairs |= {name: (version.tags.get(name, ""), wanted) for name, wanted in chain.facts.items()}
    pairs["run_id"] = (version.tags.get("run_id", ""), version.run_id)
    return compared("version", _name(version), pairs)


def _name(version: "ModelVersion") -> str:
    return f"models:/{version.name}/{version.version}"


def first_broken(links: list[Link]) -> GateError | None:
    """What the verb ends with where a link is broken."""
    broken = [link for link in links if link.state == "BROKEN"]
    if not broken:
        return None
    more = f" ({len(broken) - 1} more above.)" if len(broken) > 1 else ""
    return GateError(
        f"the chain is broken at {broken[0].name}: {broken[0].what.removesuffix('.')}. Do not use this model.{more}"
    )
