"""Batches: what shares one, what does not wait for what, and what happens to images that fail."""

import asyncio
import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.preprocess import decode_image, finish_pixels
from pipeline.serving import batching
from pipeline.serving.batching import Batcher, Job, Upload
from pipeline.serving.exchange import RefusedError
from pipeline.serving.metrics import Board
from pipeline.serving.served import Answers, ServedModel
from tests.unit.serving.asking import image_of, noise
from tests.unit.serving.conftest import SETTINGS

BLOCK = np.zeros((1, 3, 16, 16), np.uint8)


class Counting:
    """A served model that notes the sizes of its batches, and runs when it may."""

    def __init__(self, model: ServedModel) -> None:
        self.model, self.sizes, self.may_run = model, list[int](), threading.Event()
        self.may_run.set()
        self.predictor, self.size = model.predictor, model.size

    def answer(self, images: Any) -> Answers:
        self.sizes.append(len(images))
        assert self.may_run.wait(20)
        return self.model.answer(images)


@dataclasses.dataclass
class Desk:
    """A batcher to which jobs are handed, and what has come of them."""

    batcher: Batcher
    model: Counting
    loop: asyncio.AbstractEventLoop
    done: list[tuple[int, Any]] = dataclasses.field(default_factory=list)

    def hand(self, number: int, *parts: Any) -> Job:
        """Submit a job; its end is noted under its number."""

        async def submit() -> Job:
            job = Job(
                parts, lambda model, answers: self.done.append((number, answers)), lambda why: self.done.append((number, why))
            )
            self.batcher.submit(job)
            return job

        return asyncio.run_coroutine_threadsafe(submit(), self.loop).result(20)

    def wait(self, number: int) -> list[tuple[int, Any]]:
        """Wait until so many have ended."""
        wait_until(lambda: len(self.done) >= number)
        return self.done

    @property
    def order(self) -> list[int]:
        return [number for number, _ in self.done]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def desk(served: ServedModel, loop: asyncio.AbstractEventLoop, board: Board) -> Iterator[Desk]:
    model: Any = Counting(served)
    batcher = Batcher(dataclasses.replace(SETTINGS, batch_delay_ms=1000), board, loop)
    batcher.model = model
    yield Desk(batcher, model, loop)
    model.may_run.set()
    batcher.close()


def hold(desk: Desk) -> None:
    """Have the model at work on a first image, so that the next ones wait."""
    desk.model.may_run.clear()
    desk.hand(0, BLOCK)
    wait_until(lambda: len(desk.model.sizes) == 1)


def test_a_lone_image_does_not_wait_for_others(desk: Desk) -> None:
    started = time.monotonic()
    desk.hand(1, BLOCK)
    desk.wait(1)
    assert desk.model.sizes == [1]
    assert time.monotonic() - started < 0.9  # a batch may be collected for 1 s


def test_what_waits_together_shares_a_batch_up_to_its_limit(desk: Desk) -> None:
    hold(desk)
    for number in range(1, 7):
        desk.hand(number, Upload("x", noise(number)))
    desk.model.may_run.set()
    answers = dict(desk.wait(7))
    assert desk.model.sizes == [1, 4, 2]
    for number in range(1, 7):
        alone = desk.model.model.answer(_pixels(desk, noise(number)))
        np.testing.assert_allclose(
            answers[number].probabilities, alone.probabilities, rtol=0, atol=1e-5
        )  # float32, other batch


def _pixels(desk: Desk, encoded: bytes) -> Any:
    return np.ascontiguousarray(decode_image(encoded, desk.model.predictor.spec).transpose(2, 0, 1)[np.newaxis])


def test_a_block_that_does_not_fit_is_first_in_the_next_batch(desk: Desk) -> None:
    hold(desk)
    desk.hand(1, np.zeros((2, 3, 16, 16), np.uint8))
    desk.hand(2, np.zeros((3, 3, 16, 16), np.uint8))
    desk.hand(3, BLOCK)
    desk.model.may_run.set()
    desk.wait(4)
    assert (desk.model.sizes, desk.order) == ([1, 2, 4], [0, 1, 2, 3])


def test_a_batch_that_took_its_time_to_decode_runs_before_it_is_full(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.batcher, "settings", dataclasses.replace(SETTINGS, batch_delay_ms=0))
    hold(desk)
    for number in (1, 2, 3):
        desk.hand(number, Upload("x", noise(number)))
    desk.model.may_run.set()
    desk.wait(4)
    assert desk.model.sizes == [1, 1, 1, 1]


def test_an_image_that_fails_leaves_the_others_of_its_batch_alone(desk: Desk) -> None:
    hold(desk)
    desk.hand(1, Upload("a.png", image_of()))
    desk.hand(2, Upload("b.png", b"not an image"))
    desk.hand(3, Upload("c.png", image_of()), Upload("d.png", image_of()[:-30]))
    desk.model.may_run.set()
    ends = dict(desk.wait(4))
    assert isinstance(ends[1], Answers)
    assert (ends[2].status, str(ends[2])) == (422, "b.png: cannot be decoded (cannot identify image file).")
    assert (ends[3].status, str(ends[3])[:25]) == (422, "d.png: cannot be decoded ")
    assert desk.batcher.num_waiting == 0


@pytest.mark.parametrize(("limit", "value"), [("LARGE_PIXELS", 1000), ("LARGE_BYTES", 100)])
def test_a_large_image_is_passed_by_small_ones(desk: Desk, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(batching, limit, value)
    decode, may_decode = finish_pixels, threading.Event()

    def slow(image: Image.Image, spec: Any) -> Any:
        if image.width * image.height > 1000:
            assert may_decode.wait(20)
        return decode(image, spec)

    monkeypatch.setattr(batching, "finish_pixels", slow)
    desk.hand(1, Upload("large.png", noise(1, size=(40, 40))))
    desk.hand(2, Upload("small.png", image_of()))
    desk.wait(1)
    may_decode.set()
    desk.wait(2)
    assert desk.order == [2, 1]
    assert isinstance(desk.done[1][1], Answers)


def test_images_that_nobody_waits_for_are_left_out(desk: Desk) -> None:
    hold(desk)
    job = desk.hand(1, Upload("x", noise(1)))
    desk.hand(2, Upload("x", noise(2)))
    job.cancel()
    desk.model.may_run.set()
    desk.wait(2)
    assert (desk.model.sizes, desk.order) == ([1, 1], [0, 2])
    wait_until(lambda: desk.batcher.num_waiting == 0)


def test_more_than_may_wait_are_refused_with_a_time_to_come_again(desk: Desk) -> None:
    hold(desk)
    for number in range(1, SETTINGS.max_queue):
        desk.hand(number, BLOCK)
    with pytest.raises(RefusedError, match="8 images wait already") as refused:
        desk.hand(99, BLOCK)
    assert (refused.value.status, refused.value.headers) == (429, (("retry-after", "1"),))
    desk.model.may_run.set()
    desk.wait(SETTINGS.max_queue)


def test_what_would_wait_beyond_the_time_limit_is_refused_at_once(desk: Desk) -> None:
    hold(desk)
    desk.batcher.seconds_an_image = 6.5  # and 5 s is the limit
    with pytest.raises(RefusedError) as refused:
        desk.hand(1, BLOCK)
    assert (refused.value.status, refused.value.headers) == (429, (("retry-after", "7"),))


def test_a_model_that_fails_answers_its_batch_and_goes_on(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    answer = desk.model.answer

    def fail(images: Any) -> Answers:
        desk.model.answer = answer  # type: ignore[method-assign]
        raise RuntimeError("out of memory")

    desk.model.answer = fail  # type: ignore[method-assign]
    desk.hand(1, BLOCK)
    assert desk.wait(1)[0][1].status == 500
    assert "out of memory" in capsys.readouterr().out
    desk.hand(2, BLOCK)
    assert isinstance(desk.wait(2)[1][1], Answers)


def test_an_answer_that_is_not_finite_is_no_answer(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.array([[np.nan, 0, 0], [0.5, 0.5, 0]], np.float32)
    monkeypatch.setattr(desk.model, "answer", lambda images: Answers(nothing[: len(images)], nothing[: len(images)]))
    desk.hand(1, Upload("dark.png", image_of()))
    assert str(desk.wait(1)[0][1]) == "dark.png: the model has no finite answer to it."


def test_a_request_is_answered_by_the_model_that_was_there_when_it_came(desk: Desk, served: ServedModel) -> None:
    hold(desk)
    desk.hand(1, BLOCK)
    newer: Any = Counting(served)
    desk.batcher.model = newer
    desk.hand(2, BLOCK)
    desk.hand(3, BLOCK)
    desk.model.may_run.set()
    desk.wait(4)
    assert (desk.model.sizes, newer.sizes) == ([1, 1], [2])


def test_a_replaced_model_is_let_go_of_without_a_garbage_collection(desk: Desk, served: ServedModel) -> None:
    older: Any = Counting(served)
    desk.batcher.model = older
    gc.disable()
    try:
        desk.hand(1, Upload("a.png", image_of()), Upload("b.png", image_of()))
        desk.hand(2, BLOCK)
        desk.wait(2)
        reference = weakref.ref(older)
        desk.batcher.model = None
        del older
        wait_until(lambda: reference() is None)
    finally:
        gc.enable()


def test_one_slow_image_does_not_turn_others_away(desk: Desk) -> None:
    for number in range(1, 11):
        desk.hand(number, np.zeros((4, 3, 16, 16), np.uint8))
        desk.wait(number)
    desk.model.may_run.clear()
    desk.hand(11, BLOCK)
    time.sleep(0.5)
    desk.model.may_run.set()
    desk.wait(11)
    # Half a second for the last 27 images or so. Of batches, whatever their size, it would be a twentieth of a second.
    assert 0.015 < desk.batcher.seconds_an_image < 0.035


def test_threads_end_with_the_batcher(served: ServedModel, loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    batcher = Batcher(SETTINGS, Board(1), loop)
    batcher.model = served
    batcher.close()
    assert not any(thread.is_alive() for thread in batcher._threads)


def test_the_end_does_not_wait_for_an_image_that_takes_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(batching, "LAST_SECONDS", 0.2)
    began, may_end = threading.Event(), threading.Event()

    def for_ever(image: Image.Image, spec: Any) -> Any:
        began.set()
        assert may_end.wait(20)
        raise ValueError("nobody waits for it")

    monkeypatch.setattr(batching, "finish_pixels", for_ever)
    desk.hand(1, Upload("large.png", noise(1, size=(40, 40))))
    assert began.wait(20)
    started = time.monotonic()
    desk.batcher.close()
    assert time.monotonic() - started < 2
    assert next(thread.name for thread in desk.batcher._threads if thread.is_alive()).startswith("large-images")
    assert all(thread.daemon for thread in desk.batcher._threads)
    may_end.set()
