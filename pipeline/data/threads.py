"""Batches made by threads of the rank, in memory that is used again.

Worth it where a batch is one call that holds no lock of Python; transforms in Python need processes.
"""

import itertools
import queue
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")
R = TypeVar("R")


class Ring:
    """Memory for batches, uint8 (n, 3, H, W) with the channels together, each used again once nobody holds its tensor.

    It grows to as many batches as are held at once: those that are read ahead, and those that training keeps.
    """

    def __init__(self, size: tuple[int, int], pinned: bool = False) -> None:
        self.size, self.pinned = size, pinned
        self.free: queue.SimpleQueue[npt.NDArray[np.uint8]] = queue.SimpleQueue()

    def take(self, num_samples: int) -> torch.Tensor:
        """Room for a batch, whatever was in it."""
        shape = (num_samples, *self.size, 3)
        if self.pinned:  # torch uses page-locked memory again by itself, and knows when a copy out of it has ended
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).permute(0, 3, 1, 2)
        memory = self._free_memory(num_samples)
        # It lives as long as any tensor on it, views and all.
        view = memory[:num_samples]
        weakref.finalize(view, self.free.put, memory).atexit = False
        return torch.from_numpy(view).permute(0, 3, 1, 2)

    def _free_memory(self, num_samples: int) -> npt.NDArray[np.uint8]:
        try:
            memory = self.free.get_nowait()
        except queue.Empty:
            memory = np.empty((num_samples, *self.size, 3), np.uint8)
        return memory if len(memory) >= num_samples else np.empty((num_samples, *self.size, 3), np.uint8)


def in_threads(make: Callable[[T], R], tasks: Iterator[T], num_threads: int, num_ahead: int) -> Iterator[R]:
    """`map` by threads, which work on the `num_ahead` tasks after the one that is waited for. Raises what a task raised."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="loader")
    try:
        pending: deque[Future[R]] = deque(pool.submit(make, task) for task in itertools.islice(tasks, num_ahead))
        while pending:
            made = pending.popleft().result()
            pending.extend(pool.submit(make, task) for task in itertools.islice(tasks, 1))
            yield made
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
