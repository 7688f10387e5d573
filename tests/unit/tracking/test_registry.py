from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.files import sha256_of
from pipeline.tracking import registry as registry_module
from pipeline.tracking.registry import alias_version, register_model
from tests.unit.tracking.conftest import Registry, model_entry


def versions(registry: Registry, name: str) -> list[str]:
    found = registry.client.search_model_versions(f"name = '{name}'")
    return sorted(str(version.version) for version in found)


def models(registry: Registry, run_id: str) -> list[Any]:
    return list(registry.client.search_logged_models([registry.experiment_id], filter_string=f"source_run_id = '{run_id}'"))


def outputs(registry: Registry, run_id: str) -> list[str]:
    found = registry.client.get_run(run_id).outputs
    return [output.model_id for output in found.model_outputs] if found else []


def utc(milliseconds: int) -> str:
    return f"{np.datetime64(milliseconds, 'ms')}+00:00"


def test_a_model_becomes_a_version_that_says_where_it_came_from(registry: Registry, run_dir: Path) -> None:
    run_id, entry = registry.run(), model_entry(run_dir, "plain")
    assert register_model(registry.client, run_id, run_dir, entry) == "1"
    version = registry.client.get_model_version("plain", "1")
    assert version.tags == {**entry["tags"], "run_id": run_id, "exported_at": utc(entry["time"])}
    assert version.run_id == run_id
    link = f"#/experiments/{registry.experiment_id}/runs/{run_id}?workflowType=machine_learning"
    assert version.description == f"**test accuracy 0.9722** on 360 images\n\n[run]({link})"
    assert list(version.aliases) == ["candidate"]
    model = registry.client.get_registered_model("plain")
    assert model.tags == {"task": "single"}
    assert "`shardline promote`" in model.description
    run = registry.client.get_run(run_id)
    assert run.info.status == "RUNNING"  # whose it is to end
    assert [f"models:/{model_id}" for model_id in outputs(registry, run_id)] == [version.source]


def test_the_logged_model_is_the_proved_file_and_answers(registry: Registry, run_dir: Path) -> None:
    import mlflow

    # A field that is not where protobuf would write it: the file must arrive as it is, not as it is read and written.
    path = run_dir / "export/model.onnx"
    path.write_bytes(b"\x72\x00" + path.read_bytes())
    run_id, entry = registry.run(), model_entry(run_dir, "asked")
    register_model(registry.client, run_id, run_dir, entry)
    (logged,) = models(registry, run_id)
    assert (logged.name, str(logged.status), logged.model_type) == ("onnx", "READY", "image-classifier")
    mlflow.set_tracking_uri(registry.uri)
    local = Path(mlflow.artifacts.download_artifacts(artifact_uri="models:/asked@candidate"))
    assert sha256_of(local / "model.onnx") == entry["tags"]["onnx_sha256"]
    assert (local / "requirements.txt").read_text().split()[1:] == ["onnxruntime==1.32.0"]  # the first is mlflow itself
    model = mlflow.pyfunc.load_model("models:/asked@candidate")
    signature = model.metadata.signature
    assert [(spec.name, spec.type, spec.shape) for spec in signature.inputs] == [("image", np.dtype("uint8"), (-1, 3, 16, 16))]
    assert [(spec.name, spec.type, spec.shape) for spec in signature.outputs] == [
        ("logits", np.dtype("float32"), (-1, 3)),
        ("probabilities", np.dtype("float32"), (-1, 3)),
    ]
    answer = model.predict(model.input_example)
    assert answer["probabilities"].shape == (1, 3)


def test_each_figure_is_told_once_and_belongs_to_run_and_model(registry: Registry, run_dir: Path) -> None:
    run_id, entry = registry.run(), model_entry(run_dir, "figures")
    registry.client.log_metric(run_id, "test/accuracy", 0.97)  # at step 0, as all final figures
    register_model(registry.client, run_id, run_dir, entry)
    (logged,) = models(registry, run_id)
    assert {metric.key: metric.value for metric in logged.metrics} == entry["metrics"]
    for key in [*entry["metrics"], "test/accuracy"]:
        assert len(registry.client.get_metric_history(run_id, key)) == 1, key


STEPS = ["log_outputs", "log_model_artifacts", "finalize_logged_model", "log_metric", "create_model_version"]


@pytest.mark.parametrize("step", [*STEPS, "set_registered_model_alias"])
@pytest.mark.parametrize("served", [True, False], ids=["answer lost", "request lost"])
def test_sent_again_after_a_failure_anywhere_it_is_still_one_version(
    registry: Registry, run_dir: Path, monkeypatch: pytest.MonkeyPatch, step: str, served: bool
) -> None:
    name = f"again-{step}-{served}"
    run_id, entry = registry.run(), model_entry(run_dir, name)
    ask = getattr(registry.client, step)

    def time_out(*arguments: Any, **named: Any) -> None:
        if served:
            ask(*arguments, **named)
        raise TimeoutError(step)

    with monkeypatch.context() as patch:
        patch.setattr(registry.client, step, time_out)
        with pytest.raises(TimeoutError):
            register_model(registry.client, run_id, run_dir, entry)
    for _ in range(2):
        assert register_model(registry.client, run_id, run_dir, entry) == "1"
    assert versions(registry, name) == ["1"]
    (logged,) = models(registry, run_id)
    assert str(logged.status) == "READY"
    assert {metric.key for metric in logged.metrics} == set(entry["metrics"])
    assert len(outputs(registry, run_id)) == 1
    assert len(registry.client.get_metric_history(run_id, "onnx/megabytes")) == 1
    assert list(registry.client.get_model_version(name, "1").aliases) == ["candidate"]


def test_a_request_that_is_served_after_it_was_given_up_leaves_one_version(
    registry: Registry, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, entry = registry.run(), model_entry(run_dir, "late")
    ask = registry.client.create_model_version

    def serve_both(*arguments: Any, **named: Any) -> Any:
        ask(*arguments, **named)
        return ask(*arguments, **named)

    monkeypatch.setattr(registry.client, "create_model_version", serve_both)
    assert register_model(registry.client, run_id, run_dir, entry) == "1"
    assert versions(registry, "late") == ["1"]


def test_the_candidate_is_the_latest_and_never_goes_back(
    registry: Registry, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = registry.run(), registry.run()
    entry = model_entry(run_dir, "moving")
    assert register_model(registry.client, first, run_dir, entry) == "1"
    assert register_model(registry.client, second, run_dir, entry) == "2"  # the same file of another run
    for step in ("create_logged_model", "create_model_version"):  # both are there already
        monkeypatch.delattr(f"mlflow.MlflowClient.{step}")
    assert register_model(registry.client, first, run_dir, entry) == "1"
    candidate = alias_version(registry.client, "moving", "candidate")
    assert candidate is not None
    assert int(candidate.version) == 2


def test_a_file_that_is_exported_again_is_the_candidate_again(registry: Registry, run_dir: Path) -> None:
    run_id, path = registry.run(), run_dir / "export/model.onnx"
    one, entry = path.read_bytes(), model_entry(run_dir, "back")
    entries = [entry]
    register_model(registry.client, run_id, run_dir, entry)
    path.write_bytes(one + b"\x72\x00")
    entries.append({**model_entry(run_dir, "back"), "time": entry["time"] + 1000})
    assert register_model(registry.client, run_id, run_dir, entries[1]) == "2"
    path.write_bytes(one)
    entries.append({**entry, "time": entry["time"] + 2000})
    assert register_model(registry.client, run_id, run_dir, entries[2]) == "1"
    for sent in (None, 0, 2):  # what was said before may be sent again
        if sent is not None:
            register_model(registry.client, run_id, run_dir, entries[sent])
        candidate = alias_version(registry.client, "back", "candidate")
        assert candidate is not None and int(candidate.version) == 1
    assert registry.client.get_model_version("back", "1").tags["exported_at"] == utc(entry["time"] + 2000)


def test_another_file_of_the_same_run_is_another_version(registry: Registry, run_dir: Path) -> None:
    run_id = registry.run()
    assert register_model(registry.client, run_id, run_dir, model_entry(run_dir, "twice")) == "1"
    with (run_dir / "export/model.onnx").open("ab") as file:
        file.write(b"\x72\x00")  # an empty metadata entry
    assert register_model(registry.client, run_id, run_dir, model_entry(run_dir, "twice")) == "2"


def test_a_file_that_was_changed_since_its_export_is_not_registered(
    registry: Registry, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id, entry = registry.run(), model_entry(run_dir, "changed")
    with (run_dir / "export/model.onnx").open("ab") as file:
        file.write(b"\x72\x00")
    assert register_model(registry.client, run_id, run_dir, entry) is None
    assert versions(registry, "changed") == []
    assert "is no longer the file that was exported" in capsys.readouterr().out
    assert registry_module.SHA256_TAG in entry["tags"]


def test_there_is_no_alias_of_a_model_that_is_not_there(registry: Registry, run_dir: Path) -> None:
    assert alias_version(registry.client, "nothing", "champion") is None
    register_model(registry.client, registry.run(), run_dir, model_entry(run_dir, "something"))
    assert alias_version(registry.client, "something", "champion") is None
