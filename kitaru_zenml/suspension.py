"""What every call that waits has in common: a human answer, a time, an event, child runs (`waits`, `timers`, `events`, `children`).

A waiting call stores what it waits for once (`OpenWait`), then looks until it has arrived. While the run's process has nothing else to do,
and each wait has had its grace, the run suspends: the leg closes, the lease is free, the process may end. The next leg asks the same
call again and finds the same `OpenWait`; what it waited for becomes the call's record, and replays from then on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from kitaru_zenml.drivers import AsyncCaller, SyncCaller, drive, drive_async
from kitaru_zenml.errors import NotInRun
from kitaru_zenml.identity import HERE, Here, check_name
from kitaru_zenml.inputs import digest_inputs
from kitaru_zenml.journal.records import OpenWait, WaitKind
from kitaru_zenml.options import StepOptions

if TYPE_CHECKING:
    from kitaru_zenml.execution import Execution


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a waiting call gets: a value, or a failure that is raised into the flow and recorded as such."""

    value: Any = None
    error: Exception | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Waiting(Protocol):
    """One kind of waiting. Frozen: the same object may be looked at from any thread."""

    @property
    def kind(self) -> WaitKind:
        """For the stored wait."""

    @property
    def every(self) -> float:
        """Seconds between two looks; 0 for one that costs nothing (looks at memory and the clock)."""

    def details(self, now: datetime) -> dict[str, Any]:
        """The fields of the `OpenWait` that say what is waited for, fixed when it is first asked."""

    def arrived(self, wait: OpenWait, execution: Execution) -> Arrival | None:
        """What has arrived, if it has. Called off the event loop if `every` is not 0."""

    def give_back(self, arrival: Arrival, execution: Execution) -> None:
        """What has arrived did not reach the journal (the call was cancelled): another call may get it."""

    def suspends(self, wait: OpenWait, waited: float, execution: Execution) -> bool:
        """Whether the run may suspend on this, after having waited for some seconds in this leg."""


def await_in_run(waiting: Waiting, name: str, inputs: dict[str, Any], returns: Any = Any) -> Any:
    """Make the waiting call `name` where the code is: blocks in a sync flow or step, an awaitable in an async one.

    Args:
        waiting: What to wait for.
        name: Of the step that it becomes.
        inputs: What identifies the call besides its place.
        returns: The declared type of the value.

    Raises:
        NotInRun: Outside a flow.
        InvalidStepName: If the name cannot be stored.
    """
    from kitaru_zenml.engine import Call

    check_name(name)
    here = HERE.get()
    if here is None:
        raise NotInRun(name)
    call = Call(name, digest_inputs(inputs), StepOptions(), kind=waiting.kind, returns=returns, waiting=waiting)
    if here.is_async and asyncio._get_running_loop() is not None:
        return _awaited(call, here)
    return drive(here.execution.engine.call(call, here, SyncCaller()), here.execution.store, name, _no_body)


async def _awaited(call: Any, here: Here) -> Any:
    at = HERE.get() or here  # where it is awaited decides its branch
    return await drive_async(at.execution.engine.call(call, at, AsyncCaller()), at.execution.store, call.name, _no_body)


def _no_body() -> Any:
    raise AssertionError("a waiting call has no body")


def grace_passed(waited: float, grace: float | None, execution: Execution) -> bool:
    """Whether a wait has had its grace: its own, else the flow's; a flow's `None` never suspends."""
    seconds = execution.options.grace if grace is None else grace
    return seconds is not None and waited >= seconds


def seconds_of(duration: float | timedelta | None) -> float | None:
    """A duration in seconds."""
    return duration.total_seconds() if isinstance(duration, timedelta) else duration


def is_past(deadline: datetime | None) -> bool:
    """Whether there is a deadline and it has come."""
    return deadline is not None and datetime.now(UTC) >= deadline
