"""The lock files: everything has a hash, fits pyproject.toml, and is the same version wherever it is locked."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parents[3]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Of each lock file: the extras for which `make lock` makes it.
LOCKS = {
    "requirements.lock": ("train", "serve", "tracking", "server", "dev"),
    "docker/serve.lock": ("serve", "tracking"),
    "docker/train.lock": ("train", "serve", "s3"),
    "docker/mlflow.lock": ("server",),
}


def entries(lock: str) -> list[str]:
    """One line a package, with its version, markers and hashes."""
    lines = (REPOSITORY / lock).read_text().replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def versions(lock: str) -> dict[str, set[Version]]:
    """Of each package its versions: several where they depend on Python's."""
    found = dict[str, set[Version]]()
    for line in entries(lock):
        name, version = line.split(";")[0].split("--hash")[0].split("==")
        found.setdefault(name, set()).add(Version(version.strip()))
    return found


def test_every_lock_is_known_and_made_by_make_lock() -> None:
    assert set(LOCKS) == {"requirements.lock", *(f"docker/{path.name}" for path in (REPOSITORY / "docker").glob("*.lock"))}
    made = re.findall(r"^\t\$\(COMPILE\) (.*)-o (\S+)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert {lock: tuple(re.findall(r"--extra (\w+)", options)) for options, lock in made} == LOCKS


@pytest.mark.parametrize("lock", LOCKS)
def test_every_entry_has_its_version_and_a_hash(lock: str) -> None:
    assert len(entries(lock)) > 30
    for entry in entries(lock):
        assert re.match(r"[a-z0-9.-]+==\S+", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


@pytest.mark.parametrize("lock", LOCKS)
def test_it_holds_what_the_project_asks_for(lock: str) -> None:
    locked = versions(lock)
    asked = [*PROJECT["dependencies"], *(line for extra in LOCKS[lock] for line in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, asked):
        found = locked.get(requirement.name.lower().replace("_", "-"), set())
        assert found, f"{lock} lacks {requirement}: make lock"
        assert all(version in requirement.specifier for version in found), f"{lock} has {requirement.name} {found}: make lock"


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock.startswith("docker/")])
def test_an_image_has_the_versions_that_were_tested(lock: str) -> None:
    tested = versions("requirements.lock")
    for name, found in versions(lock).items():
        assert found <= tested.get(name, set()), f"{lock}: {name} {found}, but requirements.lock has {tested.get(name)}"


def test_what_serves_has_no_torch_and_nothing_that_trains() -> None:
    heavy = {"torch", "torchvision", "lightning", "triton", "mlflow", "onnx", "onnxscript", "scikit-learn", "pandas", "pyarrow"}
    names = set(versions("docker/serve.lock"))
    assert not names & heavy
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def test_images_hold_no_tools_of_development() -> None:
    tools = {Requirement(line).name for line in PROJECT["optional-dependencies"]["dev"]}
    for lock in ("docker/serve.lock", "docker/train.lock", "docker/mlflow.lock"):
        # torch asks for setuptools, and the store's client is an extra of its own.
        assert not (set(versions(lock)) & tools) - {"setuptools", "s3fs"}, lock
