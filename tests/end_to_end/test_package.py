"""The wheel, as somebody who has no checkout gets it: whole, the same bytes every time, and at work without torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest
from licenses import normalised
from PIL import Image

from pipeline.data import native
from tests.processes import shardline, wait_until

REPOSITORY = Path(__file__).parents[2]
# What the base and `serve` may bring; a new one is looked at, and then named here.
BROUGHT = {
    "flatbuffers", "httptools", "jsonargparse", "markdown-it-py", "mdurl", "numpy", "onnxruntime", "orjson",
    "packaging", "pillow", "protobuf", "pygments", "pyyaml", "rich", "shardline", "uvloop",
}  # fmt: skip
pytestmark = pytest.mark.timeout(960)  # the first test of an installation downloads it
NO_NETWORK = re.compile("Failed to establish a new connection|Temporary failure in name resolution|Network is unreachable")


def built(folder: Path) -> tuple[Path, Path]:
    """Source distribution and wheel, as `make package` builds them, from a copy: a build leaves folders in the checkout."""
    for name in ("pipeline", "configs"):
        shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source")
    command = [str(REPOSITORY / "docker/package.sh"), str(folder / "source"), str(folder)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "BIN": str(Path(sys.executable).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source distribution and wheel."""
    return built(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(package: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a clean environment after `pip install 'shardline[serve]'`."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    command = [str(folder / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", f"{package[1]}[serve]"]
    # With its paths, this Python's packages would pass for installed ones.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540, check=False)
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture
def exported(chain: dict[str, str], workspace: Path, tmp_path: Path) -> Path:
    """A folder with nothing but an image in it; the model lies elsewhere. The model's path."""
    Image.linear_gradient("L").resize((40, 30)).save(tmp_path / "photo.png")
    return workspace / "runs/digits/export/model.onnx"


def run(programs: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed command, with nothing of this environment or checkout to fall back on."""
    command = [str(programs / "shardline"), *arguments]
    return subprocess.run(command, cwd=cwd, env=bare(), capture_output=True, text=True, timeout=120, check=False)


def bare() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}


def test_the_wheel_holds_every_file_of_the_package(package: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(package[1]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    files = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "pipeline").rglob("*") if path.is_file()}
    there = {name for name in files if "__pycache__" not in name and "/." not in name}
    there |= {f"pipeline/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    libraries = {name for name in packed if name.startswith("shardline.libs/")}
    assert packed - libraries == there
    assert bool(libraries) == native.is_built(), "the decoder's libjpeg is in the wheel"


@pytest.mark.skipif(not native.is_built(), reason=f"needs the native decoder: {native.HOW_TO_BUILD}")
def test_the_decoder_in_the_wheel_needs_no_library_of_the_machine(package: tuple[Path, Path], tmp_path: Path) -> None:
    assert "manylinux" in package[1].name
    with zipfile.ZipFile(package[1]) as wheel:
        wheel.extractall(tmp_path)
    # `ldd` follows what the loader would do; libjpeg must come from beside the package.
    said = subprocess.check_output(["ldd", str(tmp_path / "pipeline/data/native/_jpeg.abi3.so")], text=True)
    (libjpeg,) = [line for line in said.splitlines() if "libjpeg" in line]
    assert str(tmp_path) in os.path.normpath(libjpeg.split("=> ")[1].split(" (")[0])
    assert str(REPOSITORY) not in said


def test_the_source_distribution_holds_what_the_wheel_is_built_from(package: tuple[Path, Path]) -> None:
    with tarfile.open(package[0]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "configs/digits.yaml", "pipeline/cli.py"} <= names
    assert not [name for name in names if name.startswith(("data", "runs", ".venv", "dist"))]


def test_the_same_commit_gives_the_same_wheel(package: tuple[Path, Path], tmp_path: Path) -> None:
    again = built(tmp_path)
    assert again[1].name == package[1].name
    assert again[1].read_bytes() == package[1].read_bytes()


def test_it_installs_no_torch_and_nothing_unexpected(installed: Path) -> None:
    listed = json.loads(subprocess.check_output([str(installed / "pip"), "list", "--format=json"], env=bare()))
    names = {normalised(entry["name"]) for entry in listed}
    assert names - {"pip", "setuptools", "wheel"} == BROUGHT


def test_the_configurations_are_found_from_any_folder(installed: Path, tmp_path: Path) -> None:
    script = "import pipeline.config as c; print(c.__file__); print(*c.bundled_configs()); print(c.find_config('digits'))"
    said = subprocess.check_output([str(installed / "python"), "-c", script], text=True, cwd=tmp_path, env=bare())
    file, configs, digits = said.splitlines()
    assert Path(file).is_relative_to(installed.parent)
    assert configs == "cifar10 digits finetune-alexnet folder imagenet-4x8 imagenet-8gpu multilabel"
    assert digits == str(Path(file).with_name("configs") / "digits.yaml")
    assert run(installed, "--help", cwd=tmp_path).stdout.startswith("usage: shardline VERB")


def test_it_proves_and_answers_from_a_folder_with_nothing_in_it(installed: Path, exported: Path, tmp_path: Path) -> None:
    verified = run(installed, "verify", str(exported), cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert "model verified" in verified.stdout
    arguments = ["predict", str(exported), "photo.png", "--json"]
    (inside,) = json.loads(run(installed, *arguments, cwd=tmp_path).stdout)
    (outside,) = json.loads(shardline(*arguments, cwd=tmp_path).stdout)
    # Releases of numpy, Pillow and onnxruntime may differ from the locked ones: what is promised between any two runtimes.
    assert inside["probabilities"] == pytest.approx(outside["probabilities"], rel=0, abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"], "nothing is left behind"


def test_a_verb_that_needs_torch_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "shard", "--config", "digits", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'shardline[train]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_serves_from_a_folder_with_nothing_in_it(installed: Path, exported: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = [str(installed / "shardline"), "serve", str(exported), "--port", "0"]
        process = subprocess.Popen(command, cwd=tmp_path, env=bare(), stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "http://" in log.read_text() or process.poll() is not None, "the server", 60)
        url = re.findall(r"http://\S+", log.read_text())[0]
        request = urllib.request.Request(f"{url}/predict?probabilities=1", (tmp_path / "photo.png").read_bytes())
        request.add_header("Content-Type", "image/png")
        with urllib.request.urlopen(request, timeout=30) as answer:
            (served,) = json.load(answer)["predictions"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    (predicted,) = json.loads(run(installed, "predict", str(exported), "photo.png", "--json", cwd=tmp_path).stdout)
    assert served["probabilities"] == pytest.approx(predicted["probabilities"], rel=0, abs=1e-5)
