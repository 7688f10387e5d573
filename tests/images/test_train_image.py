"""The training image, built here without its gigabytes, and what Kubernetes starts in it.

torch and CUDA, all but one of their packages, are taken out of the lock for the build and mounted from this environment to run.
So every line of the Dockerfile is carried out, on a shorter list; not shown are the download of those packages, and a GPU.
"""

import os
import re
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from licenses import normalised

from tests.images.conftest import REPOSITORY, Engine, checkout

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]
HEAVY = re.compile(r"(torch|torchvision|triton|cuda-.*|nvidia-(?!nvtx$|ml-py$).*)")


@pytest.fixture(scope="module")
def image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image without torch and CUDA."""
    context = checkout(tmp_path_factory.mktemp("train") / "checkout")
    lock = context / "docker/train.lock"
    entries = re.findall(r"^\S.*?(?=^\S|\Z)", lock.read_text(), flags=re.MULTILINE | re.DOTALL)
    light = [entry for entry in entries if not HEAVY.fullmatch(entry.split("==")[0])]
    assert len(entries) - len(light) > 10
    lock.write_text("".join(light))
    return engine.build("train", context)


def mounts() -> list[str]:
    """What was taken out, from the environment of this test."""
    site = Path(sysconfig.get_paths()["purelib"])
    names = {
        file.parts[0]
        for package in distributions()
        if HEAVY.fullmatch(normalised(package.metadata["Name"]))
        for file in package.files or []
    }
    names -= {".."}  # programs, which lie elsewhere
    found = [f"--volume={site / name}:/heavy/{name}:ro" for name in sorted(names) if (site / name).is_dir()]
    return [*found, "--env=PYTHONPATH=/heavy"]


def test_it_can_reach_gpus_and_fast_networks(engine: Engine, image: str) -> None:
    config = engine.inspect(image)["Config"]
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(config["Env"])
    with engine.files_of(image) as root:
        assert list(root.glob("usr/lib/*/libibverbs.so.1")), "NCCL would take TCP"
        assert (root / "usr/bin/g++").exists(), "torch.compile has no compiler"
        left = ("var/lib/apt/lists", "root/.cache", "build", "tmp")
        assert not [path for name in left for path in root.glob(f"{name}/**/*") if not path.is_dir()]


def test_it_has_no_tools_of_development(engine: Engine, image: str) -> None:
    with engine.files_of(image) as root:
        names = {path.name for path in root.glob("opt/shardline/bin/*")}
    assert {"shardline", "mlflow"} <= names
    assert not names & {"pytest", "mypy", "ruff", "playwright", "weed", "hadolint"}


def test_the_command_of_the_kubernetes_job_trains_as_any_user(engine: Engine, image: str, tmp_path: Path) -> None:
    documents = yaml.safe_load_all((REPOSITORY / "configs/kubernetes/indexed-job/job.yaml").read_text())
    (job,) = [document for document in documents if document["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    work = tmp_path / "work"
    work.mkdir()
    os.chown(work, 4242, 4242)
    tmp_path.chmod(0o755)
    chain = tmp_path / "chain"
    chain.mkdir()
    (chain / "chain.sh").write_bytes((REPOSITORY / "configs/kubernetes/base/chain.sh").read_bytes())
    values = {"PET_NODE_RANK": "0", "PET_NNODES": "1", "PET_MASTER_ADDR": "127.0.0.1", "JOB_UID": "1", "PROCS": "2"}
    values |= {"HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    program, *arguments = list[str]([*container["command"], *container["args"]])
    options = [
        *mounts(), "--user=4242:4242", "--shm-size=256m", f"--entrypoint={program}",
        f"--volume={work}:/work", f"--volume={chain}:/etc/shardline:ro", *(f"--env={k}={v}" for k, v in values.items()),
    ]  # fmt: skip
    quick = ["--trainer.max_epochs=1", "--check.skip=[overfit]"]
    locked_down = ["--cap-drop=all", "--security-opt=no-new-privileges"]
    done = engine.run("podman", "run", "--rm", *locked_down, *options, image, *arguments, *quick, seconds=900)
    assert (work / "runs/digits/export/model.onnx").is_file(), done.stdout + done.stderr
    assert (work / "runs/digits/export/model.onnx").stat().st_uid == 4242
    assert "Traceback" not in done.stderr
