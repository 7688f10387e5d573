"""Brings a run's journals to MLflow, in a process of its own: whatever the server does, the training does not feel it.

A call that failed, or of which nobody knows whether it did, is repeated after a while. What the server refuses for good (a
name that it does not allow) is set aside in RUN/tracking/refused.jsonl and does not hold up the rest.

This process ends when its standard input does, that is when the training has ended in whatever way, after trying for a while
to deliver the rest. A training that left no word of its end was killed, and its run is shown so.
"""

import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import say
from pipeline.distributed import STOP_SIGNALS
from pipeline.errors import RunError
from pipeline.files import locked
from pipeline.tracking.journal import FILES, FOLDER, POINTS, Entry, Journal, read_entries
from pipeline.tracking.send import Sender, note, points_of
from pipeline.tracking.server import Place, Server, place_of, without_credentials
from pipeline.tracking.system import node_name, sampled

SECONDS_BETWEEN_ROUNDS = 1.0
# After the end of the training: how long a server that answers may take, and how often one may fail.
DRAIN_SECONDS = 60.0
DRAIN_FAILURES = 2
LONGEST_DRAIN_SECONDS = DRAIN_SECONDS + 35.0  # with a call that hangs
LONGEST_PAUSE_SECONDS = 60.0
# How long a process that delivers may take to start.
APPEAR_SECONDS = 15.0
# A wait that is not worth a word.
QUIET_SECONDS = 4.0
LOCK_WAIT_SECONDS = 24 * 3600.0
MOST_POINTS = 1000  # that MLflow takes in a call
REFUSED = FOLDER / "refused.jsonl"
# Only these say that the same request would never be taken. MLflow's servers and proxies before them say 404 for much else.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
GONE = "RESOURCE_DOES_NOT_EXIST"
WORDS = {
    "401": "asks for a name and a password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)",
    "403": "does not permit it",
    "timed out": "does not answer",
    "refused": "cannot be reached",
    "resolve": "cannot be reached",
}


@dataclass
class Patience:
    """With one journal: points do not wait for a full artifact store."""

    failures: int = 0
    next_try: float = 0.0

    def lose(self) -> None:
        """Wait longer after each failure."""
        self.failures += 1
        self.next_try = time.monotonic() + min(2.0**self.failures, LONGEST_PAUSE_SECONDS)


class Delivery:
    """The delivery of one run to one server. `run_dir` must stay valid when the folder is moved aside."""

    def __init__(self, run_dir: Path, server: Server) -> None:
        self.run_dir, self.server = run_dir, server
        self.place = place_of(run_dir)
        if (self.place.uri, self.place.experiment) != (server.uri, server.experiment):
            self.place = Place(server.uri, server.experiment)  # another server gets everything
        self.sender = Sender(run_dir, server, self.place)
        self.patience: dict[str, Patience] = {}
        self.is_shown = False  # as running, at the server

    def round(self) -> None:
        """Send what there is of each journal, as far as it goes."""
        for path in journals_of(self.run_dir):
            patience = self.patience.setdefault(path.name, Patience())
            has_run = path.name == POINTS or self.place.run_id is not None
            if not has_run or time.monotonic() < patience.next_try:
                continue
            try:
                self._send(path)
            except Exception as error:
                patience.lose()
                self._say(describe_trouble(error, self.server.uri))
                if path.name == POINTS and "timed out" in str(error):
                    break  # it would not answer the others either, and each call waits for half a minute
            else:
                patience.failures = 0
        if not any(patience.failures for patience in self.patience.values()):
            self._say("")

    def _say(self, trouble: str) -> None:
        if trouble != self.place.trouble:
            self.place.trouble = trouble
            note(trouble or "delivers again")
            with contextlib.suppress(OSError):  # a full disk may be the trouble
                self.place.save(self.run_dir)

    def _send(self, path: Path) -> None:
        for entries, end in batches(path, self.place.delivered.get(path.name, 0)):
            try:
                self.sender.send(entries)
            except Exception as error:
                self._begin_anew_if_gone(error)
                # Without its first entry there is no run, and one that was deleted refuses everything.
                if "begin" in entries[0] or not is_refused(error) or not self.sender.is_there():
                    raise
                self._send_one_by_one(entries, error)
            self.place.delivered[path.name] = end
            self.place.save(self.run_dir)

    def _begin_anew_if_gone(self, error: Exception) -> None:
        """Have the next round send everything, to a new run, where the database of this one is another or was emptied.

        The sentence is that of MLflow's database: a proxy before a server that is down says 404, too, and in other words.
        """
        if getattr(error, "error_code", None) == GONE and f"Run with id={self.place.run_id} not found" in str(error):
            self.place.run_id, self.place.delivered = None, {}
            self.place.save(self.run_dir)

    def _send_one_by_one(self, entries: list[Entry], error: Exception) -> None:
        """Set aside what is refused, and send the rest: of points that came together, each alone."""
        singles = [Entry(points=[point]) for point in points_of(entries)] or entries
        if len(singles) == 1:
            self._set_aside(singles[0], error)
            return
        for single in singles:
            try:
                self.sender.send([single])
            except Exception as again:
                if not is_refused(again):
                    raise
                self._set_aside(single, again)

    def _set_aside(self, entry: Entry, error: Exception) -> None:
        journal = Journal(self.run_dir / REFUSED)
        journal.add({"why": str(error), "entry": entry})
        journal.close()
        self.place.refused += 1
        note(f"refused: {error}")

    @property
    def is_done(self) -> bool:
        """Whether everything in the journals is at the server."""
        return not self._waiting()

    def _waiting(self) -> set[str]:
        """The journals that have more than was delivered."""
        paths = journals_of(self.run_dir)
        return {path.name for path in paths if any(read_entries(path, self.place.delivered.get(path.name, 0)))}

    @property
    def has_given_up(self) -> bool:
        """Whether the server failed so often that waiting for it at the end is in vain."""
        failing = {name for name, patience in self.patience.items() if patience.failures >= DRAIN_FAILURES}
        return POINTS in failing or (bool(failing) and self._waiting() <= failing)

    def show_start(self) -> None:
        """Show a run as running once: an earlier deliverer, whose training was killed, may have come after this one's."""
        if not self.is_shown and self.place.run_id is not None and self.is_done:
            with contextlib.suppress(Exception):
                if last_status(self.run_dir) == "RUNNING":
                    self.sender.set_status("RUNNING", 0)
                self.is_shown = True

    def show_end(self) -> None:
        """Show a run as killed whose training left no word of its end; for when nobody is at work on it."""
        if self.is_done and last_status(self.run_dir) == "RUNNING":
            with contextlib.suppress(Exception):
                self.sender.set_status("KILLED", int(time.time() * 1000))

    def try_again(self) -> None:
        """Forget how long a failing server should be left alone."""
        for patience in self.patience.values():
            patience.failures, patience.next_try = min(patience.failures, 1), 0.0


def journals_of(run_dir: Path) -> list[Path]:
    """The journals of a run, that of its points first: they make the run that the others need."""
    found = [path for path in (run_dir / FOLDER).glob("*.jsonl") if path.name != REFUSED.name]
    return sorted(found, key=lambda path: (path.name != POINTS, path.name))


def batches(path: Path, start: int) -> Iterator[tuple[list[Entry], int]]:
    """Entries that go in one call, in order, and the byte where they end: points as many as MLflow takes, others alone."""
    held: list[Entry] = []
    number, end = 0, start
    for entry, here in read_entries(path, start):
        size = len(points_of([entry]))
        if held and (not size or number + size > MOST_POINTS):
            yield held, end
            held, number = [], 0
        if size:
            held.append(entry)
            number += size
        else:
            yield [entry], here
        end = here
    if held:
        yield held, end


def is_refused(error: Exception) -> bool:
    """Whether the server would refuse the same again, whenever it is asked."""
    return getattr(error, "error_code", None) in REFUSALS


def describe_trouble(error: Exception, uri: str) -> str:
    """What keeps a run from being delivered, in one line, without names or passwords."""
    text = without_credentials(" ".join(str(error).split()) or type(error).__name__)
    words = next((words for sign, words in WORDS.items() if re.search(rf"\b{sign}\b", text)), "does not take it")
    return f"MLflow at {uri} {words} ({text[:150]})"


def last_status(run_dir: Path) -> str:
    """What the run's own processes last said of it."""
    found = [entry["status"] for entry, _ in read_entries(run_dir / FOLDER / POINTS) if "status" in entry]
    return str(found[-1]) if found else ""


def left_over(run_dir: Path) -> str:
    """What is not delivered yet, in words; nothing when all is."""
    delivered = place_of(run_dir).delivered
    counts = {"points": 0, "files": 0, "facts": 0}
    for path in journals_of(run_dir):
        for entry, _ in read_entries(path, delivered.get(path.name, 0)):
            counts["points"] += (number := len(points_of([entry])))
            counts["files" if path.name == FILES else "facts"] += not number
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)


def size_of(run_dir: Path) -> int:
    """Bytes in the journal of points."""
    path = run_dir / FOLDER / POINTS
    return path.stat().st_size if path.is_file() else 0


def wait_for_delivery(run_dir: Path, seconds: float) -> None:
    """Wait until everything is delivered, or the process that delivers has ended or never came, at most so long."""
    began = seen = time.monotonic()
    deadline, is_said = began + seconds, False
    while left_over(run_dir) and time.monotonic() < min(deadline, seen + APPEAR_SECONDS):
        if place_of(run_dir).ended_at >= size_of(run_dir):
            return
        if not is_said and time.monotonic() - began > QUIET_SECONDS:
            is_said = True
            say(f"waiting for MLflow to take the rest, at most {seconds:.0f} s (^C: leave it to `shardline sync`)")
        try:
            with locked(run_dir / FOLDER):
                pass  # nobody is at work, or not yet
        except RunError:
            seen = time.monotonic()
        time.sleep(0.1)


def deliver_now(run_dir: Path, server: Server) -> Place:
    """Deliver everything that is still local. Raises RunError when a job is at work there, or the server does not take it."""
    if not journals_of(run_dir):
        raise RunError(f"{run_dir}: there is nothing to deliver: no verb has tracked this run (no {FOLDER}).")
    is_training = last_status(run_dir) == "RUNNING"
    with locked(run_dir / FOLDER, wait_seconds=0.0 if is_training else LONGEST_DRAIN_SECONDS):
        delivery = Delivery(run_dir, server)
        for _ in range(DRAIN_FAILURES):
            delivery.round()
            if delivery.is_done:
                delivery.show_end()
                return delivery.place
            delivery.try_again()
    raise RunError(f"{delivery.place.trouble}. Still in {run_dir}: {left_over(run_dir)}. Run `shardline sync` again later.")


# ---- the process ----


def deliver(run_dir: Path, server: Server, *, sample: bool) -> None:
    """Deliver until standard input ends, and for a while after; meanwhile `sample` this machine, too."""
    # A folder that is moved aside keeps its descriptor, and another that takes its name is not this run's.
    held = Path(f"/proc/self/fd/{os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)}")
    with locked(run_dir / FOLDER, wait_seconds=LOCK_WAIT_SECONDS):
        delivery = Delivery(held, server)
        with sampled(held, node_name()) if sample else contextlib.nullcontext():
            while not _has_ended(SECONDS_BETWEEN_ROUNDS):
                delivery.round()
                delivery.show_start()
        _drain(delivery)
        delivery.show_end()
        delivery.place.ended_at = size_of(held)
        delivery.place.save(held)


def _drain(delivery: Delivery) -> None:
    """Deliver what is left, unless the server does not take it."""
    deadline = time.monotonic() + DRAIN_SECONDS
    delivery.try_again()
    while True:
        delivery.round()
        if delivery.is_done or delivery.has_given_up or time.monotonic() > deadline:
            return
        time.sleep(SECONDS_BETWEEN_ROUNDS)


def _has_ended(seconds: float) -> bool:
    """Wait so long for standard input to end."""
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    return bool(waiting.poll(seconds * 1000)) and not os.read(0, 1)


if __name__ == "__main__":
    os.nice(5)
    # A job that is stopped has all its processes told; this one still has to say how the training ended.
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    deliver(Path(sys.argv[1]), Server.from_arguments(sys.argv[2:5]), sample="--sample" in sys.argv)
