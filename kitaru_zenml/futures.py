"""The handle of a submitted step: a `concurrent.futures.Future` that can be awaited too."""

from __future__ import annotations

import asyncio
import itertools
import queue
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

R = TypeVar("R")
_done_order = itertools.count()


class StepFuture(Future[R], Generic[R]):
    """The outcome of a step that was submitted, now or later.

    `result()` blocks a sync flow, `await future` suspends an async one. It works with `concurrent.futures.wait` and
    `asyncio.wrap_future`; take results in completion order with `kitaru_zenml.as_completed`, whose order is the same on replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observed = False  # whether somebody asked for the outcome
        self._done_at = -1

    def result(self, timeout: float | None = None) -> R:
        """The step's value.

        Args:
            timeout: Seconds to wait, or `None`.

        Raises:
            TimeoutError: If it is not there in time.
            Exception: The step's failure.
        """
        self.observed = True
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The step's failure, or `None`; see `result`."""
        self.observed = True
        return super().exception(timeout)

    def set_result(self, result: R) -> None:
        """For the engine."""
        self._done_at = next(_done_order)
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        """For the engine."""
        self._done_at = next(_done_order)
        super().set_exception(exception)

    def unobserved_failure(self) -> BaseException | None:
        """Wait for the outcome; the failure if nobody asked for it."""
        error = super().exception()
        return None if self.observed else error

    def __await__(self) -> Generator[Any, None, R]:
        self.observed = True
        return asyncio.wrap_future(self).__await__()


def as_completed(futures: Iterable[StepFuture[R]]) -> Iterator[StepFuture[R]]:
    """Submitted steps in the order in which they completed first, live and on replay.

    `concurrent.futures.as_completed` gives those that are done already in no order; this one keeps the engine's.

    Example:
        for future in as_completed(fetch.map(urls)):
            print(future.result())
    """
    pending = list(dict.fromkeys(futures))
    done: queue.SimpleQueue[StepFuture[R]] = queue.SimpleQueue()
    finished = sorted((f for f in pending if f.done()), key=lambda f: f._done_at)
    yield from finished
    rest = [f for f in pending if f not in set(finished)]
    for future in rest:
        future.add_done_callback(done.put)  # type: ignore[arg-type]
    for _ in rest:
        yield done.get()
