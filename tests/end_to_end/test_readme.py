"""Every command in the README does what it says, typed as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
# `make test` is what runs this test, and `make train` of the digits is the chain that test_chain.py looks at, verb by verb.
# PyTorch's own index is not reachable from everywhere; test_makefile.py looks at what the set-up takes from it.
ELSEWHERE = ("make train  ", "make test  ", "make setup TORCH_INDEX")


def commands() -> list[str]:
    """Every line of the README's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture
def clone(workspace: Path, tmp_path: Path) -> Path:
    """A folder that looks like a checkout after its set-up, with the digits' run and a folder of photographs."""
    for name in ("Makefile", "configs", "pipeline", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / ".venv/.ready").touch()
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "digits").symlink_to(workspace / name / "digits")
    (tmp_path / "runs/mlflow.db").symlink_to(workspace / "runs/mlflow.db")
    (tmp_path / "data/foreign").mkdir()
    for shard in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        (tmp_path / "data/foreign" / shard).symlink_to(workspace / "data/digits" / shard)
    for class_name, colour in (("cat", (200, 90, 60)), ("dog", (60, 90, 200))):
        folder = tmp_path / "images" / class_name
        folder.mkdir(parents=True)
        for number in range(24):
            shade = tuple(channel + number for channel in colour)
            Image.new("RGB", (150, 130 + number), shade).save(folder / f"{number}.jpg")
    return tmp_path


@pytest.mark.timeout(1200)  # a whole training among them
def test_every_command_runs(chain: dict[str, str], clone: Path) -> None:
    typed = [line for line in commands() if not line.startswith(ELSEWHERE)]
    assert len(typed) >= 5
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    # Two epochs instead of forty; everything else is as a reader types it.
    script = "\n".join(line.replace('ARGS="', 'ARGS="--trainer.max_epochs 2 ') for line in typed if not line.startswith(". "))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=clone, env=environment, capture_output=True, text=True, timeout=1100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data set verified" in done.stdout
    assert "model verified" in done.stdout
    assert (clone / "runs/pets/export/model.onnx").is_file()
    assert (clone / "runs/foreign/checkpoints/best.ckpt").is_file()
    assert (clone / "data/pets/inspect.html").is_file()
    assert (clone / "runs/digits/replay/step-00000100.png").is_file()
    assert re.search(r"images/cat/0.jpg\W+cat", done.stdout)


def test_the_tree_in_the_readme_is_the_tree() -> None:
    block = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"(\w+(?:\.py|/))", block))
    there = {path.name if path.is_file() else f"{path.name}/" for path in (REPOSITORY / "pipeline").iterdir()}
    there -= {"__pycache__/", "__init__.py"}
    assert there <= named, there - named
    assert {name for name in named if not (REPOSITORY / name).exists()} <= there


def test_the_verbs_in_the_readme_are_the_verbs() -> None:
    from pipeline.cli import VERBS

    assert re.findall(r"^\| `shardline (\w+)` \|", README, flags=re.MULTILINE) == list(VERBS)
