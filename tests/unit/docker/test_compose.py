"""The team server's compose file: what an operator relies on without reading it. (test_team_server.py runs it.)"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]
TEXT = (REPOSITORY / "docker/compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# Of the compose specification; anything else is refused by docker compose.
KNOWN_KEYS = {
    "build",
    "cap_drop",
    "command",
    "depends_on",
    "environment",
    "healthcheck",
    "image",
    "logging",
    "ports",
    "profiles",
    "read_only",
    "restart",
}
KNOWN_KEYS |= {"security_opt", "shm_size", "stop_grace_period", "tmpfs", "user", "volumes"}
REQUIRED = re.compile(r"\$\{(\w+):\?set it in team\.env\}")


def test_the_file_has_only_keys_that_compose_knows() -> None:
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services", "volumes"}
    for name, service in SERVICES.items():
        assert set(service) <= KNOWN_KEYS, name


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_watched_restarted_and_cannot_write_to_its_image(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert set(service["healthcheck"]) == {"test", "interval", "timeout", "retries", "start_period"}
    assert service["healthcheck"]["test"][0] == "CMD"
    assert re.fullmatch(r"[a-z/-]+:\d[\w.-]*", service["image"]), "an image without a version changes under its users"
    for volume in service.get("volumes", []):
        assert volume.split(":")[0] in COMPOSE["volumes"]


def test_secrets_come_from_the_environment_and_have_no_default() -> None:
    for name, service in SERVICES.items():
        for variable, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|KEY", variable):
                assert REQUIRED.fullmatch(value), f"{name}: {variable}"
        in_command = set(re.findall(r"\$\{(\w+)", str(service.get("command"))))
        assert in_command <= {"SERVE_MODEL"}, "a command line can be read by everybody on the machine"
    assert set(re.findall(r"\$\{(\w+)(?!\w*:\?)", TEXT)) == {"MLFLOW_PORT", "SERVE_MODEL", "SERVE_PORT"}


def test_only_what_people_use_is_published_and_only_on_this_machine() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "mlflow": ["127.0.0.1:${MLFLOW_PORT:-5000}:5000"],
        "serve": ["127.0.0.1:${SERVE_PORT:-8000}:8000"],
    }


def test_what_serves_starts_only_when_asked_has_no_rights_and_reads_with_an_account_of_its_own() -> None:
    service = SERVICES["serve"]
    assert [name for name, other in SERVICES.items() if "profiles" in other] == ["serve"]
    assert service["profiles"] == ["serve"]
    assert service["cap_drop"] == ["ALL"]
    assert service["environment"]["MLFLOW_TRACKING_USERNAME"] == "serve"
    docs = (REPOSITORY / "docs/tracking.md").read_text()
    assert re.search(r'\\"serve\\".*users/create$', docs, flags=re.MULTILINE), "how the account is made"
    (address,) = [option.partition("=")[2] for option in service["command"] if option.startswith("--tracking.uri=")]
    host = address.removeprefix("http://")
    assert f",{host}," in SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"], "MLflow refuses other names"


def test_the_serving_image_is_named_after_the_version_of_the_project() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert SERVICES["serve"]["image"] == f"shardline-serve:{version}"


def test_the_image_is_named_after_the_version_in_the_lock_file() -> None:
    (version,) = re.findall(r"^mlflow==(\S+)", (REPOSITORY / "requirements.lock").read_text(), flags=re.MULTILINE)
    for path in ("docker/compose.yaml", "docker/mlflow.Dockerfile"):
        assert re.findall(r"shardline-mlflow:(\S+)", (REPOSITORY / path).read_text()) == [version], path


def test_the_documentation_sets_every_variable_that_is_asked_for() -> None:
    (block,) = re.findall(r"cat > team\.env <<END\n(.*?)\nEND", (REPOSITORY / "docs/tracking.md").read_text(), flags=re.DOTALL)
    assert {line.split("=")[0] for line in block.splitlines()} == set(REQUIRED.findall(TEXT))


def test_secrets_and_backups_of_the_documentation_get_into_no_commit_and_no_image() -> None:
    written = set(re.findall(r"(?<!-)> (\w+\.\w+)", (REPOSITORY / "docs/tracking.md").read_text()))
    assert written == {"team.env", "mlflow.dump", "store.tar"}
    assert written <= {line.lstrip("/") for line in (REPOSITORY / ".gitignore").read_text().splitlines()}
    rules = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in rules, "an image gets only what is let in by name"
    assert not written & {rule.removeprefix("!") for rule in rules}
