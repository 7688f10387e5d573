"""Micro-batching: what waits together goes through the model together, decoded in the thread that runs it.

One hop from the event loop to that thread and one back is all that a batch costs. While a batch runs, the next requests queue
up; that alone makes batches, and a request never waits for others that might come. (Waiting for the clients of the batch
before, which are about to ask again, saved a tenth of the CPU time at best, and lost more throughput where they were slow.)

A batch takes what waits until it is full, or until decoding it has taken `batch_delay_ms`: what is dear to decode gains little
from a batch, and its first image should not wait for the last.

A large image is decoded by threads of its own, and queues up again: it takes a tenth of a second or more, and small ones pass
it meanwhile.
"""

import asyncio
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.preprocess import Pixels, TooManyPixelsError, finish_pixels, num_pixels, read_header
from pipeline.serving.exchange import RefusedError
from pipeline.serving.metrics import Board
from pipeline.serving.served import Answers, ServedModel
from pipeline.serving.settings import ServeSettings

# A decode of about 10 ms: what others may have to wait for. (Few pixels in many bytes are seldom a picture.)
LARGE_PIXELS = 1_000_000
LARGE_BYTES = 300_000
# Decoded at the same time: what bounds their memory, at up to 0.6 GB for 50 megapixels with alpha.
LARGE_AT_ONCE = 2
# What `close` waits for at most.
LAST_SECONDS = 1.0
Block = npt.NDArray[np.uint8]


class Upload(NamedTuple):
    """An encoded image and what to call it in a complaint."""

    name: str
    encoded: bytes | bytearray


@dataclass(slots=True)
class Entry:
    """What of a job goes through the model at once: an image, or a block of them that was sent as pixels, (n, 3, H, W)."""

    job: "Job"
    place: int
    num_images: int
    upload: Upload | None = None
    block: Block | None = None
    pixels: Pixels | None = None  # (H, W, 3), where another thread decoded it
    failure: RefusedError | None = None


class Job:
    """The images of one request. It ends once, on the event loop: with all answers, or with what is wrong with one image."""

    def __init__(
        self,
        parts: Sequence[Upload | Block],
        finish: Callable[[ServedModel, Answers], None],
        refuse: Callable[[RefusedError], None],
    ) -> None:
        self.finish, self.refuse = finish, refuse
        self.entries = [_entry(self, place, part) for place, part in enumerate(parts)]
        self.answers: dict[int, Answers] = {}  # by the places of the parts
        self.model: ServedModel | None = None  # that answers all of it, also when another takes its place meanwhile
        self.is_over = False

    @property
    def num_images(self) -> int:
        """Images in all."""
        return sum(entry.num_images for entry in self.entries)

    def put(self, entry: Entry, part: Answers, model: ServedModel, *, is_finite: bool) -> None:
        """Take the answers to one of its entries; the last of them finish it. `is_finite`: those of the whole batch are."""
        if self.is_over:
            return
        if not is_finite and not part.is_finite:
            self.end(
                RefusedError(422, f"{entry.upload.name if entry.upload else 'image'}: the model has no finite answer to it.")
            )
            return
        self.answers[entry.place] = part
        if len(self.answers) == len(self.entries):
            parts = [self.answers[place] for place in range(len(self.entries))]
            self.cancel()
            self.finish(model, parts[0] if len(parts) == 1 else Answers.joined(parts))

    def end(self, refusal: RefusedError) -> None:
        """One of its images cannot be answered, so the request is not."""
        if not self.is_over:
            self.cancel()
            self.refuse(refusal)

    def cancel(self) -> None:
        """Nobody waits for it any more: what was not begun is left out, and the bytes that it holds are let go."""
        self.is_over = True
        for entry in self.entries:
            entry.upload = None
        # Each entry knows its job: the cycle would keep them, and the model that they were for, until a full collection.
        self.entries = []


def _entry(job: Job, place: int, part: Upload | Block) -> Entry:
    if isinstance(part, Upload):
        return Entry(job, place, 1, upload=part)
    return Entry(job, place, len(part), block=part)


@dataclass
class Batch:
    """Entries that go through one model together; those that cannot carry their failure."""

    model: ServedModel
    began: float
    entries: list[Entry] = field(default_factory=list)
    num_images: int = 0

    def add(self, entry: Entry) -> None:
        """Put an entry into it."""
        self.entries.append(entry)
        self.num_images += entry.num_images


class Batcher:
    """Takes jobs on the event loop and answers them in a thread of its own."""

    def __init__(self, settings: ServeSettings, board: Board, loop: asyncio.AbstractEventLoop) -> None:
        self.settings, self.board, self.loop = settings, board, loop
        self.model: ServedModel | None = None  # of the jobs that are taken from now on
        self.num_waiting = 0  # images that were taken and not answered; only the event loop changes it
        self.seconds_an_image = 0.0
        self._recent_seconds = self._recent_images = 0.0
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._left_over: Entry | None = None
        self._large: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        # The end of the process does not wait for them: an image may take long, and nobody waits for it then.
        names = ["batches", *(f"large-images-{number}" for number in range(LARGE_AT_ONCE))]
        runs = [self._run, *[self._run_large] * LARGE_AT_ONCE]
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for run, name in zip(runs, names, strict=True)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Take a job. Raises RefusedError where too many wait, or it would wait for too long."""
        number = job.num_images
        expected_seconds = self.num_waiting * self.seconds_an_image
        if self.num_waiting + number > self.settings.max_queue or expected_seconds > self.settings.timeout_seconds:
            again = (("retry-after", str(max(1, math.ceil(expected_seconds)))),)
            raise RefusedError(429, f"{self.num_waiting} images wait already; try again later.", again)
        self.num_waiting += number
        job.model = self.model
        for entry in job.entries:
            self._queue.put(entry)

    def close(self) -> None:
        """End the threads after what was taken; those that are not done soon are left to themselves."""
        self._queue.put(None)
        for _ in range(LARGE_AT_ONCE):
            self._large.put(None)
        deadline = time.monotonic() + LAST_SECONDS
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    # ---- in the thread ----

    def _run(self) -> None:
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        """Answer a batch; False at the end. Nothing of it is held while waiting for the next: a replaced model is let go of."""
        batch = self._collect()
        if batch is not None and batch.entries:
            self._answer(batch)
        return batch is not None

    def _collect(self) -> "Batch | None":
        """The next batch, decoded; None at the end."""
        entry = self._left_over or self._queue.get()
        self._left_over = None
        if entry is None:
            return None
        assert entry.job.model is not None
        batch = Batch(entry.job.model, time.monotonic())
        stop_at = batch.began + self.settings.batch_delay_ms / 1000
        while True:
            is_too_large = batch.num_images + entry.num_images > self.settings.max_batch and batch.entries
            if is_too_large or entry.job.model is not batch.model:
                self._left_over = entry
                return batch
            if self._prepare(entry, batch.model):
                batch.add(entry)
            is_full = batch.num_images >= self.settings.max_batch
            if is_full or (batch.entries and time.monotonic() > stop_at):
                return batch
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                return batch
            if following is None:
                self._queue.put(None)  # for the next time
                return batch
            entry = following

    def _prepare(self, entry: Entry, model: ServedModel) -> bool:
        """Decode an entry, or note why not. False where another thread does it, and it will queue up again."""
        spec, upload = model.predictor.spec, entry.upload
        if entry.failure is not None or entry.pixels is not None or upload is None or entry.job.is_over:
            return True
        try:
            image = None if len(upload.encoded) > LARGE_BYTES else read_header(upload.encoded, self.settings.max_pixels)
            if image is None or num_pixels(image) > LARGE_PIXELS:
                self._large.put(entry)
                return False
            entry.pixels = finish_pixels(image, spec)
        except Exception as error:  # one image must not stop the thread for all others
            entry.failure = _refusal_of(upload.name, error)
        return True

    def _run_large(self) -> None:
        while (entry := self._large.get()) is not None:
            self._decode_large(entry)
            self._queue.put(entry)
            del entry  # as above

    def _decode_large(self, entry: Entry) -> None:
        upload, model = entry.upload, entry.job.model
        if upload is None or model is None:  # nobody waits for it any more
            return
        try:
            entry.pixels = finish_pixels(read_header(upload.encoded, self.settings.max_pixels), model.predictor.spec)
        except Exception as error:  # as above
            entry.failure = _refusal_of(upload.name, error)

    def _answer(self, batch: "Batch") -> None:
        """Run the model and hand the answers to the event loop."""
        good = [entry for entry in batch.entries if _is_good(entry)]
        answers: Answers | None = None
        try:
            if good:
                answers = batch.model.answer(_stacked(good))
        except Exception:
            print(f"serve: the model failed on a batch of {len(good)}:\n{traceback.format_exc()}", flush=True)
        seconds = time.monotonic() - batch.began
        # Of about the last ten batches together: one image that a busy machine was slow with says little about those that wait.
        self._recent_seconds = 0.9 * self._recent_seconds + seconds
        self._recent_images = 0.9 * self._recent_images + batch.num_images
        self.seconds_an_image = self._recent_seconds / self._recent_images
        self.loop.call_soon_threadsafe(self._deliver, batch, good, answers, seconds)

    # ---- on the event loop again ----

    def _deliver(self, batch: "Batch", good: list[Entry], answers: Answers | None, seconds: float) -> None:
        self.num_waiting -= batch.num_images
        for entry in batch.entries:
            if entry.failure is not None:
                entry.job.end(entry.failure)
        if answers is None:
            for entry in good:
                entry.job.end(RefusedError(500, "the model failed; the server's log says why."))
            return
        self.board.observe("batch_images", answers.num_images)
        self.board.observe("batch_seconds", seconds)
        self.board.add("images_total", answers.num_images)
        first, is_finite = 0, answers.is_finite
        for entry in good:
            part = answers.part(first, first + entry.num_images)
            first += entry.num_images
            entry.job.put(entry, part, batch.model, is_finite=is_finite)


def _is_good(entry: Entry) -> bool:
    """Whether there are pixels, and somebody waits for what the model says of them."""
    has_pixels = entry.block is not None or entry.pixels is not None
    return has_pixels and entry.failure is None and not entry.job.is_over


def _stacked(entries: list[Entry]) -> Block:
    """The images of a batch, (N, 3, H, W)."""
    first = entries[0]
    if len(entries) == 1 and first.block is not None:
        return first.block
    parts = [entry.block if entry.block is not None else _channels_first(entry.pixels) for entry in entries]
    return np.concatenate(parts)


def _channels_first(pixels: Pixels | None) -> Block:
    assert pixels is not None
    return pixels.transpose(2, 0, 1)[np.newaxis]  # (1, 3, H, W)


def _refusal_of(name: str, error: Exception) -> RefusedError:
    if isinstance(error, TooManyPixelsError):
        return RefusedError(413, f"{name}: {error}.")
    if isinstance(error, DataError):
        return RefusedError(422, f"{name}: cannot be decoded ({error}).")
    print(f"serve: {name}: {''.join(traceback.format_exception(error))}", flush=True)
    return RefusedError(500, f"{name}: could not be decoded; the server's log says why.")
