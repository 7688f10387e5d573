"""Two bare hosts in network namespaces of their own, joined by a bridge; nothing of them is seen from the machine's network."""

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NET = "10.78.0"
PYTHON_DIR = str(Path(sys.executable).parent)


@dataclass
class Hosts:
    """Hosts h1 and h2. `switch` holds the bridge between them."""

    folder: Path
    holders: dict[str, int] = field(default_factory=dict)

    def enter(self, host: str, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        return ["nsenter", "-t", str(self.holders[host]), "-n", "-u", "-m", "--", *command]

    def run(self, host: str, command: str) -> None:
        """Run a shell line on a host to its end."""
        done = subprocess.run(
            self.enter(host, "sh", "-c", command), capture_output=True, text=True, timeout=30, check=False, env=environment()
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def start(self, host: str, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, its output added to `log`, in a process group of its own."""
        line = f"cd {shlex.quote(str(self.folder))} && exec {shlex.join(command)}"
        with log.open("ab") as output:
            return subprocess.Popen(
                self.enter(host, "sh", "-c", line),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment(), "OMP_NUM_THREADS": "1", **variables},
                start_new_session=True,
            )

    def cut_link(self) -> None:
        """Nothing passes between the hosts any more; no connection is told so."""
        self.run("switch", "ip link set v2 down")

    def mend_link(self) -> None:
        """Everything passes again."""
        self.run("switch", "ip link set v2 up")


def environment() -> dict[str, str]:
    """Ours, without what a launcher or a test left in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SHARDLINE_", "PROCS", "PET_"))}
    return {**kept, "PATH": f"{PYTHON_DIR}:{os.environ['PATH']}:/usr/sbin:/sbin"}


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make the hosts; they and everything that runs on them vanish at the end."""
    hosts = Hosts(folder)
    names = folder / "hosts"
    names.write_text(f"127.0.0.1 localhost\n{NET}.11 h1\n{NET}.12 h2\n")
    started: list[subprocess.Popen[bytes]] = []
    try:
        for host in ("switch", "h1", "h2"):
            ready = folder / f"{host}.ready"
            ready.unlink(missing_ok=True)
            setup = f"hostname {host}; mount --bind {names} /etc/hosts; ip link set lo up; touch {ready}; exec sleep infinity"
            command = ["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-c", setup]
            holder = subprocess.Popen(command, env=environment(), start_new_session=True)
            started.append(holder)
            hosts.holders[host] = holder.pid
            wait_for(ready)
        hosts.run("switch", "ip link add br0 type bridge && ip link set br0 up")
        for number, host in enumerate(("h1", "h2"), start=1):
            hosts.run("switch", f"ip link add v{number} type veth peer name eth0 netns {hosts.holders[host]}")
            hosts.run("switch", f"ip link set v{number} master br0 up")
            hosts.run(host, f"ip addr add {NET}.{10 + number}/24 dev eth0; ip link set eth0 up")
        yield hosts
    finally:
        for holder in started:
            holder.kill()
            holder.wait()


def wait_for(path: Path) -> None:
    """Poll until a file is there."""
    from tests.processes import wait_until

    wait_until(path.exists, str(path), seconds=20)
