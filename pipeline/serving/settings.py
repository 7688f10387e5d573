"""What `shardline serve` can be told, and the limits that follow from it."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError

# Each connection may hold a body, and the kernel's buffers besides.
MAX_CONNECTIONS = 1024
# As nginx's: longer than the 60 s after which load balancers usually drop an idle connection, so that they close it, not we.
IDLE_SECONDS = 75.0
# A body that comes slower than this for longer than the time-out is an attack, or of no use to anybody.
MIN_BODY_BYTES_PER_SECOND = 64_000
MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
# Bodies that are being received or wait, over all connections of a worker, in multiples of the largest one.
BODIES_HELD = 32


def option(default: Any, help: str) -> Any:
    """A setting with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


def allowed_cpus() -> int:
    """CPUs that this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class ServeSettings:
    """The options of `shardline serve`. Raises ConfigError for a number that cannot work."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all of this machine's")
    port: int = option(8000, "port to listen on; 0 for any free one")
    workers: int = option(1, "processes that share the port: throughput; each holds the model")
    threads: int = option(0, "threads of a worker's model: latency; 0: its share of the CPUs")
    max_batch: int = option(32, "most images that go through the model at once")
    # 32 small images, or two photos of 3 ms each: then the first need not wait for the decoding of others.
    batch_delay_ms: float = option(5.0, "longest time that a batch is collected for; a lone request never waits")
    # A phone's photo is 3 to 8 MB.
    max_body_mb: float = option(10.0, "largest body of a request, in megabytes")
    # The largest sensor of a common phone; its pixels take 150 MB decoded.
    max_pixels_mp: float = option(50.0, "largest image, in megapixels, by its header")
    max_images: int = option(32, "most images of a request")
    max_queue: int = option(256, "most images that wait; a request beyond is answered 429 at once")
    timeout_seconds: float = option(10.0, "longest wait for a request's head, for its body, and for its answer")
    top_k: int = option(5, "classes in an answer, unless the request says ?top_k=")
    poll_seconds: float = option(5.0, "how often a new model is looked for")
    access_log: bool = option(False, "print one line of JSON for each request")

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65_535),
            ("workers", 1, 1_000),
            ("threads", 0, 1_000),
            ("max_batch", 1, 4_096),
            ("batch_delay_ms", 0, 1_000),
            ("max_body_mb", 0.001, 1_000),
            ("max_pixels_mp", 0.000_1, 100),
            ("max_images", 1, 4_096),
            ("max_queue", 1, 1_000_000),
            ("timeout_seconds", 0.1, 3_600),
            ("top_k", 1, 1_000_000),
            ("poll_seconds", 0.05, 86_400),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"`--{name.replace('_', '-')}` is {value}; it must be from {low:g} to {high:g}.")
        if self.max_images > self.max_queue:
            raise ConfigError(
                f"`--max-images` is {self.max_images}, but no more than {self.max_queue} can wait (`--max-queue`)."
            )

    @property
    def session_threads(self) -> int:
        """Threads of one worker's model."""
        return self.threads or max(1, allowed_cpus() // self.workers)

    @property
    def max_body_bytes(self) -> int:
        """Largest body of a request."""
        return int(self.max_body_mb * 1e6)

    @property
    def max_held_bytes(self) -> int:
        """Most bytes of bodies that a worker keeps at once."""
        return BODIES_HELD * self.max_body_bytes

    @property
    def max_pixels(self) -> int:
        """Largest image."""
        return int(self.max_pixels_mp * 1e6)
