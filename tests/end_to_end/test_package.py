"""The wheel, as somebody who has no checkout gets it."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_wheel_ships_the_configurations_and_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pipeline", "configs", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(REPOSITORY / name), str(source)], check=True, timeout=20)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(source)], check=True, capture_output=True, timeout=120)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pipeline.config as config; "
        "print(config.__file__); print(*config.bundled_configs()); print(config.find_config('digits'))"
    )
    said = subprocess.check_output([sys.executable, "-c", script, str(tmp_path / "site")], text=True, cwd=tmp_path, timeout=20)
    site = tmp_path / "site/pipeline"
    assert said.splitlines() == [
        str(site / "config.py"),
        "cifar10 digits finetune-alexnet folder imagenet-4x8 imagenet-8gpu multilabel",
        str(site / "configs/digits.yaml"),
    ]
    assert (site / "export/web/index.html").is_file()
    assert (tmp_path / "site/bin/shardline").is_file()
