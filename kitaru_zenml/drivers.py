"""The two thin drivers of the engine: one blocks a thread, one awaits on an event loop. They do what it asks for, and decide nothing."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from kitaru_zenml.effects import Create, Effect, Perform, RunBody, Sleep, Steps, Wait
from kitaru_zenml.errors import RunHalted, StepTimeout
from kitaru_zenml.identity import HERE, Here, install_task_factory
from kitaru_zenml.journal.store import Store


class _Handing:
    """The part of a caller that is the same for both: a future that learns the result before the next result is released."""

    def __init__(self, future: Future[Any] | None = None) -> None:
        self._future = future

    def hand_over(self, value: Any, error: BaseException | None) -> None:
        """See `effects.Caller`."""
        if self._future is None or self._future.done():
            return
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(value)


class SyncCaller(_Handing):
    """A call that blocks its thread."""

    def __init__(self, future: Future[Any] | None = None) -> None:
        super().__init__(future)
        self.holds_loop = asyncio._get_running_loop() is not None

    def waiter(self) -> threading.Event:
        """See `effects.Caller`."""
        return threading.Event()


class AsyncCaller(_Handing):
    """A call that is awaited."""

    holds_loop = False

    def waiter(self) -> _LoopWaiter:
        """See `effects.Caller`."""
        return _LoopWaiter(asyncio.get_running_loop())


class _LoopWaiter:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.future, self._thread = loop, loop.create_future(), threading.get_ident()

    def set(self) -> None:
        if threading.get_ident() == self._thread:
            self._resolve()
            return
        try:
            self.loop.call_soon_threadsafe(self._resolve)
        except RuntimeError:
            pass  # the loop is closed: nobody waits

    def _resolve(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


# --- threads -------------------------------------------------------------------------------------------------------------


def drive(steps: Steps, store: Store, name: str, body: Callable[[], Any]) -> Any:
    """Run the engine's steps for a sync call.

    Args:
        steps: From `Engine.call`.
        store: Of the run.
        name: Of the step, for its timeout.
        body: The step's body with its arguments bound.
    """
    try:
        effect = next(steps)
        while True:
            try:
                result = _do(effect, store, name, body)
            except BaseException as error:
                effect = steps.throw(_throwable(error))
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        return stop.value


def _do(effect: Effect, store: Store, name: str, body: Callable[[], Any]) -> Any:
    match effect:
        case RunBody(here=here, timeout=timeout):
            return _run_sync(here, timeout, name, body)
        case Create(name=object_name, data=data):
            return store.create(object_name, data)
        case Perform(work=work):
            return work()
        case Wait(waiter=waiter, seconds=seconds):
            waiter.wait(seconds)  # type: ignore[attr-defined]
            waiter.clear()  # type: ignore[attr-defined]
        case Sleep(seconds=seconds):
            time.sleep(seconds)
    return None


def _run_sync(here: Here, timeout: float | None, name: str, body: Callable[[], Any]) -> Any:
    if timeout is None:
        token = HERE.set(here)
        try:
            return body()
        finally:
            HERE.reset(token)
    # A thread cannot be interrupted: it goes on by itself after the timeout, and its result is dropped.
    context, result = contextvars.copy_context(), Future[Any]()
    context.run(HERE.set, here)

    def work() -> None:
        try:
            result.set_result(context.run(body))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name=f"kitaru-timeout-{name}", daemon=True).start()
    try:
        error = result.exception(timeout)
    except TimeoutError:
        raise StepTimeout(name, timeout) from None
    if error is not None:
        raise error
    return result.result()


# --- event loops ---------------------------------------------------------------------------------------------------------


async def drive_async(steps: Steps, store: Store, name: str, body: Callable[[], Awaitable[Any]]) -> Any:
    """Run the engine's steps for an async call; see `drive`."""
    loop = asyncio.get_running_loop()
    install_task_factory(loop)
    try:
        effect = next(steps)
        while True:
            try:
                result = await _do_async(effect, store, name, body)
            except _CancelledAfter as cancelled:  # what was stored is taken in first
                cancel = asyncio.CancelledError(*cancelled.args)
                try:
                    steps.send(cancelled.result)
                except (StopIteration, Exception):
                    raise cancel from None
                effect = steps.throw(cancel)
            except BaseException as error:
                effect = steps.throw(_throwable(error))
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        return stop.value


class _CancelledAfter(BaseException):
    """The task was cancelled while an object was being stored, which was finished nevertheless."""

    def __init__(self, result: Any, *args: Any) -> None:
        super().__init__(*args)
        self.result = result


async def _do_async(effect: Effect, store: Store, name: str, body: Callable[[], Awaitable[Any]]) -> Any:
    match effect:
        case RunBody(here=here, timeout=timeout):
            token = HERE.set(replace(here, is_async=True))
            try:
                if timeout is None:
                    return await body()
                limit = asyncio.timeout(timeout)
                try:
                    async with limit:
                        return await body()
                except TimeoutError:
                    if limit.expired():
                        raise StepTimeout(name, timeout) from None
                    raise
            finally:
                HERE.reset(token)
        case Create(name=object_name, data=data):
            return await _finish(store.create_async(object_name, data))
        case Perform(work=work):
            return await _in_thread(work)
        case Wait(waiter=waiter, seconds=seconds):
            await asyncio.wait([waiter.future], timeout=seconds)  # type: ignore[attr-defined]
        case Sleep(seconds=seconds):
            await asyncio.sleep(seconds)
    return None


async def _finish(write: Awaitable[Any]) -> Any:
    """Await a write to its end, also when the task is cancelled meanwhile: what a finished body came to is not lost."""
    token = HERE.set(None)  # the write's task is no branch of the flow
    try:
        task = asyncio.ensure_future(write)
    finally:
        HERE.reset(token)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and not task.cancelled() and task.exception() is None:
        raise _CancelledAfter(task.result(), *cancelled.args)
    return task.result()


async def _in_thread(work: Callable[[], Any]) -> Any:
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="kitaru-work", daemon=True).start()
    return await asyncio.wrap_future(result)


def _throwable(error: BaseException) -> BaseException:
    # A generator cannot be thrown these: Python would take them for its own end.
    if isinstance(error, StopIteration | StopAsyncIteration) and not isinstance(error, RunHalted):
        replacement = RuntimeError(f"the step's body raised {type(error).__name__}")
        replacement.__cause__ = error
        return replacement
    return error
