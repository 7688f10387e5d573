"""Container images without a daemon: a base made of Debian's packages, buildah to build, podman and runc to run. All need root.

What only this machine needs (its certificates, limits of its sandbox) is given from outside; no Dockerfile knows of it.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
NEEDED = ("buildah", "podman", "runc", "mmdebstrap")
BASE = "localhost/shardline-test-base"
# What Debian's own slim images leave out: documentation, and the Perl that usrmerge, of no use any more, brings.
LEFT_OUT = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "info", "locale", "man")]
LEFT_OUT += ['--customize-hook=chroot "$1" apt-get --yes purge usrmerge perl perl-modules-5.36 libperl5.36']
LONGEST_BUILD_SECONDS = 1200
CONTAINERS_CONF = """
[containers]
netns = "host"
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
"""


@dataclass(frozen=True)
class Engine:
    """buildah and podman with a storage of their own."""

    environment: dict[str, str]

    def run(
        self, *command: str, seconds: float = 300.0, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of theirs to its end."""
        done = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def build(self, name: str, context: Path) -> str:
        """`make images` of one image from a checkout; the image's name."""
        options = [f"--build-arg=BASE={BASE}"]
        # pip has to believe this machine's certificates, where there are some of its own.
        options += [f"--volume={path}:{path}:ro" for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()]
        make = ["make", "--no-print-directory", "-C", str(context), "images", f"IMAGES={name}", "BUILDER=buildah"]
        self.run(*make, seconds=LONGEST_BUILD_SECONDS, BUILD_OPTIONS=" ".join(options))
        return f"localhost/shardline-{name}:latest"

    def inspect(self, image: str) -> dict[str, Any]:
        """What podman knows of an image."""
        return dict(json.loads(self.run("podman", "image", "inspect", image).stdout)[0])

    def healthcheck(self, image: str) -> list[str]:
        """The command of its health check, which podman's inspect leaves out."""
        config = json.loads(self.run("buildah", "inspect", "--type", "image", image).stdout)["Docker"]["config"]
        kind, *command = config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return list(command)

    def contained(
        self, image: str, *command: str, options: tuple[str, ...] = (), seconds: float = 300.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a container as the README tells to: nothing can be written but /tmp, no right can be had."""
        return self.run("podman", "run", "--rm", *LOCKED_DOWN, *options, image, *command, seconds=seconds, check=check)

    @contextlib.contextmanager
    def files_of(self, image: str) -> Iterator[Path]:
        """The root folder of an image."""
        container = self.run("buildah", "from", image).stdout.strip()
        try:
            yield Path(self.run("buildah", "mount", container).stdout.strip())
        finally:
            self.run("buildah", "rm", container)


# systemd, which would ask for a container's health, is not there in a test.
LOCKED_DOWN = ["--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges"]
LOCKED_DOWN += ["--no-healthcheck"]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A storage with nothing in it but the base, removed at the end."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or absent:
        pytest.skip(f"needs {', '.join(absent)}" if absent else "needs root, to build images without a daemon")
    folder = tmp_path_factory.mktemp("images")
    kind = subprocess.check_output(["stat", "--file-system", "--format=%T", str(folder)], text=True).strip()
    driver = "vfs" if kind.startswith("overlay") else "overlay"
    places = f'graphroot = "{folder}/storage"\nrunroot = "{folder}/state"\n'
    (folder / "storage.conf").write_text(f'[storage]\ndriver = "{driver}"\n{places}')
    (folder / "containers.conf").write_text(CONTAINERS_CONF)
    settings = {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "BUILDAH_ISOLATION": "chroot",
    }
    # Called from `make test-images`, a make of ours would speak of that make.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    made = Engine(kept | settings)
    try:
        packages = "--include=python3,python3-venv,ca-certificates,usr-is-merged"
        made.run("mmdebstrap", "--variant=minbase", packages, *LEFT_OUT, "bookworm", f"{folder}/base.tar", seconds=900)
        made.run("podman", "import", f"{folder}/base.tar", BASE, seconds=600)
        yield made
    finally:
        made.run("podman", "system", "reset", "--force", check=False)
        shutil.rmtree(folder, ignore_errors=True)


def checkout(folder: Path) -> Path:
    """A copy of what an image may be built from, with secrets lying about in it as in a used checkout."""
    folder.mkdir()
    for name in ("configs", "docker", "pipeline"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dockerignore", "LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements.lock", "setup.py"):
        shutil.copy(REPOSITORY / name, folder)
    for planted in ("team.env", "data/private.jpg", "runs/mlflow.db", ".git/config", "configs/.env", ".venv/secret"):
        path = folder / planted
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("planted-secret\n")
    return folder


@contextlib.contextmanager
def at_work(
    engine: Engine, image: str, *command: str, options: tuple[str, ...], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A container in the background, locked down; it is stopped by the signal that an orchestrator sends."""
    start = ["podman", "run", "--rm", *LOCKED_DOWN, *options, image, *command]
    with log.open("wb") as output:
        process = subprocess.Popen(start, env=engine.environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
