"""The serving image, built here and run as it is meant to be: a read-only root, no rights, any user."""

import contextlib
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from licenses import normalised
from PIL import Image

from tests.images.conftest import Engine, at_work, checkout
from tests.mlflow_server import mlflow_server
from tests.processes import shardline, wait_until
from tests.s3 import free_ports

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]
LARGEST_MEGABYTES = 500


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout that the image is built from."""
    return checkout(tmp_path_factory.mktemp("serve") / "checkout")


@pytest.fixture(scope="module")
def image(engine: Engine, context: Path) -> str:
    """The image, by `make images`."""
    return engine.build("serve", context)


@pytest.fixture(scope="module")
def work(chain: dict[str, str], workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is mounted: the export of the digits, and an image file, readable by anybody."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(workspace / "runs/digits/export", folder / "export")
    Image.linear_gradient("L").resize((40, 30)).save(folder / "photo.png")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def test_it_is_small(engine: Engine, image: str) -> None:
    assert engine.inspect(image)["Size"] < LARGEST_MEGABYTES * 1e6


def test_it_says_who_runs_it_and_what_it_starts(engine: Engine, image: str) -> None:
    config = engine.inspect(image)["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["shardline"]
    assert config["Cmd"][0] == "serve"
    assert config["ExposedPorts"] == {"8000/tcp": {}}
    assert config["Labels"]["org.opencontainers.image.version"] == "0.1.0"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert not [line for line in config["Env"] if re.search("KEY|TOKEN|SECRET|PASSWORD", line)]


def test_nothing_that_builds_or_trains_is_in_it(engine: Engine, image: str) -> None:
    with engine.files_of(image) as root:
        packages = {path.name for path in root.glob("opt/shardline/lib/python3.*/site-packages/*")}
        programs = {path.name for folder in ("bin", "usr/bin", "usr/local/bin") for path in (root / folder).glob("*")}
        left = ("root/.cache", "tmp", "build", "code")
        rubbish = [path for name in left for path in root.glob(f"{name}/**/*") if not path.is_dir()]
        owned = [path for path in (root / "opt").rglob("*") if path.lstat().st_uid != 0]
    assert {"onnxruntime", "numpy", "PIL", "pipeline"} <= packages
    assert not packages & {"torch", "torchvision", "lightning", "triton", "pip", "setuptools", "wheel", "pytest"}
    assert not programs & {"pip", "pip3", "gcc", "cc", "c++", "make", "git"}
    assert not rubbish
    assert not owned, "its user could change its own code"


def test_no_secret_of_the_checkout_is_in_it(engine: Engine, image: str) -> None:
    with engine.files_of(image) as root:
        found = subprocess.run(["grep", "-rlI", "planted-secret", str(root)], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert "planted-secret" not in engine.run("podman", "history", "--no-trunc", image).stdout


def test_the_list_of_contents_is_that_of_the_image(engine: Engine, image: str, context: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (context / "dist/sbom-serve.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    purls = {component["purl"] for component in json.loads(text)["components"]}
    listing = "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
    there = json.loads(engine.contained(image, "-c", listing, options=("--entrypoint=python",)).stdout)
    assert {purl for purl in purls if purl.startswith("pkg:pypi/")} == {
        f"pkg:pypi/{normalised(name)}@{version}" for name, version in there
    }
    assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in purls)


@pytest.mark.parametrize("user", ["1000:1000", "4242:0"])
def test_it_predicts_what_this_machine_predicts(engine: Engine, image: str, work: Path, user: str) -> None:
    arguments = ["predict", "export/model.onnx", "photo.png", "--json"]
    options = (f"--volume={work}:/work:ro", "--network=none", f"--user={user}")
    (inside,) = json.loads(engine.contained(image, *arguments, options=options).stdout)
    # Two builds of the same arithmetic: what the project promises between any two runtimes.
    assert inside["probabilities"] == pytest.approx(predicted(work), rel=0, abs=1e-5)


def test_it_proves_the_model_on_its_own_machine(engine: Engine, image: str, work: Path) -> None:
    said = engine.contained(
        image, "verify", "export/model.onnx", options=(f"--volume={work}:/work:ro", "--network=none")
    ).stdout
    assert "model verified" in said
    assert "replayed" in said


def test_what_is_missing_is_one_line(engine: Engine, image: str) -> None:
    done = engine.contained(image, "train", "--config", "digits", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("shardline: error: ")
    assert done.stderr.count("\n") == 1


def test_it_serves_is_healthy_and_ends_in_time(engine: Engine, image: str, work: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    options = (f"--volume={work}:/work:ro", "--user=4242:0", "--name=serve")
    with served(engine, image, "export/model.onnx", port=port, options=options, log=tmp_path / "log"):
        prediction = asked(port, work / "photo.png")
        # Its health check as docker would run it, on this test's port.
        check = [word.replace("8000", str(port)) for word in engine.healthcheck(image)]
        engine.run("podman", "exec", "serve", *check)
    assert prediction == pytest.approx(predicted(work), rel=0, abs=1e-5)


def test_it_serves_what_an_mlflow_server_has(engine: Engine, image: str, work: Path, workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "runs/digits", tmp_path / "runs/digits", symlinks=True)
    with mlflow_server(tmp_path / "server") as server:
        delivered = shardline("sync", "runs/digits", "--uri", server.uri, cwd=tmp_path)
        assert delivered.returncode == 0, delivered.stderr
        (port,) = free_ports(1)
        words = ("models:/digits@candidate", f"--tracking.uri={server.uri}")
        with served(engine, image, *words, port=port, options=(), log=tmp_path / "log"):
            prediction = asked(port, work / "photo.png")
    assert prediction == pytest.approx(predicted(work), rel=0, abs=1e-5)


def test_the_health_check_of_a_container_that_does_not_answer_fails(engine: Engine, image: str) -> None:
    command = engine.healthcheck(image)
    done = engine.contained(image, *command[1:], options=(f"--entrypoint={command[0]}", "--network=none"), check=False)
    assert done.returncode != 0


def test_a_change_of_our_code_changes_our_layer_alone(engine: Engine, image: str, context: Path) -> None:
    before = layers(engine, image)
    module = context / "pipeline/errors.py"
    module.write_text(f"{module.read_text()}\n# changed\n")
    after = layers(engine, engine.build("serve", context))
    assert len(after) == len(before)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True] * (len(before) - 1) + [False]


@contextlib.contextmanager
def served(engine: Engine, image: str, *words: str, port: int, options: tuple[str, ...], log: Path) -> Iterator[None]:
    """A container that serves, once it is ready; told to stop at the end, it must end well."""
    command = ["serve", *words, "--host=127.0.0.1", f"--port={port}"]
    with at_work(engine, image, *command, options=options, log=log) as process:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/ready") or process.poll() is not None, "the container", 150)
        assert process.poll() is None, log.read_text()
        yield
    assert process.returncode == 0, log.read_text()


def asked(port: int, photo: Path) -> dict[str, float]:
    """The probabilities that a server gives."""
    headers = {"Content-Type": "image/png"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict?probabilities=1", photo.read_bytes(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        (prediction,) = json.load(answer)["predictions"]
    return dict(prediction["probabilities"])


def predicted(work: Path) -> dict[str, float]:
    """The probabilities that this machine gives."""
    (row,) = json.loads(shardline("predict", "export/model.onnx", "photo.png", "--json", cwd=work).stdout)
    return dict(row["probabilities"])


def layers(engine: Engine, image: str) -> list[str]:
    """The digests of an image's layers, from the base up."""
    found: list[str] = engine.inspect(image)["RootFS"]["Layers"]
    return found


def answers(url: str) -> Any:
    """Whether a server is there and says 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
