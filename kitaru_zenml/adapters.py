"""What an adapter of an agent framework needs of the runtime: scopes, steps and waits. The three adapters use this and no engine room.

An adapter opens a *scope* for what the framework calls an agent run, a graph or a workflow, and runs *steps* in it. A scope has no
outcome of its own; it is resolved by its content like a step, so that two equal agents in a `gather` do not swap. A step is told by
its inputs, or by a `key` that the framework gives (a tool call id, a node's name), never by a counter over several branches.

Example:
    async with scope("support", {"prompt": prompt}, kind="agent"):
        response = await run_step(Step("model", {"messages": messages}, kind="model"), lambda: model.request(messages))
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kitaru_zenml.checkpoints import current_step
from kitaru_zenml.codec import decode_failure, register_failure, type_path
from kitaru_zenml.drivers import AsyncCaller, SyncCaller, drive, drive_async
from kitaru_zenml.engine import Call
from kitaru_zenml.errors import NotInRun
from kitaru_zenml.execution import any_live
from kitaru_zenml.identity import HERE, Branch, Here, check_name
from kitaru_zenml.inputs import digest_inputs
from kitaru_zenml.journal.records import Failure, Scope
from kitaru_zenml.options import StepOptions
from kitaru_zenml.waits import wait

__all__ = [
    "Failure",
    "Step",
    "current_step",
    "decode_failure",
    "derived_id",
    "in_run",
    "last_record",
    "register_failure",
    "run_step",
    "run_step_sync",
    "scope",
    "scope_sync",
    "type_path",
    "wait",
]

_IDS = uuid.UUID("5f1c9d0e-7a2b-4f53-9a43-1f6c0c1d7e42")


@dataclass(frozen=True)
class Step:
    """A durable step, as an adapter asks for it.

    Attributes:
        name: As a person reads it, for example `model` or `tool:refund`.
        inputs: What identifies it besides its place and key, by name; shown as the step's inputs.
        key: A name that the framework gives to this one call, or `None` to tell it by its inputs.
        kind: What it is to ZenML and the views: `model`, `tool`, `node`, ...
        volatile: Inputs that may differ on a replay (timestamps, ids): they do not identify the step.
        options: Retries, timeout and the like.
        returns: The type of its outcome, for values that do not describe themselves.
        after: Keys of the records that it follows (see `last_record`), where the framework's tasks do not show it.
    """

    name: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    kind: str = "step"
    volatile: tuple[str, ...] = ()
    options: StepOptions = field(default_factory=StepOptions)
    returns: Any = Any
    after: tuple[str, ...] = ()

    def _call(self) -> Call:
        check_name(self.name, self.key)
        ignore = (*self.options.ignore, *self.volatile)
        return Call(
            self.name, digest_inputs(self.inputs, ignore), replace(self.options, ignore=ignore), key=self.key, kind=self.kind,
            returns=self.returns, after=self.after,
        )  # fmt: skip


def in_run() -> bool:
    """Whether the code is inside a flow's run. Outside, an adapter does what the framework does without it.

    Raises:
        NotInRun: If a flow is running in this process, but this thread or loop does not know its run.
    """
    if HERE.get() is not None:
        return True
    if any_live():
        raise NotInRun("a durable call of an adapter")
    return False


def last_record() -> str | None:
    """The key of the record that this line of execution got last: that of the step which it has just run."""
    here = HERE.get()
    return None if here is None else here.branch.last


def derived_id(name: str) -> str:
    """An id for the next thing of this name that the code does here: the same again on a replay, another one each time it is asked.

    For ids that a framework gives to its runs. It follows the order within the branch, so it must not identify a step.
    """
    here = _here(name)
    number = here.execution.engine.count_here(("id", name, here.branch.name), here)
    return str(uuid.uuid5(_IDS, f"{here.execution.run_id}|{here.path}|{here.branch.name}|{name}|{number}"))


async def run_step(step: Step, body: Callable[[], Awaitable[Any]]) -> Any:
    """Replay or run a step; returns its outcome, or raises its failure, as a replay gives it."""
    here = _here(step.name)
    return await drive_async(
        here.execution.engine.call(step._call(), here, AsyncCaller()), here.execution.store, step.name, body
    )


def run_step_sync(step: Step, body: Callable[[], Any]) -> Any:
    """`run_step` for a body that blocks its thread."""
    here = _here(step.name)
    return drive(here.execution.engine.call(step._call(), here, SyncCaller()), here.execution.store, step.name, body)


@contextlib.asynccontextmanager
async def scope(name: str, inputs: Mapping[str, Any], *, kind: str, key: str | None = None) -> AsyncIterator[Scope]:
    """Open a scope: what is done inside belongs to it, in identity, in ZenML's grouping and on every screen.

    Args:
        name: Of the scope, for people.
        inputs: What it is about; two scopes of equal inputs are told apart by the order in which their branch opens them.
        kind: `agent`, `graph`, `workflow`, ...
        key: A name that the framework gives to this one, or `None`.
    """
    here = _here(name)
    engine = here.execution.engine
    call = Step(name, inputs, key, kind)._call()
    opened = await drive_async(engine.enter(call, here, AsyncCaller()), here.execution.store, name, _no_body_async)
    with _inside(here, opened, is_async=True):
        yield opened


@contextlib.contextmanager
def scope_sync(name: str, inputs: Mapping[str, Any], *, kind: str, key: str | None = None) -> Iterator[Scope]:
    """`scope` for code that blocks its thread."""
    here = _here(name)
    call = Step(name, inputs, key, kind)._call()
    opened = drive(here.execution.engine.enter(call, here, SyncCaller()), here.execution.store, name, _no_body)
    with _inside(here, opened, is_async=here.is_async):
        yield opened


@contextlib.contextmanager
def _inside(here: Here, opened: Scope, *, is_async: bool) -> Iterator[None]:
    branch = Branch(enclosing=here.branch)
    token = HERE.set(replace(here, branch=branch, scopes=(*here.scopes, opened), is_async=is_async))
    try:
        yield
    finally:
        HERE.reset(token)
        if branch.last is not None:
            here.branch.last = branch.last
        here.execution.engine.leave(opened, here)


def _here(name: str) -> Here:
    here = HERE.get()
    if here is None:
        raise NotInRun(name)
    return here


def _no_body() -> Any:
    raise AssertionError("a scope has no body")


async def _no_body_async() -> Any:
    raise AssertionError("a scope has no body")
