import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from pipeline import cli
from pipeline.config import Config
from pipeline.errors import DataError
from pipeline.files import sha256_of, write_bytes, write_json
from pipeline.manifest import DatasetManifest
from pipeline.run import BEST, RunRecord, save_config
from pipeline.tracking.lineage import MODEL, PARITY
from pipeline.tracking.registry import register_model
from tests.unit.tracking.conftest import Registry, model_entry

LINKS = ["data set", "run", "MLflow run", "checkpoint", "parity", "ONNX file", "version"]


@dataclass
class Traced:
    """A run that went through every stage, and what the verb says of its model."""

    config: Config
    record: RunRecord
    dataset: DatasetManifest
    registry: Registry
    name: str
    run_id: str
    capsys: pytest.CaptureFixture[str]

    @property
    def model(self) -> Path:
        return self.config.run_dir / MODEL

    def ask(self, model: str = "", uri: str = "", dataset: str = "") -> tuple[int, dict[str, str]]:
        """Exit code of the verb, and the state of each link."""
        settings = {"--runs_dir": self.config.runs_dir, "--tracking.uri": uri or self.registry.uri}
        settings["--tracking.experiment"] = "registry"
        settings |= {"--dataset.path": dataset} if dataset else {}
        words = [word for pair in settings.items() for word in pair]
        code = cli.main(["lineage", model or str(self.model), "--config", "digits", *words])
        said = self.capsys.readouterr()
        self.said = said.out + said.err
        lines = [line.partition("  ") for line in said.out.splitlines() if line.startswith(("verified", "not reach", "BROKEN"))]
        return code, {rest.strip().partition(":")[0]: state for state, _, rest in lines}


@pytest.fixture
def traced(
    copied_dataset: DatasetManifest,
    exported_model: onnx.ModelProto,
    tiny_config: Config,
    registry: Registry,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> Traced:
    dataset = dataclasses.replace(tiny_config.dataset, path=str(copied_dataset.folder))
    config = dataclasses.replace(tiny_config, dataset=dataset)
    assert config.run_dir == run_dir
    job_id = uuid.uuid4().hex
    run_id = registry.run(job_id)
    record = RunRecord("tiny", job_id, "c" * 64, copied_dataset.digest, "p" * 64, git={"commit": None}, folder=run_dir)
    write_bytes(run_dir / BEST, job_id.encode())
    record.outcome = "done"
    record.mlflow = {"uri": registry.uri, "experiment": "registry", "run_id": run_id}
    record.best = {"path": str(BEST), "sha256": sha256_of(run_dir / BEST), "monitor": "val/accuracy", "value": 1.0}
    facts = {"data_digest": copied_dataset.digest, "job_id": job_id, "checkpoint_sha256": record.best["sha256"]}
    model = onnx.ModelProto()
    model.CopyFrom(exported_model)
    onnx.helper.set_model_props(model, {f"shardline.{key}": value for key, value in facts.items()})
    write_bytes(run_dir / MODEL, model.SerializeToString(deterministic=True))
    write_json(run_dir / PARITY, {"passed": True, "sha256": sha256_of(run_dir / MODEL), "num_samples": 12, "cases": []})
    record.finish_stage("export", "i" * 64, [run_dir / MODEL, run_dir / PARITY])
    save_config(config)
    name = f"traced-{job_id[:8]}"
    register_model(registry.client, run_id, run_dir, model_entry(run_dir, name, **facts))
    return Traced(config, record, copied_dataset, registry, name, run_id, capsys)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\x72\x00")


def swap(path: Path) -> None:
    """Other bytes of the same number."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_json(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def rewrite_metadata(path: Path) -> None:
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"shardline.job_id": "f" * 32, "shardline.data_digest": "f" * 64})
    onnx.save(model, path)


def stored_file(traced: Traced) -> Path:
    """The file of version 1 in the artifact store."""
    version = traced.registry.client.get_model_version(traced.name, "1")
    logged = traced.registry.client.get_logged_model(str(version.source).removeprefix("models:/"))
    return Path(logged.artifact_location.removeprefix("file://")) / "model.onnx"


def set_tag(traced: Traced, key: str, value: str) -> None:
    traced.registry.client.set_model_version_tag(traced.name, "1", key, value)


TAMPERINGS: dict[str, tuple[str, Callable[[Traced], object]]] = {
    "a shard": ("data set", lambda traced: swap(traced.dataset.folder / "train-000001.tar")),
    "a manifest": (
        "data set",
        lambda traced: change_json(traced.dataset.folder / "dataset.json", "class_names", ["x", "y", "z"]),
    ),
    "the index": ("data set", lambda traced: swap(traced.dataset.folder / "train.index.npy")),
    "the job of run.json": ("run", lambda traced: change_json(traced.config.run_dir / "run.json", "job_id", "f" * 32)),
    "the data set of run.json": (
        "run",
        lambda traced: change_json(traced.config.run_dir / "run.json", "data_digest", "f" * 64),
    ),
    "the job of the MLflow run": (
        "MLflow run",
        lambda traced: traced.registry.client.set_tag(traced.run_id, "shardline.job_id", "f" * 32),
    ),
    "a checkpoint": ("checkpoint", lambda traced: append(traced.config.run_dir / BEST)),
    "parity.json": ("parity", lambda traced: change_json(traced.config.run_dir / PARITY, "num_samples", 12_000)),
    "the proof in parity.json": ("parity", lambda traced: change_json(traced.config.run_dir / PARITY, "sha256", "f" * 64)),
    "bytes of model.onnx": ("ONNX file", lambda traced: append(traced.model)),
    "the metadata of model.onnx": ("ONNX file", lambda traced: rewrite_metadata(traced.model)),
    "the whole of model.onnx": ("ONNX file", lambda traced: traced.model.write_bytes(b"not even ONNX")),
    "the sha256 in the registry": ("version", lambda traced: set_tag(traced, "onnx_sha256", "f" * 64)),
    "the data set in the registry": ("version", lambda traced: set_tag(traced, "data_digest", "f" * 64)),
    "the run in the registry": ("version", lambda traced: set_tag(traced, "run_id", "f" * 32)),
}


def test_an_honest_model_is_verified_link_by_link_by_file_and_by_version(traced: Traced) -> None:
    for model in ("", f"models:/{traced.name}@candidate", f"models:/{traced.name}/1"):
        code, states = traced.ask(model)
        assert states == dict.fromkeys(LINKS, "verified"), traced.said
        assert code == 0
        assert "all 7 verified" in traced.said


@pytest.mark.parametrize("what", TAMPERINGS)
def test_what_was_tampered_with_breaks_its_own_link_and_no_other(traced: Traced, what: str) -> None:
    broken, tamper = TAMPERINGS[what]
    tamper(traced)
    code, states = traced.ask()
    assert {name: state for name, state in states.items() if state != "verified"} == {broken: "BROKEN"}, traced.said
    assert code == 3
    assert f"shardline: error: the chain is broken at {broken}: " in traced.said


@pytest.mark.parametrize(
    "what", ["a shard", "a checkpoint", "parity.json", "the sha256 in the registry", "the job of the MLflow run"]
)
def test_asked_by_version_the_same_link_breaks(traced: Traced, what: str) -> None:
    broken, tamper = TAMPERINGS[what]
    tamper(traced)
    code, states = traced.ask(f"models:/{traced.name}@candidate")
    assert (code, [name for name, state in states.items() if state == "BROKEN"]) == (3, [broken]), traced.said
    assert ".." not in traced.said.rpartition("shardline: error: ")[2].replace("...", "")


def test_a_run_that_knows_of_no_mlflow_run_finds_it_by_its_job(traced: Traced) -> None:
    change_json(traced.config.run_dir / "run.json", "mlflow", {"uri": None, "experiment": None, "run_id": None})
    assert traced.ask() == (0, dict.fromkeys(LINKS, "verified")), traced.said


def test_a_file_that_was_changed_inside_the_registry_is_found(traced: Traced) -> None:
    append(stored_file(traced))
    code, states = traced.ask(f"models:/{traced.name}/1")
    assert (code, [name for name, state in states.items() if state == "BROKEN"]) == (3, ["ONNX file"]), traced.said
    assert traced.ask()[0] == 0  # the run's own file is what it was


def test_found_and_expected_are_told(traced: Traced) -> None:
    set_tag(traced, "onnx_sha256", "f" * 64)
    traced.ask()
    found = f"models:/{traced.name}/1: onnx_sha256 is ffffffffffff, expected {sha256_of(traced.model)[:12]}"
    assert found in traced.said


def test_what_is_away_is_not_reachable_and_nothing_is_broken(traced: Traced, tmp_path: Path) -> None:
    shutil.rmtree(traced.dataset.folder)
    (traced.config.run_dir / BEST).unlink()
    code, states = traced.ask(uri="http://127.0.0.1:9")
    away = {name for name, state in states.items() if state == "not reachable"}
    assert (code, away) == (0, {"data set", "MLflow run", "checkpoint", "version"}), traced.said
    assert "3 verified, 4 out of reach" in traced.said
    assert "MLflow at http://127.0.0.1:9 cannot be reached" in traced.said


def test_a_data_set_that_only_lies_where_the_run_is_not_known_to_have_had_its_own_breaks_nothing(
    traced: Traced, multi_dataset: DatasetManifest
) -> None:
    shutil.rmtree(traced.config.run_dir)
    code, states = traced.ask(f"models:/{traced.name}/1", dataset=str(multi_dataset.folder))
    assert (code, states["data set"], states["version"]) == (0, "not reachable", "verified"), traced.said
    assert "is another data set; give --dataset.path" in traced.said
    assert "parity: no run folder\n" in traced.said, "and no file of a temporary folder"


def test_where_nothing_was_reached_it_says_so(traced: Traced, tmp_path: Path) -> None:
    alone = Path(shutil.copy(traced.model, tmp_path / "alone.onnx"))
    shutil.rmtree(traced.config.run_dir)
    code, states = traced.ask(str(alone), uri="http://127.0.0.1:9", dataset=str(tmp_path / "none"))
    assert (code, states) == (0, dict.fromkeys(LINKS, "not reachable")), traced.said
    assert "nothing could be verified" in traced.said


def test_a_data_set_whose_server_is_away_breaks_nothing(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise DataError("http://127.0.0.1:9/shards/dataset.json: could not be read in 4 attempts (refused).")

    monkeypatch.setattr("pipeline.verbs.tracking.load_dataset", away)
    dataset = dataclasses.replace(traced.config.dataset, path="http://127.0.0.1:9/shards")
    save_config(dataclasses.replace(traced.config, dataset=dataset))
    code, states = traced.ask()
    assert (code, states["data set"], states["run"]) == (0, "not reachable", "verified"), traced.said


@pytest.mark.parametrize("content", [b"", b"path,label\n", b"\x08\x07"])
def test_what_is_no_model_of_ours_is_refused(traced: Traced, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.csv").write_bytes(content)
    assert traced.ask(str(tmp_path / "notes.csv")) == (2, {})
    assert "notes.csv: is no model of `shardline export`" in traced.said


def test_a_run_that_the_server_does_not_know_is_not_there(traced: Traced) -> None:
    change_json(traced.config.run_dir / "run.json", "mlflow", {"uri": None, "experiment": None, "run_id": "f" * 32})
    code, states = traced.ask()
    assert (code, states["MLflow run"]) == (0, "not reachable"), traced.said
    assert "MLflow run: the run is not there; `shardline sync RUN` delivers it" in " ".join(traced.said.split())


def test_a_copy_of_the_file_leads_to_its_run_even_if_that_was_moved_aside(traced: Traced, tmp_path: Path) -> None:
    copy = Path(shutil.copy(traced.model, tmp_path / "copy.onnx"))
    traced.config.run_dir.rename(traced.config.run_dir.with_name("tiny.20260101-000000"))
    code, states = traced.ask(str(copy))
    assert (code, states) == (0, dict.fromkeys(LINKS, "verified")), traced.said
    append(copy)
    code, states = traced.ask(str(copy))
    assert (code, states["ONNX file"]) == (3, "BROKEN"), traced.said


def export_again(traced: Traced, register: bool = True) -> None:
    """Another file of the same run, which becomes version 2, unless it still waits for its delivery."""
    record = RunRecord.require(traced.config.run_dir)
    model = onnx.load(traced.model)
    model.producer_version = "again"
    onnx.save(model, traced.model)
    write_json(traced.config.run_dir / PARITY, {"passed": True, "sha256": sha256_of(traced.model)})
    record.finish_stage("export", "j" * 64, [traced.model, traced.config.run_dir / PARITY])
    if not register:
        return
    entry = model_entry(traced.config.run_dir, traced.name, **tags_of(traced))
    entry["tags"]["onnx_sha256"] = sha256_of(traced.model)
    assert register_model(traced.registry.client, traced.run_id, traced.config.run_dir, entry) == "2"


def test_a_version_stays_whole_when_its_run_is_exported_again(traced: Traced) -> None:
    export_again(traced)
    code, states = traced.ask(f"models:/{traced.name}/1")
    assert (code, states["ONNX file"], states["parity"]) == (0, "verified", "not reachable"), traced.said
    assert traced.ask(f"models:/{traced.name}/2") == (0, dict.fromkeys(LINKS, "verified")), traced.said
    assert traced.ask() == (0, dict.fromkeys(LINKS, "verified")), traced.said


def test_an_export_that_is_not_registered_yet_is_not_held_against_an_earlier_version(traced: Traced, tmp_path: Path) -> None:
    copy = Path(shutil.copy(traced.model, tmp_path / "copy.onnx"))
    export_again(traced, register=False)
    code, states = traced.ask()
    assert (code, {name for name, state in states.items() if state != "verified"}) == (0, {"version"}), traced.said
    code, states = traced.ask(str(copy))  # of version 1
    assert (code, {name for name, state in states.items() if state != "verified"}) == (0, {"parity"}), traced.said


@pytest.mark.parametrize("register", [True, False])
def test_an_older_file_in_the_place_of_the_last_export_is_found(traced: Traced, register: bool) -> None:
    earlier = traced.model.read_bytes()
    export_again(traced, register)
    traced.model.write_bytes(earlier)
    code, states = traced.ask()
    assert (code, [name for name, state in states.items() if state == "BROKEN"]) == (3, ["ONNX file"]), traced.said


def test_a_tag_that_was_changed_to_fit_does_not_make_an_older_file_the_last_export(traced: Traced) -> None:
    earlier, sha256 = traced.model.read_bytes(), sha256_of(traced.model)
    export_again(traced)
    traced.model.write_bytes(earlier)
    traced.registry.client.set_model_version_tag(traced.name, "2", "onnx_sha256", sha256)
    code, states = traced.ask()
    assert (code, states["ONNX file"]) == (3, "BROKEN"), traced.said


def test_of_an_older_version_the_changed_file_alone_is_broken(traced: Traced) -> None:
    export_again(traced)
    append(stored_file(traced))
    code, states = traced.ask(f"models:/{traced.name}/1")
    assert (code, [name for name, state in states.items() if state == "BROKEN"]) == (3, ["ONNX file"]), traced.said


def tags_of(traced: Traced) -> dict[str, str]:
    found = traced.registry.client.get_model_version(traced.name, "1").tags
    return {name: found[name] for name in ("data_digest", "job_id", "checkpoint_sha256")}


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("nothing.onnx", "no such model file"),
        ("models:/nothing@champion", "there is no such version"),
        ("models:/nothing/3", "there is no such version"),
        ("models:/nothing", "names no version: write models:/NAME/VERSION or models:/NAME@ALIAS"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(
    registry: Registry, model: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lineage", model, "--config", "digits", "--tracking.uri", registry.uri]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
