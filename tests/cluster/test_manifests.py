"""The Kubernetes manifests, without a server: they render, and hold no key that Kubernetes or Kubeflow does not know."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import REPOSITORY

FOLDER = REPOSITORY / "configs/kubernetes"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, to render"),
]
PLANTED = {
    "trainjob": [("numNodes: 2", "numNode: 2"), ("claimName:", "claimname:"), ("mountPath: /dev/shm", "mountpath: /dev/shm")],
    "indexed-job": [("completionMode:", "completionsMode:"), ("subdomain:", "subDomain:"), ("values: [2, 3]", "values: [two]")],
    "serve": [("readOnlyRootFilesystem:", "readonlyRootFilesystem:"), ("failureThreshold: 150", "failureTreshold: 150")],
}
FILES = {"trainjob": "trainjob.yaml", "indexed-job": "job.yaml", "serve": "serve.yaml"}
IMAGES = {"trainjob": "shardline-train", "indexed-job": "shardline-train", "serve": "shardline-serve"}


def render(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def unknown_keys(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """Where a round trip through a model dropped or changed something."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{place}/{key}"
            else:
                yield from unknown_keys(value, kept[key], f"{place}/{key}")
    elif isinstance(given, list):
        for number, value in enumerate(given):
            yield from unknown_keys(value, kept[number] if number < len(kept) else None, f"{place}[{number}]")
    elif given != kept:
        yield f"{place}: {given!r} became {kept!r}"


def defects_of(rendered: str, folder: Path) -> list[str]:
    """What is wrong with rendered manifests: built-in kinds by their schema, a TrainJob by Kubeflow's own model."""
    from kubeflow_trainer_api import models

    defects, builtin = [], []
    for document in yaml.safe_load_all(rendered):
        if document["kind"] != "TrainJob":
            builtin.append(document)
            continue
        try:
            kept = models.TrainerV1alpha1TrainJob.from_dict(document).to_dict()
        except ValueError as error:
            defects.append(str(error))
            continue
        defects += unknown_keys(document, kept)
    path = folder / "builtin.yaml"
    path.write_text(yaml.safe_dump_all(builtin))
    command = [str(Path(sys.executable).with_name("kubernetes-validate")), "--strict", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    # A kind without a schema only warns.
    return defects + ([said] if done.returncode or "WARN" in said else [])


@pytest.mark.parametrize("kind", PLANTED)
def test_manifests_render_and_hold_nothing_unknown(kind: str, tmp_path: Path) -> None:
    rendered = render(FOLDER / kind)
    assert defects_of(rendered, tmp_path) == []
    assert re.findall(r"image: (\S+)", rendered) == [f"{IMAGES[kind]}:latest"]


@pytest.mark.parametrize("kind", ["trainjob", "indexed-job"])
def test_the_pods_mount_the_chain_that_was_made(kind: str) -> None:
    rendered = render(FOLDER / kind)
    documents = {document["kind"]: document for document in yaml.safe_load_all(rendered)}
    chain = documents["ConfigMap"]
    assert chain["metadata"]["name"] != "shardline-chain", "a changed chain must be another config map"
    assert rendered.count(f"name: {chain['metadata']['name']}") == 2


def test_what_serves_is_asked_for_its_health_and_has_no_rights() -> None:
    documents = {document["kind"]: document for document in yaml.safe_load_all(render(FOLDER / "serve"))}
    pod = documents["Deployment"]["spec"]["template"]
    assert documents["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == 8000, "the port of the image"
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    paths = {probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
    assert {"requests", "limits"} == set(container["resources"])
    assert "command" not in container, "args are given to the image's entry point"
    assert container["args"][0] == "serve"
    secret = {variable["valueFrom"]["secretKeyRef"]["name"] for variable in container["env"]}
    assert secret == {"shardline-tracking"}, "a password comes from a secret"


@pytest.mark.parametrize(("kind", "right", "wrong"), [(kind, *pair) for kind, pairs in PLANTED.items() for pair in pairs])
def test_a_planted_typo_is_found(kind: str, right: str, wrong: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FOLDER, tmp_path / "kubernetes"))
    path = copy / kind / FILES[kind]
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    assert defects_of(render(copy / kind), tmp_path)


@pytest.mark.parametrize("kind", PLANTED)
def test_the_image_can_be_named_by_the_user(kind: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FOLDER, tmp_path / "kubernetes"))
    path = copy / kind / "kustomization.yaml"
    path.write_text(path.read_text().replace("newTag: latest", "newName: registry.example/team/shardline\n    newTag: v7"))
    assert "image: registry.example/team/shardline:v7" in render(copy / kind)
