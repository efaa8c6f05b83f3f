"""`@checkpoint`: makes a function a durable step.

Inside a flow each call is replayed or run by the engine; outside a flow it is a plain function call. The wrapper keeps the wrapped
function's signature, so that editors and type checkers see through it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, ParamSpec, TypeVar, overload

from kitaru_zenml.drivers import AsyncCaller, SyncCaller, drive, drive_async
from kitaru_zenml.engine import Call
from kitaru_zenml.errors import NotInRun
from kitaru_zenml.execution import any_live
from kitaru_zenml.futures import StepFuture
from kitaru_zenml.identity import HERE, CurrentStep, Here, check_name
from kitaru_zenml.inputs import digest_inputs
from kitaru_zenml.options import OnDrift, StepOptions, as_names

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Checkpoint(Generic[P, R]):
    """A function as a durable step. Made by `@checkpoint`.

    For an async function `R` is the awaitable: calling the checkpoint returns what calling the function returns.
    """

    def __init__(self, function: Callable[P, R], name: str, options: StepOptions) -> None:
        check_name(name)
        functools.update_wrapper(self, function)
        self.__wrapped__ = function
        self.name, self.options = name, options
        self._signature = inspect.signature(function)
        unknown = [n for n in options.ignore if n not in self._signature.parameters]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in self._signature.parameters.values()):
            raise ValueError(f"step `{name}` has no argument `{unknown[0]}` to ignore")
        self._is_async = inspect.iscoroutinefunction(function)
        self._returns: Any = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Replay or run the step; outside a flow, call the function.

        Raises:
            NotInRun: If a flow is running in this process, but this thread or loop does not know its run.
        """
        here = self._here()
        if here is None:
            return self.__wrapped__(*args, **kwargs)
        if self._is_async:
            return self._awaited(here, AsyncCaller(), args, kwargs)  # type: ignore[return-value]
        value: R = self._blocking(here, SyncCaller(), args, kwargs)
        return value

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)  # a method is a step, `self` an argument

    @overload
    def submit(self: Checkpoint[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> StepFuture[T]: ...

    @overload
    def submit(self: Checkpoint[P, R], *args: P.args, **kwargs: P.kwargs) -> StepFuture[R]: ...

    def submit(self, *args: Any, **kwargs: Any) -> StepFuture[Any]:
        """Start the step and return at once; arguments that are `StepFuture`s are waited for first.

        A sync step runs in a thread, an async one as a task of the running loop, or in a thread of its own if none is running.

        Returns:
            A future of the step's value.
        """
        here = self._here()
        if here is None:
            return self._submit_plain(args, kwargs)
        if self._is_async and asyncio._get_running_loop() is not None:
            return self._submit_task(here, args, kwargs)

        def work(future: StepFuture[Any]) -> None:
            inside = HERE.get()
            assert inside is not None
            bound, named = _resolved(args, kwargs)
            if self._is_async:
                asyncio.run(self._awaited(inside, AsyncCaller(future), bound, named))
            else:
                self._blocking(inside, SyncCaller(future), bound, named)

        return here.execution.submit(work, here)

    @overload
    def map(
        self: Checkpoint[P, Coroutine[Any, Any, T]], *iterables: Iterable[Any], **constants: Any
    ) -> list[StepFuture[T]]: ...

    @overload
    def map(self: Checkpoint[P, R], *iterables: Iterable[Any], **constants: Any) -> list[StepFuture[R]]: ...

    def map(self, *iterables: Iterable[Any], **constants: Any) -> list[StepFuture[Any]]:
        """Submit the step once for each item, as `map` would call it; keyword arguments are the same for all.

        Example:
            pages = [future.result() for future in fetch.map(urls, timeout=5)]
        """
        submit: Callable[..., StepFuture[Any]] = self.submit
        return [submit(*items, **constants) for items in zip(*iterables, strict=True)]

    def product(self, *iterables: Iterable[Any], **constants: Any) -> list[StepFuture[Any]]:
        """Submit the step for each combination of the items."""
        submit: Callable[..., StepFuture[Any]] = self.submit
        return [submit(*items, **constants) for items in itertools.product(*iterables)]

    def with_options(self, *, name: str | None = None, **options: Any) -> Checkpoint[P, R]:
        """A copy of this step with other options; see `checkpoint` for them."""
        return Checkpoint(self.__wrapped__, name or self.name, replace(self.options, **_normal(options)))

    # --- how it is called ---

    def _here(self) -> Here | None:
        here = HERE.get()
        if here is None and any_live():
            raise NotInRun(self.name)
        return here

    def _call(self, here: Here, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        inputs = digest_inputs(bound.arguments, self.options.ignore)
        return Call(self.name, inputs, self.options, returns=self.returns)

    def _body(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[[], Any]:
        if not self.options.isolated:
            return lambda: self.__wrapped__(*args, **kwargs)
        from kitaru_zenml.isolated import run_isolated

        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if self._is_async:  # ZenML launches steps by blocking calls
            return lambda: asyncio.to_thread(run_isolated, self, bound.arguments)
        return lambda: run_isolated(self, bound.arguments)

    def _blocking(self, here: Here, caller: SyncCaller, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        steps = here.execution.engine.call(self._call(here, args, kwargs), here, caller)
        return drive(steps, here.execution.store, self.name, self._body(args, kwargs))

    async def _awaited(self, here: Here, caller: AsyncCaller, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        # Where the coroutine is awaited decides its branch, not where it was made: gather makes tasks of coroutines.
        at = HERE.get() or here
        steps = at.execution.engine.call(self._call(at, args, kwargs), at, caller)
        return await drive_async(steps, at.execution.store, self.name, self._body(args, kwargs))

    def _submit_task(self, here: Here, args: Sequence[Any], kwargs: dict[str, Any]) -> StepFuture[Any]:
        future: StepFuture[Any] = StepFuture()

        async def work() -> None:
            try:
                bound, named = await _resolved_async(args, kwargs)
                await self._awaited(here, AsyncCaller(future), bound, named)
            except BaseException as error:
                if not future.done():
                    future.set_exception(error)

        task = asyncio.get_running_loop().create_task(work())
        future.task = task  # type: ignore[attr-defined]  # keeps it alive
        here.execution.track(future)
        return future

    def _submit_plain(self, args: Sequence[Any], kwargs: dict[str, Any]) -> StepFuture[Any]:
        """Outside a flow: the same handle, the call made at once."""
        future: StepFuture[Any] = StepFuture()
        try:
            bound, named = _resolved(args, kwargs)
            if not self._is_async:
                future.set_result(self.__wrapped__(*bound, **named))
            elif asyncio._get_running_loop() is None:
                future.set_result(asyncio.run(_awaiting(self.__wrapped__(*bound, **named))))
            else:
                task = asyncio.ensure_future(_awaiting(self.__wrapped__(*bound, **named)))
                task.add_done_callback(lambda t: _copy_outcome(t, future))
        except Exception as error:
            future.set_exception(error)
        return future

    @property
    def returns(self) -> Any:
        """The declared type of the step's value, `Any` if it has none."""
        if self._returns is None:
            try:
                self._returns = inspect.get_annotations(self.__wrapped__, eval_str=True).get("return", Any)
            except Exception:  # a name that cannot be resolved: values describe themselves
                self._returns = Any
        return self._returns


async def _awaiting(awaitable: Any) -> Any:
    return await awaitable


def _copy_outcome(task: asyncio.Future[Any], future: StepFuture[Any]) -> None:
    if task.cancelled():
        future.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())


def _resolved(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    def take(value: Any) -> Any:
        return value.result() if isinstance(value, StepFuture) else value

    return [take(v) for v in args], {k: take(v) for k, v in kwargs.items()}


async def _resolved_async(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    async def take(value: Any) -> Any:
        return await value if isinstance(value, StepFuture) else value

    return [await take(v) for v in args], {k: await take(v) for k, v in kwargs.items()}


def _normal(options: dict[str, Any]) -> dict[str, Any]:
    if "ignore" in options:
        options["ignore"] = as_names(options["ignore"])
    if "retry_on" in options and isinstance(options["retry_on"], type):
        options["retry_on"] = (options["retry_on"],)
    if "metadata" in options:
        options["metadata"] = tuple(options["metadata"].items())
    return options


@overload
def checkpoint(function: Callable[P, R], /) -> Checkpoint[P, R]: ...


@overload
def checkpoint(
    *,
    name: str | None = None,
    retries: int = 0,
    retry_delay: float = 1.0,
    retry_backoff: float = 2.0,
    retry_max_delay: float = 60.0,
    retry_on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
    timeout: float | None = None,
    at_most_once: bool = False,
    ignore: str | Sequence[str] = (),
    on_drift: OnDrift | None = None,
    isolated: bool = False,
    resources: Any = None,
    step_operator: str | None = None,
    limit: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Callable[[Callable[P, R]], Checkpoint[P, R]]: ...


def checkpoint(function: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Make a function a durable step: its outcome is stored once, and no crash or resume runs it again.

    The function may be sync or async, a method too. It may call other checkpoints. Its arguments identify the call together with the
    place where it is made; they and the value it returns stay plain Python values.

    Args:
        function: The function, when used without parentheses.
        name: The step's name; the function's by default.
        **options: See `StepOptions`, which has the meaning, unit and default of each. `ignore` and `retry_on` take one or several.

    Raises:
        InvalidStepName: If the name cannot be stored.

    Example:
        @checkpoint(retries=3, timeout=30)
        def fetch(url: str) -> str:
            return httpx.get(url).text
    """
    if options.get("metadata", ...) is None:
        del options["metadata"]

    def decorate(function: Callable[..., Any]) -> Checkpoint[..., Any]:
        return Checkpoint(function, name or function.__name__, StepOptions(**_normal(options)))

    return decorate if function is None else decorate(function)


def current_step() -> CurrentStep:
    """The step whose body is executing.

    Raises:
        NotInRun: Outside a step of a run.
    """
    here = HERE.get()
    if here is None or here.step is None:
        raise NotInRun("current_step")
    return here.step
