"""Step identity: where the code is (scopes, branches), how a step's path is spelt, and which recorded steps are still unclaimed.

A step is identified by where it is asked and what it is asked; order only breaks ties. Its path is

    <scope path>/<name>@<inputs digest, 10 hex>#<branch>.<k>    k: the how-manieth equal call of this branch
    <scope path>/<name>[<key>]                                  when the caller gives a key; ~1, ~2 for a repeated key

A branch is an asyncio task or a `.submit/.map` call, named in creation order below its parent, anew in each scope: what a
recorded step did inside is not done again and must not shift the names outside. How a call is resolved with these is in `engine`.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from kitaru_zenml.errors import InvalidStepName
from kitaru_zenml.journal.records import Scope, StartedMarker, StepRecord, Usage

if TYPE_CHECKING:
    from kitaru_zenml.execution import Execution

K = TypeVar("K")
_NAME = re.compile(r"[A-Za-z0-9_.:\-]{1,100}")
_KEY = re.compile(r"[^\x00-\x1f\[\]/]{1,100}")


class Branch:
    """A line of execution within a scope: the scope's own body, an asyncio task, or a submitted call."""

    __slots__ = ("_made", "enclosing", "last", "name")

    def __init__(self, name: str = "", enclosing: Branch | None = None, last: str | None = None) -> None:
        self.name = name
        self.enclosing = enclosing  # whose step's body this runs in
        self.last = last  # key of the record that this branch got last
        self._made = itertools.count()

    def child(self) -> Branch:
        """A branch that starts here."""
        return Branch(f"{self.name}~{next(self._made)}", self.enclosing, self.last)

    def stack(self) -> Iterable[Branch]:
        """This branch and those that wait for it because it runs inside a step of theirs."""
        branch: Branch | None = self
        while branch is not None:
            yield branch
            branch = branch.enclosing


@dataclass(slots=True)
class CurrentStep:
    """The step whose body is executing, as `current_step()` gives it to the body.

    Attributes:
        name: Of the step.
        path: Its identity in the run.
        idempotency_key: The same whenever this call of this run is tried, also after a crash; give it to APIs that take one.
        attempt: 1 for the first try, one more for each retry.
        run_id: Of the run.
    """

    name: str
    path: str
    idempotency_key: str
    attempt: int
    run_id: str
    metadata: dict[str, Any] = field(default_factory=dict)
    usage: Usage | None = None
    step_run: str | None = None  # of an isolated step: the native ZenML step run that did it

    def log_usage(self, model: str, input_tokens: int = 0, output_tokens: int = 0, cost: float | None = None) -> None:
        """Say what a model call consumed; `cost` in US dollars. Several calls in one step add up."""
        so_far = self.usage or Usage()
        total = None if cost is None and so_far.cost is None else (cost or 0) + (so_far.cost or 0)
        tokens = so_far.input_tokens + input_tokens, so_far.output_tokens + output_tokens
        self.usage = Usage(model=model, input_tokens=tokens[0], output_tokens=tokens[1], cost=total)

    def log_metadata(self, **values: Any) -> None:
        """Add to the step's metadata, JSON-like values; ZenML shows them on the step run."""
        self.metadata.update(values)


@dataclass(frozen=True, slots=True)
class Here:
    """Where the code is: run, scopes, branch, and the step whose body executes."""

    execution: Execution
    branch: Branch
    scopes: tuple[Scope, ...] = ()
    step: CurrentStep | None = None
    is_async: bool = False  # whether the innermost body is a coroutine

    @property
    def path(self) -> str:
        """Path of the innermost scope."""
        return self.scopes[-1].path if self.scopes else ""


HERE: ContextVar[Here | None] = ContextVar("kitaru_here", default=None)


def install_task_factory(loop: asyncio.AbstractEventLoop) -> None:
    """Make each task of a loop a branch of its own. Tasks outside a run are made as before."""
    inner = loop.get_task_factory()
    if getattr(inner, "names_branches", False):
        return

    def factory(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any) -> asyncio.Future[Any]:
        context: Context = kwargs.pop("context", None) or copy_context()
        here = context.get(HERE)
        branch = None
        if here is not None:
            branch = here.branch.child()
            context.run(HERE.set, replace(here, branch=branch))
        if inner is None:
            task: asyncio.Future[Any] = asyncio.Task(coro, loop=loop, context=context, **kwargs)
        else:
            task = inner(loop, coro, context=context, **kwargs)  # type: ignore[call-arg]
        if here is not None and branch is not None:
            here.execution.engine.branch_started(branch)
            task.add_done_callback(_ended(here.execution, branch), context=context)
        return task

    factory.names_branches = True  # type: ignore[attr-defined]
    loop.set_task_factory(factory)  # type: ignore[arg-type]


def _ended(execution: Execution, branch: Branch) -> Callable[[asyncio.Future[Any]], None]:
    return lambda _: execution.engine.branch_ended(branch)


# --- paths ---------------------------------------------------------------------------------------------------------------


def check_name(name: str, key: str | None = None) -> None:
    """Refuse a name or key that could not be stored or would blur a path.

    Raises:
        InvalidStepName: With the reason.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidStepName(
            str(name), "a character is not allowed" if name and len(str(name)) <= 100 else "its length is wrong"
        )
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidStepName(
            f"{name}[{key}]", "its key is empty, too long, or holds a bracket, a slash or a control character"
        )


def call_prefix(scope: str, name: str, digest: str) -> str:
    """What the paths of equal calls in a scope share."""
    return f"{scope}/{name}@{digest[:10]}"


@dataclass(slots=True, eq=False)
class Known:
    """What the journal knows of a path: a record, or only that it was begun (a scope around records, a marker, a reopened step)."""

    scope: Scope
    key: str | None = None  # of the record, if there is one
    number: int = -1
    record: StepRecord | None = None  # held until it is delivered, then read again if it is asked again
    marker: StartedMarker | None = None
    generation: int = 0
    dormant: bool = False  # inside a failed step: asked again only if that one is tried again
    reused: bool = False  # known of another run only, which this one is a fork of

    @property
    def rank(self) -> tuple[int, str]:
        """Its place in the order of delivery."""
        return self.number, self.scope.path


@dataclass(slots=True)
class Counts:
    """What is counted within one scope. Gone when the scope's step is recorded."""

    counts: dict[Any, int] = field(default_factory=dict)
    used: dict[Any, set[int]] = field(default_factory=dict)
    finished: list[tuple[Known, bool]] = field(default_factory=list)  # asked again if the body is retried; is it to run again

    def count(self, what: Any) -> int:
        """How often this was counted before."""
        n = self.counts.get(what, 0)
        self.counts[what] = n + 1
        return n

    def lowest_free(self, what: Any) -> int:
        """The lowest number of a kind that neither the journal nor this leg has given out."""
        n = self.counts.get(what, 0)
        while n in self.used.get(what, ()):
            n += 1
        self.counts[what] = n + 1
        return n

    def note(self, scope: Scope) -> None:
        """The journal has given out this scope's numbers."""
        self.used.setdefault(("ordinal", scope.name), set()).add(scope.ordinal)
        self.used.setdefault(("equal", scope.name, scope.key, scope.digest), set()).add(scope.equal)


class Claims:
    """The known paths that no call of this leg has claimed yet, found by group, by equal inputs and by turn. Not thread-safe."""

    def __init__(self) -> None:
        self._by_path: dict[str, Known] = {}
        self._group: dict[str, dict[str, Known]] = {}
        self._equal: dict[tuple[str, str], dict[str, Known]] = {}
        self._turn: dict[tuple[str, tuple[str, int]], dict[str, Known]] = {}

    def __len__(self) -> int:
        return len(self._by_path)

    def __iter__(self) -> Iterator[Known]:
        return iter(list(self._by_path.values()))

    def add(self, known: Known) -> None:
        """Let calls claim this path."""
        scope = known.scope
        self._by_path[scope.path] = known
        self._group.setdefault(scope.group, {})[scope.path] = known
        self._equal.setdefault((scope.group, scope.digest), {})[scope.path] = known
        self._turn.setdefault((scope.group, scope.turn), {})[scope.path] = known

    def get(self, path: str) -> Known | None:
        """The unclaimed entry of a path."""
        return self._by_path.get(path)

    def remove(self, path: str) -> Known | None:
        """Claim a path."""
        known = self._by_path.pop(path, None)
        if known is not None:
            scope = known.scope
            _drop(self._group, scope.group, path)
            _drop(self._equal, (scope.group, scope.digest), path)
            _drop(self._turn, (scope.group, scope.turn), path)
        return known

    def of(self, group: str) -> list[Known]:
        """Unclaimed steps of a group, the earliest first."""
        return sorted(self._group.get(group, {}).values(), key=_earliest)

    def equal(self, group: str, digest: str) -> list[Known]:
        """Unclaimed steps of a group with the same inputs, the earliest first."""
        return sorted(self._equal.get((group, digest), {}).values(), key=_earliest)

    def at_turn(self, group: str, turn: tuple[str, int]) -> list[Known]:
        """Unclaimed steps of a group that stand at the same turn of the same branch."""
        return list(self._turn.get((group, turn), {}).values())


def _earliest(known: Known) -> tuple[bool, int, str]:
    return (known.number < 0, known.number, known.scope.path)


def _drop(index: dict[K, dict[str, Known]], place: K, path: str) -> None:
    index[place].pop(path, None)
    if not index[place]:
        del index[place]
