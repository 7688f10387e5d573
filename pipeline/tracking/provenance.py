"""Where a run comes from: code, packages, machine, command and data, as tags, parameters and data sets of MLflow."""

import getpass
import hashlib
import json
import operator
import os
import platform
import shlex
import socket
import sys
import typing
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config import Config, settings_of
from pipeline.manifest import DatasetManifest
from pipeline.run import RunRecord
from pipeline.tracking.journal import Entry
from pipeline.tracking.server import without_credentials

JOB_TAG = "shardline.job_id"
# What two runs of a project usually differ in; a setting that is not its default comes on top of them. MLflow's page prints
# all parameters above each picture and so leaves little of it when they are many or long; config.yaml has every setting.
COMPARED = ("data.global_batch_size", "model.name", "optimizer.lr", "optimizer.name", "seed", "trainer.max_epochs")
SECTIONS = ("seed", "data.", "model.", "loss.", "optimizer.", "scheduler.", "trainer.")
DIGEST_LENGTH = 36  # as much as MLflow takes
VALUE_LENGTH = 250


def describe_run(record: RunRecord) -> dict[str, str]:
    """Tags that say by which code, packages, command and machine the record's job is done."""
    return {**_code_tags(record), **_machine_tags(record)}


def settings(config: Config) -> dict[str, Any]:
    """The whole configuration, fit to be shown to others."""
    return typing.cast(dict[str, Any], _without_credentials(config.as_dict()))


def parameters(config: Config) -> dict[str, str]:
    """The settings that a reviewer compares, and every other one that shapes the training and is not its default."""
    plain = Config()
    found: dict[str, str] = {}
    for key, _, item in settings_of(Config):
        value, default = operator.attrgetter(key)(config), operator.attrgetter(key)(plain)
        chosen = key.startswith(SECTIONS) and item.metadata["identity"] and value != default
        if key in COMPARED or chosen:
            values = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
            found |= {name: without_credentials(str(each))[:VALUE_LENGTH] for name, each in values.items()}
    return _with_short_names(found)


def _with_short_names(values: dict[str, str]) -> dict[str, str]:
    """`optimizer.args.momentum` as `momentum`, `model.name` as `model`; where two would be the same, the whole key."""
    short = {key: key.removesuffix(".name").rpartition(".")[2] for key in values}
    count = Counter(short.values())
    return {short[key] if count[short[key]] == 1 else key: value for key, value in values.items()}


def _code_tags(record: RunRecord) -> dict[str, str]:
    tags = {JOB_TAG: record.job_id, "shardline.data_digest": record.data_digest}
    if record.git["commit"]:
        tags |= {"mlflow.source.git.commit": record.git["commit"], "git.dirty": str(record.git["dirty"]).lower()}
    command = without_credentials(shlex.join(["shardline", *sys.argv[1:]]))
    return tags | {
        "mlflow.source.name": command[:VALUE_LENGTH],
        "mlflow.user": user_name(),
        "mlflow.source.type": "LOCAL",
        "packages.sha256": packages_sha256(),
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("shardline", "torch", "lightning", "mlflow")),
    }


def user_name() -> str:
    """Who runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        return "unknown"


def packages_sha256() -> str:
    """Digest of the lock file that this checkout was set up from, or, without one, of the installed packages."""
    lock = Path(__file__).parent.parent.parent / "requirements.lock"
    if lock.is_file():
        return hashlib.sha256(lock.read_bytes()).hexdigest()
    installed = sorted({f"{each.name}=={each.version}" for each in metadata.distributions()})
    return hashlib.sha256("\n".join(installed).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?"


def _machine_tags(record: RunRecord) -> dict[str, str]:
    from pipeline import accelerator  # imports torch, which every verb that tracks has by now

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    hardware = [f"{len(os.sched_getaffinity(0))} cores of {_processor()}", f"{memory:.0f} GiB", *accelerator.names()]
    tags = {"hardware": ", ".join(hardware), "host": socket.gethostname()}
    return tags | ({"world_size": str(record.world_size)} if record.world_size else {})


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_dataset(manifest: DatasetManifest) -> list[Entry]:
    """The splits of a data set as MLflow's run page shows them: where from, how many of which class, what a sample holds."""
    location = without_credentials(manifest.url or str(manifest.folder.resolve()))
    label = "labels" if manifest.task == "multi" else "label"
    columns = [
        {"name": "image", "type": "binary", "required": True},
        {"name": label, "type": "long", "required": True},
    ]
    found = []
    for name, split in manifest.splits.items():
        counts = dict(zip(manifest.class_names, split.class_counts, strict=False))
        profile = {"num_samples": split.num_samples, "num_shards": len(split.shards), "class_counts": counts}
        found.append(
            {
                "name": f"{Path(location).name}/{name}",
                "digest": manifest.digest[:DIGEST_LENGTH],
                "source_type": location.partition("://")[0] if "://" in location else "local",
                "source": json.dumps({"uri": location}),
                "profile": json.dumps(profile),
                "schema": json.dumps({"mlflow_colspec": columns}),
                "context": name,
            }
        )
    return found


def _without_credentials(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_credentials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_credentials(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value
