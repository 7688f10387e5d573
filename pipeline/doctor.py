"""`shardline doctor`: what a long job would trip over, found in seconds and on every machine that would take part.

It runs under the launcher of the training itself, so it meets the same network, limits and file systems. The first rank of each
machine looks at the machine; all ranks together look at what lies between them. Rank 0 tells.
"""

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import pipeline
from pipeline import accelerator, distributed
from pipeline.config import Config
from pipeline.console import show_marked
from pipeline.data import native
from pipeline.data.cache import require_room
from pipeline.data.dataset import ShardDataset
from pipeline.data.order import local_batch_size
from pipeline.errors import GateError, ShardlineError
from pipeline.files import locked, sha256_of, write_json
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.models.sequential import count_parameters, network_for
from pipeline.pretraining import spec_for
from pipeline.remote import is_url

Grade = Literal["green", "yellow", "red", "skipped"]
RESULT = "doctor.json"
RENDEZVOUS_SECONDS = 120.0
MEET_REMEDY = "Is the first machine up, its port open, and PET_MASTER_ADDR a name that every machine knows?"
DISK_TEST_BYTES = 64 << 20
SLOW_DISK_MB_PER_SECOND = 20.0
FEW_OPEN_FILES = 4096
CLOCK_YELLOW_SECONDS, CLOCK_RED_SECONDS = 1.0, 60.0
SAMPLES_OF_A_SPLIT = 8
ALL_REDUCE_BYTES = 32 << 20
ALL_REDUCE_ROUNDS = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Red means that a job would fail or lose work; yellow, that it would be slow."""

    grade: Grade
    found: str
    remedy: str = ""
    check: str = ""
    host: str = ""


@dataclass(frozen=True)
class Patient:
    """What is examined: a configuration, and its data set if there is one."""

    config: Config
    manifest: DatasetManifest | None

    @property
    def checkpoint_bytes(self) -> int:
        """Room for every checkpoint that is kept and one that is being written: weights, an average, Adam's two moments."""
        return 4 * 4 * self.num_parameters * (self.config.trainer.keep_best + self.config.trainer.keep_last + 1)

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, 0 where no data set says how many classes it has."""
        if self.manifest is None:
            return 0
        with torch.device("meta"):
            network = network_for(self.config, self.manifest, spec_for(self.config, self.manifest), pretrained=False)
        return count_parameters(network)


Check = Callable[[Patient], Finding]
NO_DATA_SET = Finding("skipped", "no data set to tell from")


def examine(config: Config) -> None:
    """Examine as one rank. Raises GateError on rank 0 when something is red."""
    patient = _patient_of(config)
    is_first_here = distributed.local_rank() == 0
    findings = [_look(check, patient) for check in MACHINE_CHECKS] if is_first_here else []
    try:
        distributed.join_group(timedelta(seconds=RENDEZVOUS_SECONDS))
    except Exception as error:
        why = f"the processes could not meet: {' '.join(str(error).split())[:200]}"
        if is_first_here:
            _tell(config, [*findings, Finding("red", why, MEET_REMEDY, "rendezvous")])
        raise GateError(why) from error
    everyone: list[list[Finding]] = [[] for _ in range(distributed.world_size())]
    dist.all_gather_object(everyone, findings)
    together = [_look(check, patient) for check in JOINT_CHECKS]
    dist.barrier()
    if distributed.rank() == 0:
        _tell(config, [*(finding for each in everyone for finding in each), _look(_mlflow, patient), *together])


def examine_alone(config: Config, why: str) -> None:
    """Examine this machine where no other can be met, which is red. Raises GateError."""
    patient = _patient_of(config)
    _tell(config, [*(_look(check, patient) for check in MACHINE_CHECKS), Finding("red", why, check="rendezvous")])


def _patient_of(config: Config) -> Patient:
    try:
        return Patient(config, load_dataset(config.dataset_location, config.data.cache_folder))
    except ShardlineError:
        return Patient(config, None)  # `data set` says why


def _look(check: Check, patient: Patient) -> Finding:
    try:
        found = check(patient)
    except ShardlineError as error:
        found = Finding("red", str(error))
    except Exception as error:  # whatever goes wrong here would go wrong in the job
        found = Finding("red", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return dataclasses.replace(found, check=check.__name__.strip("_").replace("_", " "), host=socket.gethostname())


def _tell(config: Config, findings: list[Finding]) -> None:
    several = len({finding.host for finding in findings if finding.host}) > 1
    colours = {"green": "green", "yellow": "yellow", "red": "bold red", "skipped": "dim"}
    names = [f"{finding.check} on {finding.host}" if several and finding.host else finding.check for finding in findings]
    rows: list[tuple[str, str, str]] = []
    for name, finding in zip(names, findings, strict=True):
        remedy = f". {finding.remedy}" if finding.remedy and finding.grade in ("yellow", "red") else ""
        rows.append((finding.grade, colours[finding.grade], f"{name:<{max(map(len, names))}}  {finding.found}{remedy}"))
    show_marked(rows)
    Path(config.runs_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.runs_dir) / RESULT, [dataclasses.asdict(finding) for finding in findings])
    red = sorted({finding.check for finding in findings if finding.grade == "red"})
    if red:
        raise GateError(f"not fit for a long job: {', '.join(red)}. Mend what is red above, then run doctor again.")


# ---- what each machine looks at ----


def _torch(_patient: Patient) -> Finding:
    versions = f"torch {torch.__version__}, shardline {pipeline.__version__}"
    if not accelerator.num_gpus():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return Finding("green", f"{versions}, on the CPU ({built}; no GPU is visible)")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return Finding("green", f"{versions}, CUDA {torch.version.cuda}, NCCL {nccl}, driver {_driver()}")


def _driver() -> str:
    with contextlib.suppress(OSError, IndexError):
        words = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module", 1)[1].split()
        return next(word for word in words if word[0].isdigit())
    return "unknown"


def _gpus(patient: Patient) -> Finding:
    number = accelerator.num_gpus()
    if not number:
        return Finding("skipped", "none; training runs on the CPU, over gloo")
    accelerator.require_possible(patient.config.trainer)
    found = []
    for each in range(number):
        device = torch.device("cuda", each)
        ones = torch.ones(256, 256, device=device)
        if float((ones @ ones).sum()) != 256.0**3:
            return Finding("red", f"GPU {each} computes wrong sums", "Take it out of service.")
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        found.append((properties.name, total >> 30, free / total))
    kinds = {(name, total) for name, total, _ in found}
    words = f"{number} x " + ", ".join(f"{name} {total} GiB" for name, total in sorted(kinds))
    if len(kinds) > 1:
        return Finding("yellow", words, "Different GPUs wait for the slowest.")
    if min(free for _, _, free in found) < 0.9:
        return Finding("yellow", f"{words}, partly in use", "Another job holds memory there.")
    return Finding("green", words)


def _cores(patient: Patient) -> Finding:
    cores, ranks = len(os.sched_getaffinity(0)), distributed.local_world_size()
    wanted = ranks * (1 + patient.config.data.num_workers)
    found = f"{cores} for {ranks} processes with {patient.config.data.num_workers} loader processes each"
    if cores < ranks:
        return Finding("yellow", found, "Give the job a core for each process (--cpus-per-task).")
    return Finding("green" if cores >= wanted else "yellow", found, "More loader processes than cores do not help.")


def _decoder(patient: Patient) -> Finding:
    found = native.describe(patient.config.data.decoder)
    if patient.config.data.augment.crop_scale == 1:
        return Finding("green", f"{found} (not used: this configuration takes no random crops)")
    return Finding("green" if native.is_built() else "yellow", found, f"{native.HOW_TO_BUILD}; it takes less time.")


def _shared_memory(patient: Patient) -> Finding:
    free, data = shutil.disk_usage("/dev/shm").free, patient.config.data  # noqa: S108 - the place itself is meant
    if not data.num_workers:
        return Finding("green", f"{_size(free)} free; without loader processes none is needed")
    if patient.manifest is None:
        return NO_DATA_SET
    size = spec_for(patient.config, patient.manifest).fixed_size
    assert size is not None
    batch = local_batch_size(data.micro_batch_size, distributed.world_size()) * 3 * size[0] * size[1]
    needed = distributed.local_world_size() * data.num_workers * (data.prefetch_factor + 1) * batch
    found = f"{_size(free)} free, about {_size(needed)} needed for batches on their way"
    remedy = "Start the container with --shm-size, or lower `data.num_workers`."
    return Finding("green" if free > needed else "red", found, remedy)


def _open_files(_patient: Patient) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding(
        "green" if soft >= FEW_OPEN_FILES else "yellow", f"{soft:,} at once (hard limit {hard:,})", "ulimit -n 65536"
    )


def _run_folder(patient: Patient) -> Finding:
    folder = Path(patient.config.runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as own, locked(Path(own) / "lock"):
        speed = _write_speed(Path(own))
    free, needed = shutil.disk_usage(folder).free, patient.checkpoint_bytes
    found = f"{folder}: {_size(free)} free, {_size(needed)} needed for checkpoints, {speed:,.0f} MB/s written and synced"
    if free < needed:
        return Finding("red", found, "Free some space, or lower `trainer.keep_best`.")
    grade: Grade = "green" if speed >= SLOW_DISK_MB_PER_SECOND else "yellow"
    return Finding(grade, found, "Every checkpoint waits for this disk.")


def _write_speed(folder: Path) -> float:
    """MB/s of a file written in pieces and synced to the disk, then removed."""
    piece = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as file:
        began = time.monotonic()
        for _ in range(DISK_TEST_BYTES >> 20):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return DISK_TEST_BYTES / 1e6 / (time.monotonic() - began)


def _cache_folder(patient: Patient) -> Finding:
    manifest, data = patient.manifest, patient.config.data
    if manifest is None:
        return NO_DATA_SET
    remote = [shard for split in manifest.splits.values() for shard in split.shards if manifest.url or is_url(shard.name)]
    if not remote:
        return Finding("skipped", "the shards are local files")
    require_room(manifest, data)
    data.cache_folder.mkdir(parents=True, exist_ok=True)
    free, wanted = shutil.disk_usage(data.cache_folder).free, sum(shard.num_bytes for shard in remote)
    found = f"{data.cache_folder}: {_size(free)} free, {_write_speed(data.cache_folder):,.0f} MB/s written and synced"
    fits = min(free, int(data.cache_gigabytes * 1e9)) >= wanted
    remedy = f"The shards ({_size(wanted)}) do not fit: they will be fetched again every epoch."
    return Finding("green" if fits else "yellow", found, remedy)


def _data_set(patient: Patient) -> Finding:
    config = patient.config
    began, seen = time.monotonic(), 0
    manifest = patient.manifest or load_dataset(config.dataset_location, config.data.cache_folder)
    spec = spec_for(config, manifest)
    for name, split in manifest.splits.items():
        if name not in manifest.streams:
            dataset = ShardDataset(manifest, name, spec, config=config.data)
            for number in random.sample(range(split.num_samples), min(SAMPLES_OF_A_SPLIT, split.num_samples)):
                dataset[number]
                seen += 1
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    local = [shard for shard in shards if not manifest.url and not is_url(shard.name)]
    hashed = ""
    if local:
        shard = random.choice(local)  # noqa: S311 - any will do
        if sha256_of(manifest.folder / shard.name) != shard.sha256:
            return Finding("red", f"{manifest.folder / shard.name} is not what the manifest says", "Run `shardline verify`.")
        hashed = f", {shard.name} re-hashed"
    number = sum(split.num_samples for split in manifest.splits.values())
    found = f"{config.dataset_location}: {number:,} samples, digest {manifest.digest[:12]}; {seen} read{hashed}"
    return Finding("green", f"{found} in {time.monotonic() - began:.1f} s")


MACHINE_CHECKS: tuple[Check, ...] = (
    _torch,
    _gpus,
    _cores,
    _decoder,
    _shared_memory,
    _open_files,
    _run_folder,
    _cache_folder,
    _data_set,
)


def _mlflow(patient: Patient) -> Finding:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from pipeline.tracking.server import server_of

    server = server_of(patient.config)
    began = time.monotonic()
    number = len(server.client().search_experiments())
    return Finding("green", f"{server.uri}: {number} experiments, answered in {time.monotonic() - began:.1f} s")


# ---- what all ranks look at together ----


def _rendezvous(_patient: Patient) -> Finding:
    hosts: list[str] = [""] * distributed.world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    names = sorted(set(hosts))
    return Finding("green", f"{len(hosts)} processes on {len(names)} machine{'s' * (len(names) > 1)}: {', '.join(names[:8])}")


def _same_everywhere(patient: Patient) -> Finding:
    digest = patient.manifest.digest[:12] if patient.manifest else "none"
    mine = {"shardline": pipeline.__version__, "torch": torch.__version__}
    mine |= {"data set": digest, "configuration": patient.config.identity()[:12]}
    everyone: list[dict[str, str]] = [{}] * distributed.world_size()
    dist.all_gather_object(everyone, mine)
    different = [name for name in mine if len({each[name] for each in everyone}) > 1]
    words = [f"{name}: {', '.join(sorted({each[name] for each in everyone}))}" for name in different]
    found = "; ".join(words) or "versions, configuration and data set"
    return Finding("red" if different else "green", found, "Install and copy the same on every machine.")


def _one_run_folder(patient: Patient) -> Finding:
    """Whether all ranks see the file that rank 0 has just written."""
    path = Path(patient.config.runs_dir) / ".doctor-token"
    token = [os.urandom(8).hex(), ""]
    if distributed.rank() == 0:
        try:
            path.write_text(token[0])
        except OSError as error:  # the others must not be left waiting
            token[1] = f"{path}: {error.strerror}"
    dist.broadcast_object_list(token, src=0)
    if token[1]:
        return Finding("red", token[1], "The folder of runs must be writable.")
    deadline = time.monotonic() + 10.0  # network file systems show a new file after seconds
    while not (sees := path.is_file() and path.read_text() == token[0]) and time.monotonic() < deadline:
        time.sleep(0.2)
    views: list[tuple[str, bool]] = [("", False)] * distributed.world_size()
    dist.all_gather_object(views, (socket.gethostname(), sees))
    if distributed.rank() == 0:
        path.unlink(missing_ok=True)
    blind = sorted({host for host, saw in views if not saw})
    found = f"not seen by {', '.join(blind)}" if blind else f"{Path(patient.config.runs_dir).resolve()} is the same for all"
    return Finding("red" if blind else "green", found, "RUN must lie on a file system that every machine sees.")


def _clocks(_patient: Patient) -> Finding:
    """Difference between the machines' clocks, read right after a barrier."""
    readings = []
    for _ in range(5):
        dist.barrier()
        times = [0.0] * distributed.world_size()
        dist.all_gather_object(times, time.time())
        readings.append(max(times) - min(times))
    apart = statistics.median(readings)
    grade: Grade = "green" if apart < CLOCK_YELLOW_SECONDS else "yellow" if apart < CLOCK_RED_SECONDS else "red"
    return Finding(grade, f"at most {apart:.3f} s apart", "Set up time synchronisation (chrony, ntp).")


def _all_reduce(patient: Patient) -> Finding:
    """Sum and bandwidth of an all-reduce: of each byte 2 (n - 1) / n cross the slowest link ("bus bandwidth" of nccl-tests)."""
    ranks = distributed.world_size()
    if ranks == 1:
        return Finding("skipped", "one process")
    tensor = torch.full((ALL_REDUCE_BYTES // 4,), float(distributed.rank() + 1), device=accelerator.device())
    dist.all_reduce(tensor)
    expected = ranks * (ranks + 1) / 2
    if not bool((tensor == expected).all()):
        return Finding("red", f"wrong sum: {float(tensor[0])} instead of {expected}", "Look at the network and the GPUs.")
    seconds = []
    for _ in range(ALL_REDUCE_ROUNDS):
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(tensor.fill_(1.0))
        float(tensor[0])  # waits for a GPU
        seconds.append(time.monotonic() - began)
    rate = 2 * (ranks - 1) / ranks * ALL_REDUCE_BYTES / statistics.median(seconds)
    step = 2 * (ranks - 1) / ranks * 4 * patient.num_parameters / rate
    found = f"right, {rate / 1e9:.2f} GB/s over {dist.get_backend()}; this network's gradients take about {1000 * step:.1f} ms"
    return Finding("green", found)


JOINT_CHECKS: tuple[Check, ...] = (_rendezvous, _same_everywhere, _one_run_folder, _clocks, _all_reduce)


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
