import gc
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline.data.threads import Ring, in_threads

# ---- memory that is used again ----


def place_of(images: torch.Tensor) -> int:
    return images.untyped_storage().data_ptr()


def test_memory_is_used_again_once_nobody_holds_its_batch() -> None:
    ring = Ring((4, 5))
    images = ring.take(3)
    assert (images.shape, images.dtype) == ((3, 3, 4, 5), torch.uint8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    first = place_of(images)
    other = ring.take(3)
    assert place_of(other) != first
    del images
    assert place_of(ring.take(3)) == first


def test_memory_is_held_by_a_view_of_its_batch_too() -> None:
    ring = Ring((4, 5))
    images = ring.take(3)
    kept = images[1:]
    kept.fill_(7)
    del images
    gc.collect()
    ring.take(3).fill_(0)
    assert bool((kept == 7).all())


def test_a_smaller_batch_takes_the_memory_of_a_larger_one_and_never_the_other_way() -> None:
    ring = Ring((4, 5))
    first = place_of(ring.take(3))
    small = ring.take(2)
    assert (place_of(small), small.shape) == (first, (2, 3, 4, 5))
    del small
    assert ring.take(9).shape == (9, 3, 4, 5)


def test_the_ring_grows_to_what_is_held_at_once_and_no_further() -> None:
    ring = Ring((4, 5))
    places = set()
    held: list[torch.Tensor] = []
    for _ in range(50):
        held = [*held[-2:], ring.take(3)]
        places.add(place_of(held[-1]))
    assert len(places) == 4  # three are held, and one is filled meanwhile


# ---- tasks ----


def test_results_come_in_the_order_of_their_tasks() -> None:
    def slow_first(task: int) -> int:
        time.sleep(0.05 if task == 0 else 0)
        return task * task

    assert list(in_threads(slow_first, iter(range(20)), 4, 8)) == [task * task for task in range(20)]


def test_no_more_tasks_are_begun_than_are_to_be_ahead() -> None:
    begun: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(100):
            begun.append(task)
            yield task

    results = in_threads(lambda task: task, tasks(), 2, 3)
    assert next(results) == 0
    assert len(begun) == 4  # the one that was had, and three ahead of it
    assert next(results) == 1
    assert len(begun) == 5
    results.close()  # type: ignore[attr-defined]


def test_an_error_comes_where_its_result_would_have_come_and_ends_the_threads() -> None:
    def fail_at_three(task: int) -> int:
        if task == 3:
            raise ZeroDivisionError
        return task

    results = in_threads(fail_at_three, iter(range(100)), 2, 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("loader") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_tasks_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=10)
    assert list(in_threads(lambda task: meeting.wait() >= 0 and task, iter(range(3)), 3, 3)) == [0, 1, 2]


def test_memory_of_a_batch_that_was_kept_is_not_written_by_the_batches_after_it() -> None:
    ring = Ring((8, 8))

    def make(number: int) -> torch.Tensor:
        images = ring.take(2)
        images.fill_(number)
        return images

    kept = list(in_threads(make, iter(range(40)), 2, 4))
    assert [int(np.unique(images.numpy()).item()) for images in kept] == list(range(40))
