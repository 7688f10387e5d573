"""The Dockerfiles as they stand: what can be said of an image before it is built. (tests/images builds and runs them.)"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
HADOLINT = str(Path(sys.executable).with_name("hadolint"))


def instructions(path: Path, name: str) -> list[str]:
    """The arguments of every instruction `name`, continued lines joined."""
    text = path.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", text, flags=re.MULTILINE)


def copied(path: Path) -> list[str]:
    """What a Dockerfile takes from the repository."""
    return [source for line in instructions(path, "COPY") if "--from" not in line for source in line.split()[:-1]]


def test_there_is_an_image_for_each_purpose() -> None:
    assert [path.stem for path in DOCKERFILES] == ["mlflow", "serve", "train"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([HADOLINT, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_a_planted_mistake(tmp_path: Path) -> None:
    bad = tmp_path / "bad.Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /tmp && pip install numpy\n")
    done = subprocess.run([HADOLINT, str(bad)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert {"DL3007", "DL3013"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_each_starts_from_the_same_pinned_base_which_can_be_replaced(path: Path) -> None:
    assert instructions(path, "ARG")[0] == "BASE=python:3.11.15-slim-bookworm"
    assert {line.split()[0] for line in instructions(path, "FROM")} <= {"${BASE}", "packages"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_each_ends_as_a_user_without_rights_whom_kubernetes_can_check(path: Path) -> None:
    (user,) = instructions(path, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "runAsNonRoot needs a number"
    last = path.read_text().split("\nUSER ")[1]
    assert not re.search(r"^(RUN|COPY|ADD) ", last, flags=re.MULTILINE)
    assert any("HOME=/tmp" in line and "USER=" in line for line in instructions(path, "ENV")), "a user without a name or a home"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_every_package_that_pip_fetches_has_its_hash(path: Path) -> None:
    lines = [line for run in instructions(path, "RUN") for line in run.split("&&") if re.search(r"\bpip\b.* install ", line)]
    assert lines
    for line in lines:
        assert "--no-deps" in line
        local = line.strip().endswith((" .", "dist/*.whl"))
        assert local or "--require-hashes" in line, line


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_they_copy_is_there_and_let_in(path: Path) -> None:
    rules = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    assert copied(path)
    for source in copied(path):
        assert (REPOSITORY / source).exists(), source
        assert source.split("/")[0] in let_in, f".dockerignore keeps {source} out"


def test_nothing_gets_into_an_image_unless_it_is_named() -> None:
    rules = [rule for rule in (REPOSITORY / ".dockerignore").read_text().splitlines() if not rule.startswith("#")]
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    assert set(let_in) == {source.split("/")[0] for path in DOCKERFILES for source in copied(path)}


def test_code_is_copied_after_the_packages_so_that_they_stay_as_they_are() -> None:
    for name, large in (("serve", "docker/serve.lock"), ("train", "docker/train.lock")):
        sources = copied(REPOSITORY / f"docker/{name}.Dockerfile")
        assert sources.index(large) < sources.index("pipeline")


def test_what_the_serving_image_starts_is_a_verb_on_the_port_that_it_exposes() -> None:
    path = REPOSITORY / "docker/serve.Dockerfile"
    assert instructions(path, "ENTRYPOINT") == ['["shardline"]']
    assert instructions(path, "EXPOSE") == ["8000"]
    (check,) = instructions(path, "HEALTHCHECK")
    assert "http://127.0.0.1:8000/ready" in check


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (
            ["nothing"],
            {"BUILDER": "true"},
            "there is no docker/nothing.Dockerfile; there are: mlflow.Dockerfile",
        ),
        (["serve"], {"BUILDER": "kaniko"}, "kaniko is not installed, or its daemon does not answer; name another one"),
        (["serve"], {"PATH": "{tools}"}, "nothing here can build images; install docker, podman or buildah"),
    ],
)
def test_a_build_that_cannot_be_is_one_line(
    arguments: list[str], environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    given = {name: value.format(tools=tmp_path) for name, value in {"PATH": "/usr/bin:/bin", **environment}.items()}
    script = str(REPOSITORY / "docker/build.sh")
    done = subprocess.run(["/bin/bash", script, *arguments], env=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
