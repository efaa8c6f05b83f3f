"""`@flow`: a ZenML dynamic pipeline whose body is a durable run.

A flow object is a `DynamicPipeline` (subclass) that ZenML finds at the function's own import path, so that `zenml pipeline runs list`,
schedules, snapshots and remote orchestrators see an ordinary pipeline. What is ours begins where ZenML calls the entrypoint.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, fields, replace
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload
from uuid import UUID

from pydantic_core import to_json
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.exceptions import EntityExistsError
from zenml.models import PipelineRunResponse
from zenml.pipelines.dynamic.pipeline_definition import DynamicPipeline
from zenml.pipelines.run_utils import create_placeholder_run

from kitaru_zenml import forks, leg, resumption
from kitaru_zenml.checkpoints import checkpoint
from kitaru_zenml.children import gather_runs, start_child
from kitaru_zenml.errors import EventLoopRunning, InvalidStepName, RunFinished, RunIdTaken, RunIsLeased
from kitaru_zenml.identity import HERE, check_name
from kitaru_zenml.inputs import canonical
from kitaru_zenml.options import FlowOptions, Lineage, OnDrift
from kitaru_zenml.runs import EXTRA, PARENT, RunHandle, named_run
from kitaru_zenml.selection import Reuse

P = ParamSpec("P")
R = TypeVar("R")
_RUN_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,150}")
_OPTIONS = {f.name for f in fields(FlowOptions)}


class Flow(DynamicPipeline, Generic[P, R]):
    """A durable flow. Made by `@flow`."""

    def __init__(
        self,
        *,
        function: Callable[P, Any],
        name: str,
        options: FlowOptions,
        on_cancel: Callable[..., Any] | None = None,
        **zenml: Any,
    ) -> None:
        check_name(name)
        extra = {**(zenml.pop("extra", None) or {}), EXTRA: asdict(options)}
        super().__init__(name=name, entrypoint=function, extra=extra, **zenml)
        self.on_cancel = None if on_cancel is None else checkpoint(name="on_cancel")(on_cancel)
        self.__wrapped__ = function
        self.__doc__ = function.__doc__

    def with_options(self, *args: Any, **options: Any) -> Flow[P, R]:
        """A copy of this flow with other options: those of `FlowOptions` and those of ZenML's pipelines (`run_name`, `schedule`, ...)."""
        ours = {name: options.pop(name) for name in list(options) if name in _OPTIONS}
        merged = replace(self.options, **ours)
        extra = {**self.configuration.extra, **options.pop("extra", {}), EXTRA: asdict(merged)}
        return cast(Flow[P, R], super().with_options(*args, extra=extra, **options))

    @property
    def options(self) -> FlowOptions:
        """How its runs are kept. They travel in the pipeline's configuration: a run finds those it was started with."""
        return FlowOptions(**self.configuration.extra[EXTRA])

    # --- start ---

    @overload
    def run(self, *args: P.args, **kwargs: P.kwargs) -> RunHandle[R]: ...

    @overload
    def run(self, *args: Any, id: str, **kwargs: Any) -> RunHandle[R]: ...

    def run(self, *args: Any, **kwargs: Any) -> RunHandle[R]:
        """Run the flow on the active stack; with a local orchestrator, to its end in this process.

        Inside a flow it is a child run that the flow waits for.

        Args:
            *args: Those of the function.
            **kwargs: Those of the function; and `id`, a name of your own for the run, unless the function takes an `id`: the second call
                under an id gets the same run, and continues it if it did not complete.

        Returns:
            A handle of the run: finished, or suspended (`status` is `paused`); of the submitted one on a remote stack.

        Raises:
            EventLoopRunning: If this thread runs an event loop; use `run_async` there.
            RunIdTaken: If the id belongs to a run with other arguments.
            Exception: What ended the run; a note on it names the run and how to continue.
        """
        if asyncio._get_running_loop() is not None:
            raise EventLoopRunning(self.name, "run")
        if (here := HERE.get()) is not None:
            handle = start_child(self, here, args, kwargs)
            gather_runs([handle], name=f"join:{self.name}")
            return handle
        return self._start(lambda _: None, args, kwargs)

    @overload
    async def run_async(self, *args: P.args, **kwargs: P.kwargs) -> RunHandle[R]: ...

    @overload
    async def run_async(self, *args: Any, id: str, **kwargs: Any) -> RunHandle[R]: ...

    async def run_async(self, *args: Any, **kwargs: Any) -> RunHandle[R]:
        """`run` for a running event loop (a notebook, a web server): the flow runs in a thread of its own, the loop stays free."""
        if (here := HERE.get()) is not None:
            handle = start_child(self, here, args, kwargs)
            await gather_runs([handle], name=f"join:{self.name}")
            return handle
        return await asyncio.to_thread(self._start, lambda _: None, args, kwargs)

    @overload  # type: ignore[override]
    def submit(self, *args: P.args, **kwargs: P.kwargs) -> RunHandle[R]: ...

    @overload
    def submit(self, *args: Any, id: str, **kwargs: Any) -> RunHandle[R]: ...

    def submit(self, *args: Any, **kwargs: Any) -> RunHandle[R]:
        """Start the flow in a thread of its own and return its handle as soon as the run exists in ZenML; see `run`.

        Inside a flow it starts a child run, which `gather_runs` joins.
        """
        if (here := HERE.get()) is not None:
            return start_child(self, here, args, kwargs)
        started: Future[UUID] = Future()

        def work() -> None:
            try:
                self._start(started.set_result, args, kwargs)
            except BaseException as error:
                if not started.done():
                    started.set_exception(error)

        threading.Thread(target=work, name=f"flow-{self.name}").start()
        return RunHandle(started.result())

    def _start(self, on_started: Callable[[UUID], None], args: Any, kwargs: Any) -> RunHandle[R]:
        leg.warm_up()
        if "id" in kwargs and "id" not in inspect.signature(self.__wrapped__).parameters:
            return self._start_once(kwargs["id"], on_started, args, {k: v for k, v in kwargs.items() if k != "id"})
        pipeline = self.copy()  # ZenML keeps a run's arguments on the pipeline object
        pipeline.prepare(*args, **kwargs)
        with leg.reporting(on_started) as report:
            run = pipeline._run()
        if report.error is not None:
            raise report.error
        assert run is not None
        return resumption.go_on(RunHandle(run.id, report.summary), report)

    def _start_once(self, id: str, on_started: Callable[[UUID], None], args: Any, kwargs: Any) -> RunHandle[R]:
        if not _RUN_ID.fullmatch(id):
            raise InvalidStepName(id, "as the id of a run it takes up to 150 letters, digits and any of `_ . : -`")
        run, created = self.create_run(f"{self.name}-{id}", args, kwargs)
        if not created:
            self._same_arguments(id, run, args, kwargs)
        on_started(run.id)
        handle: RunHandle[R] = RunHandle(run.id)
        if run.status in (ExecutionStatus.COMPLETED, ExecutionStatus.STOPPED, ExecutionStatus.PAUSED):
            return handle
        try:
            return resumption.resume(run.id)
        except RunIsLeased:
            handle.wait()
        except RunFinished:
            pass
        return handle

    def _same_arguments(self, id: str, run: PipelineRunResponse, args: Any, kwargs: Any) -> None:
        given = {name: canonical(value, []) for name, value in self._validate_entrypoint_args(*args, **kwargs).items()}
        theirs = {name: canonical(value, []) for name, value in (run.config.parameters or {}).items()}
        if other := sorted(name for name in {*given, *theirs} if to_json(given.get(name)) != to_json(theirs.get(name))):
            raise RunIdTaken(id, str(run.id), other)

    def create_run(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], *, parent: str | None = None
    ) -> tuple[PipelineRunResponse, bool]:
        """The ZenML run of this name, created if there is none, and whether it was. Nothing executes it yet.

        ZenML keeps the names of runs unique, so of several who create it one does, and a crash at any moment leaves one or none.
        """
        if (found := named_run(name)) is not None:
            return found, False
        pipeline = self.copy()
        if parent is not None:
            tags = [*(self.configuration.tags or []), f"child-of-{parent[:8]}"]
            pipeline = pipeline.with_options(extra={PARENT: parent}, tags=tags)
        pipeline.prepare(*args, **kwargs)
        snapshot = pipeline._create_snapshot(**{**pipeline._run_args, "run_name": name})
        try:
            run = create_placeholder_run(snapshot=snapshot)
        except EntityExistsError:
            found = named_run(name)
            assert found is not None
            return found, False
        return run, True

    def _run(self) -> PipelineRunResponse | None:
        """Where every way of starting a pipeline ends up (`flow()`, `run`, a schedule)."""
        stack = Client().active_stack
        if self._run_args.get("schedule") or not leg.runs_in_process(stack):
            return super()._run()
        snapshot = self._create_snapshot(**self._run_args)
        run = create_placeholder_run(snapshot=snapshot)
        assert run is not None
        leg.run_in_process(snapshot, run, stack)
        return run

    # --- continue ---

    def resume(
        self,
        run: str | UUID,
        *,
        on_drift: OnDrift | None = None,
        takeover: bool = False,
        retry: tuple[str, ...] = (),
    ) -> RunHandle[R]:
        """Continue a run of this flow that was killed, failed or paused; finished steps do not run again.

        Args:
            run: Its id, an unambiguous prefix of it, or its name.
            on_drift: What to do when a finished step is asked again with other inputs, in this leg.
            takeover: Supersede an executor that is alive.
            retry: Failed steps to run again although the flow caught their failure.

        Raises:
            RunNotFound: If there is no such run.
            RunFinished: If it has completed.
            RunIsLeased: If another process executes it.
            StepInDoubt: If an at-most-once step was started and has no outcome.
            Exception: What ended the run again.
        """
        if asyncio._get_running_loop() is not None:
            raise EventLoopRunning(self.name, "resume")
        return resumption.resume(run, on_drift=on_drift, takeover=takeover, retry=retry)

    async def resume_async(self, run: str | UUID, **options: Any) -> RunHandle[R]:
        """`resume` for a running event loop."""
        return await asyncio.to_thread(resumption.resume, run, **options)

    # --- fork ---

    def replay(  # type: ignore[override]  # ZenML's own replay skips steps by name and knows nothing of a journal
        self,
        run: str | UUID,
        *,
        from_: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        reuse: Reuse = "before",
        label: str | None = None,
    ) -> RunHandle[R]:
        """Fork a run: a new run that reuses its finished steps up to a cut and runs the rest. The origin stays as it is.

        Args:
            run: The origin: its id, an unambiguous prefix of it, or its name.
            from_: Run from this step: its name (`fetch#3`), path, or the end of its name.
            overrides: Take these values instead of what the steps returned, by name or path. They are validated against the steps'
                return types, and without `from_` the cut is where the first of them began.
            inputs: Arguments of the flow that change; the others are the origin's.
            reuse: `before` reuses what finished before the cut began, `unchanged` also later steps that are asked with the same inputs.
            label: Why, shown with the fork and with each overridden value.

        Raises:
            RunNotFound: If there is no such run.
            StepNotFound: If the run has no such step; near names are listed.
            AmbiguousStep: If a name fits several steps.
            InvalidOverride: If a value does not fit what its step returns.
            InvalidInput: If the flow does not take the inputs.
            Exception: What ended the fork.

        Example:
            handle = audit.replay("3f2a", overrides={"classify#0": "refund"}, label="it was a refund")
        """
        if asyncio._get_running_loop() is not None:
            raise EventLoopRunning(self.name, "replay")
        return forks.replay(run, from_=from_, overrides=overrides, inputs=inputs, reuse=reuse, label=label, flow=self)

    async def replay_async(self, run: str | UUID, **options: Any) -> RunHandle[R]:
        """`replay` for a running event loop."""
        return await asyncio.to_thread(forks.replay, run, flow=self, **options)

    # --- ZenML's way in ---

    def _call_entrypoint(self, *args: Any, **kwargs: Any) -> Any:
        self._clear_state()
        self._parameters = self._validate_entrypoint_args(*args, **kwargs)
        leg.execute(self, dict(self._parameters))


class _Decorator(Protocol):
    """What `flow(...)` with options returns: it sees whether the function is async."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Flow[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> Flow[P, R]: ...


@overload
def flow(function: Callable[P, Coroutine[Any, Any, R]], /) -> Flow[P, R]: ...


@overload
def flow(function: Callable[P, R], /) -> Flow[P, R]: ...


@overload
def flow(
    *,
    name: str | None = None,
    lineage: Lineage = "async",
    lapse_seconds: float = 30.0,
    inline_limit: int = 256 * 1024,
    max_workers: int = 32,
    max_children: int = 8,
    on_drift: OnDrift = "raise",
    grace: float | None = 10.0,
    allow_pickle: bool = False,
    limit: str | None = None,
    on_cancel: Callable[..., Any] | None = None,
    **zenml: Any,
) -> _Decorator: ...


def flow(function: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Make a function a durable flow: a ZenML dynamic pipeline that is killed at any point and resumed from any machine.

    Args:
        function: The function, when used without parentheses; sync or async, at the top level of its module.
        name: The pipeline's name; the function's by default.
        **options: Those of `FlowOptions`, which has the meaning, unit and default of each; and those of ZenML's `@pipeline` (`tags`,
            `settings`, `model`, `on_failure`, ...).
        on_cancel: Called, as a step named `on_cancel`, when the run was cancelled: to undo what must not stay. It gets those of the flow's
            arguments that it names, and `reason`.

    Raises:
        InvalidStepName: If the name cannot be stored.

    Example:
        @flow
        def audit(package: str) -> str:
            return judge(read_licence(package))

        handle = audit.run("zenml")
        print(handle.id, handle.result())
    """
    ours = {key: options.pop(key) for key in list(options) if key in _OPTIONS}

    def decorate(function: Callable[..., Any]) -> Flow[..., Any]:
        if not inspect.isfunction(function):
            raise InvalidStepName(repr(function), "`@flow` takes a function")
        return Flow(function=function, name=name or function.__name__, options=FlowOptions(**ours), **options)

    return decorate if function is None else decorate(function)
