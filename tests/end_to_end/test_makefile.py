"""The set-up: what it refuses, that it costs nothing the second time, and what it takes from another index."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the set-up reads, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def fake_python(folder: Path, script: str) -> Path:
    """An executable that stands for a Python or a pip, and writes down how it was called."""
    path = folder / "fake-python"
    path.write_text(f'#!/bin/bash\necho "$@" >> {folder}/calls\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make(clone: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Called from `make test`, these would speak of that make.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))} | variables
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=clone, env=environment, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]


def test_help_names_every_target(clone: Path) -> None:
    done = make(clone, "help")
    lines = (clone / "Makefile").read_text().splitlines()
    targets = [target for line in lines if line.startswith(".PHONY:") for target in line.split()[1:]]
    assert len(targets) > 20
    for target in targets:
        assert f"make {target} " in done.stdout


def test_an_old_python_is_one_line(clone: Path) -> None:
    python = fake_python(clone, 'case "$*" in --version) echo "Python 3.9.2";; *) exit 1;; esac')
    done = make(clone, "setup", f"PYTHON={python}")
    assert done.returncode == 2
    remedy = "name Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."
    assert errors(done) == [f"error: Python 3.9.2 is too old; {remedy}"]


def test_a_missing_venv_module_is_one_line(clone: Path) -> None:
    python = fake_python(clone, 'case "$*" in *venv*) exit 1;; esac')
    done = make(clone, "setup", f"PYTHON={python}")
    assert done.returncode == 2
    assert errors(done) == [f"error: {python} has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"]


def test_no_python_is_one_line(clone: Path) -> None:
    done = make(clone, "setup", "PYTHON=")
    assert done.returncode == 2
    assert errors(done) == ["error: no Python found; install Python 3.11 or newer with its venv module"]


def test_a_full_disk_is_one_line_before_anything_is_made(clone: Path) -> None:
    df = clone / "bin/df"
    df.parent.mkdir()
    df.write_text('#!/bin/bash\nprintf "Filesystem 1M Used Available\\n/dev/sda 9000 8713 287\\n"\n')
    df.chmod(0o755)
    python = fake_python(clone, ":")
    done = make(clone, "setup", f"PYTHON={python}", PATH=f"{df.parent}:{os.environ['PATH']}")
    assert done.returncode == 2
    remedy = "make room, or name another place: make VENV=/path"
    assert errors(done) == [f"error: .venv needs 7500 MB, and its disk has 287 MB left; {remedy}"]
    assert not (clone / ".venv").exists()
    assert "-m venv" not in (clone / "calls").read_text()


@pytest.fixture
def recorded(clone: Path) -> Path:
    """A checkout whose Python makes an environment with a pip that only writes down its arguments."""
    body = f'mkdir -p "${{@: -1}}/bin"; cp {clone}/fake-pip "${{@: -1}}/bin/pip"; cp {clone}/fake-pip "${{@: -1}}/bin/python"'
    fake_python(clone, f'case "$*" in "-m venv"*) {body};; esac')
    pip = clone / "fake-pip"
    pip.write_text(f'#!/bin/bash\necho "$@" >> {clone}/calls\n')
    pip.chmod(0o755)
    return clone


def installs(clone: Path) -> list[str]:
    return [line.split("--quiet ")[1] for line in (clone / "calls").read_text().splitlines() if line.startswith("install")]


def test_the_environment_is_built_from_the_lock_once(recorded: Path) -> None:
    setup = ("setup", f"PYTHON={recorded}/fake-python")
    assert make(recorded, *setup).returncode == 0
    assert installs(recorded) == [
        "--no-deps --require-hashes -r requirements.lock",
        "--no-deps --no-build-isolation --editable .",
    ]
    calls = (recorded / "calls").read_text()
    again = make(recorded, *setup)
    assert "Nothing to be done" in again.stdout
    assert (recorded / "calls").read_text() == calls


def test_torch_can_come_from_another_index(recorded: Path) -> None:
    index = "https://download.pytorch.org/whl/cpu"
    done = make(recorded, "setup", f"PYTHON={recorded}/fake-python", f"TORCH_INDEX={index}")
    assert done.returncode == 0, done.stderr
    first, torch, _ = installs(recorded)
    assert first == "--no-deps --require-hashes -r .venv/without-torch.lock"
    assert torch == f"--no-deps --index-url {index} torch==2.14.1 torchvision==0.29.1"
    kept = (recorded / ".venv/without-torch.lock").read_text()
    names = {line.split("==")[0] for line in kept.splitlines() if line[:1].isalpha()}
    locked = {line.split("==")[0] for line in (recorded / "requirements.lock").read_text().splitlines() if line[:1].isalpha()}
    gone = locked - names
    assert {"torch", "torchvision", "triton"} <= gone
    assert all(name in ("torch", "torchvision", "triton") or name.startswith(("nvidia-", "cuda-")) for name in gone)
    assert "lightning" in names


def test_a_failed_installation_is_tried_again(recorded: Path) -> None:
    (recorded / "fake-pip").write_text("#!/bin/bash\necho no network; exit 1\n")
    for _ in range(2):
        done = make(recorded, "setup", f"PYTHON={recorded}/fake-python")
        assert done.returncode == 2
        assert errors(done) == ["no network", "error: set-up failed; all of it is in .venv/setup.log"]


def test_without_npm_one_line_says_what_the_page_needs(clone: Path) -> None:
    (clone / "bin").mkdir()
    (clone / "bin/make").symlink_to(str(shutil.which("make")))
    done = make(clone, "web", PATH=str(clone / "bin"))
    assert done.returncode == 2
    assert errors(done) == ["error: npm is not installed (Debian, Ubuntu: apt-get install npm)"]


def test_a_package_that_is_not_the_pinned_one_is_not_unpacked(clone: Path) -> None:
    (clone / "bin").mkdir()
    npm = clone / "bin/npm"
    npm.write_text(
        '#!/bin/bash\nwhile [ "$1" != --pack-destination ]; do shift; done; echo other > "$2/$(basename "$3" | tr @ -).tgz"\n'
    )
    npm.chmod(0o755)
    done = make(clone, "web", PATH=f"{clone / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 2
    (line,) = errors(done)
    assert "is not the package that the Makefile expects: its sha512 differs" in line
    assert not (clone / "pipeline").exists()
    npm.write_text("#!/bin/bash\nexit 1\n")
    assert "its registry reachable?" in make(clone, "web", PATH=f"{clone / 'bin'}:{os.environ['PATH']}").stderr


def test_a_decoder_that_cannot_be_built_is_one_line_with_what_it_needs(clone: Path) -> None:
    programs = clone / ".venv/bin"
    programs.mkdir(parents=True)
    fake_python(programs, "exit 1").rename(programs / "python")
    (clone / ".venv/.ready").touch()
    done = make(clone, "native")
    assert done.returncode == 2
    (line,) = errors(done)
    assert line.startswith(
        "error: the native decoder was not built; install what it needs (Debian, Ubuntu: apt-get install gcc"
    )
