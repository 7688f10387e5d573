"""Good and bad clients of a server at once: `python -m tests.load JSON` loads it and says what came of every request.

A process of its own, so that it waits for nobody's interpreter. Good clients ask in every form that the server knows and
compare each answer with what the model says; bad ones go through tests/hostile.py. In the end the server gets a SIGTERM,
while requests are on their way.
"""

import asyncio
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.bench.load import Answer, Connection, quantile
from pipeline.bench.servers import post
from pipeline.files import sha256_of
from pipeline.predictor import Predictor
from pipeline.preprocess import decode_image
from tests.hostile import Attack, Outcome, attacks, part

Rows = npt.NDArray[np.float64]  # (N, K)
# The server runs the same session on other batches; onnxruntime's sums then differ in their last bits.
MOST_ABS = 1e-5
PAUSE_SECONDS = 0.02  # between the attacks of one attacker
SHOWN = 10


@dataclass(frozen=True)
class Plan:
    """What to do to a server."""

    port: int
    models: list[str]  # files that may answer: the one served, and those that replace it
    images: list[str]  # encoded files
    clients: int
    attackers: int
    seconds: float
    timeout_seconds: float  # of the server, for a request
    stop: int  # the server's process


@dataclass
class Tally:
    """What came of it."""

    answered: Counter[str] = field(default_factory=Counter)  # by form
    by_model: Counter[str] = field(default_factory=Counter)  # by the sha256 that an answer names
    failures: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    attacks: dict[str, Counter[str]] = field(default_factory=dict)
    survived: list[str] = field(default_factory=list)  # attacks that were answered as they must not be
    in_flight_at_stop: int = 0

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        milliseconds = {f"p{percent}_ms": quantile(self.latencies, percent / 100) * 1e3 for percent in (50, 90, 99, 100)}
        return {
            **milliseconds,
            "answered": dict(self.answered),
            "by_model": dict(self.by_model),
            "num_failures": len(self.failures),
            "failures": self.failures[:SHOWN],
            "attacks": {name: dict(outcomes) for name, outcomes in self.attacks.items()},
            "wrong_outcomes": self.survived,
            "in_flight_at_stop": self.in_flight_at_stop,
        }


@dataclass(frozen=True)
class Case:
    """A good request: its bytes, which images it is about, and how their probabilities are read from each answer to it."""

    form: str
    request: bytes
    rows: list[int]
    read: Callable[[Answer], tuple[str | None, Rows]]
    num_answers: int = 1


def read_predictions(answer: Answer) -> tuple[str | None, Rows]:
    """Model and probabilities of /predict and /predict/tensor."""
    content = json.loads(answer.body)
    rows = [[*prediction["probabilities"].values()] for prediction in content["predictions"]]
    return content["model"]["sha256"], np.array(rows)


def read_v2(answer: Answer) -> tuple[str | None, Rows]:
    """Probabilities of an answer in JSON of the V2 protocol, which does not name the file."""
    (output,) = [each for each in json.loads(answer.body)["outputs"] if each["name"] == "probabilities"]
    return None, np.array(output["data"]).reshape(output["shape"])


def read_v2_binary(answer: Answer) -> tuple[str | None, Rows]:
    """The same in its binary extension."""
    length = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.body[:length])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(answer.body) - length, output
    return None, np.frombuffer(answer.body[length:], np.float32).reshape(output["shape"]).astype(np.float64)


def cases(name: str, images: list[bytes], predictor: Predictor) -> list[Case]:
    """Every image in every form."""
    found = []
    url = "/predict?probabilities=1"
    for number, encoded in enumerate(images):
        pixels = decode_image(encoded, predictor.spec).transpose(2, 0, 1)[None]  # (1, 3, H, W)
        several = [(number + step) % len(images) for step in range(3)]
        form = b"".join(part(images[place], f"file{place}") for place in several) + b"--b--\r\n"
        raw = post(url, kind_of(encoded), encoded)
        found += [
            Case("raw", raw, [number], read_predictions),
            Case("pipelined", raw + raw, [number], read_predictions, num_answers=2),
            Case("chunked", chunked(url, kind_of(encoded), encoded), [number], read_predictions),
            Case("form", post(url, "multipart/form-data; boundary=b", form), several, read_predictions),
            Case("tensor", post("/predict/tensor?probabilities=1", OCTETS, pixels.tobytes()), [number], read_predictions),
            Case("v2", v2_json(name, pixels), [number], read_v2),
            Case("v2 binary", v2_binary(name, pixels), [number], read_v2_binary),
        ]
    return found


OCTETS = "application/octet-stream"


def kind_of(encoded: bytes) -> str:
    """Media type of an image file."""
    with Image.open(io.BytesIO(encoded)) as image:
        return Image.MIME[str(image.format)]


def chunked(url: str, kind: str, body: bytes) -> bytes:
    """A POST request in chunks of uneven sizes, which waits for no `100 Continue` that it asks for."""
    head = f"POST {url} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n"
    middle = len(body) // 3
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:1], body[1:middle], body[middle:]))
    return head.encode() + b"Expect: 100-continue\r\n\r\n" + chunks + b"0\r\n\r\n"


def v2_json(name: str, pixels: npt.NDArray[np.uint8]) -> bytes:
    """A V2 request whose data are numbers in JSON."""
    tensor = {"name": "image", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.ravel().tolist()}
    return post(f"/v2/models/{name}/infer", "application/json", json.dumps({"inputs": [tensor]}).encode())


def v2_binary(name: str, pixels: npt.NDArray[np.uint8]) -> bytes:
    """A V2 request whose data follow the JSON, and which wants its answer so."""
    size = {"binary_data_size": pixels.nbytes}
    tensor = {"name": "image", "datatype": "UINT8", "shape": pixels.shape, "parameters": size}
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    kind = f"{OCTETS}\r\nInference-Header-Content-Length: {len(head)}"
    return post(f"/v2/models/{name}/infer", kind, head + pixels.tobytes())


class Load:
    """Clients and attackers of one server."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.tally = plan, Tally()
        self.expected: dict[str, Rows] = {}
        images = [Path(path).read_bytes() for path in plan.images]
        for model in map(Path, plan.models):
            predictor = Predictor(model)
            pixels = [decode_image(encoded, predictor.spec) for encoded in images]
            self.expected[sha256_of(model)] = predictor.probabilities(pixels).astype(np.float64)
        self.images, self.predictor = images, predictor
        self.ends = 0.0
        self.stopped: float | None = None

    async def run(self) -> dict[str, Any]:
        """Load the server for as long as planned, and report."""
        plan = self.plan
        connection = await Connection.open(plan.port)
        name = json.loads((await connection.ask(b"GET /model HTTP/1.1\r\nHost: localhost\r\n\r\n")).body)["name"]
        connection.close()
        good = cases(name, self.images, self.predictor)
        assert self.predictor.spec.fixed_size is not None
        jpeg = next(encoded for encoded in self.images if kind_of(encoded) == "image/jpeg")
        bad = attacks(name, jpeg, self.predictor.spec.fixed_size[0])
        self.ends = time.perf_counter() + plan.seconds
        print("begun", flush=True)
        async with asyncio.TaskGroup() as group:
            for number in range(plan.clients):
                group.create_task(self._ask(good, number))
            for number in range(plan.attackers):
                group.create_task(self._attack([attack for attack in bad if not attack.is_slow], number))
            for attack in bad:
                if attack.is_slow:
                    group.create_task(self._attack([attack], 0))
            group.create_task(self._stop(plan.stop))
        return self.tally.report()

    async def _stop(self, pid: int) -> None:
        await asyncio.sleep(self.ends - time.perf_counter())
        self.stopped = time.perf_counter()
        os.kill(pid, signal.SIGTERM)

    async def _ask(self, good: list[Case], number: int) -> None:
        """One client: asks on one connection until the server is stopped and does not answer."""
        connection: Connection | None = None
        number *= 7  # so that clients are at different forms
        while True:
            case, number = good[number % len(good)], number + 1
            asked = time.perf_counter()
            try:
                if connection is None or connection.is_closed:
                    connection = await Connection.open(self.plan.port)
                asked = time.perf_counter()
                connection.send(case.request)
                await self._require_right(case, connection)
            except (OSError, AssertionError, LookupError, ValueError, TimeoutError) as error:
                if isinstance(error, OSError) and self.stopped is not None and asked > self.stopped:
                    return  # it was sent to a server that had been told to end
                when = "" if self.stopped is None else f", asked {self.stopped - asked:.3f} s before the stop"
                self.tally.failures.append(f"{case.form}: {type(error).__name__}: {error}{when}")
                if connection is not None:
                    connection.close()
                if self.stopped is not None:
                    return
                continue
            self.tally.latencies.append(time.perf_counter() - asked)
            self.tally.answered[case.form] += case.num_answers
            self.tally.in_flight_at_stop += self.stopped is not None and asked < self.stopped

    async def _require_right(self, case: Case, connection: Connection) -> None:
        """Raise AssertionError for an answer that the model would not give."""
        for _ in range(case.num_answers):
            async with asyncio.timeout(self.plan.timeout_seconds + 5):
                answer = await connection.answer()
            assert answer.status == 200, f"{answer.status} {answer.body[:200]!r}"
            sha256, rows = case.read(answer)
            known = list(self.expected) if sha256 is None else [sha256]
            errors = [np.abs(rows - self.expected[model][case.rows]).max() for model in known]
            assert min(errors) <= MOST_ABS, f"probabilities are off by {min(errors):.1e}, by {sha256}"
            if sha256 is not None:
                self.tally.by_model[sha256] += 1

    async def _attack(self, bad: list[Attack], number: int) -> None:
        """One attacker: every attack from one of them on, again and again."""
        number *= 31
        while time.perf_counter() < self.ends:
            attack, number = bad[number % len(bad)], number + 1
            try:
                outcome: Outcome = await attack.run(self.plan.port, self.plan.timeout_seconds + 5)
            except OSError as error:
                outcome = type(error).__name__
            if self.stopped is not None:
                return
            self.tally.attacks.setdefault(attack.name, Counter())[str(outcome)] += 1
            if outcome not in attack.allowed:
                self.tally.survived.append(f"{attack.name}: {outcome}")
            await asyncio.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    report = asyncio.run(Load(Plan(**json.loads(sys.argv[1]))).run())
    print(json.dumps(report))
