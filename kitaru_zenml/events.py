"""`event`: a stream of what others send to the run by name, each to the flow exactly once and in the order in which it was sent.

A sent event lies in the run's inbox; a flow that takes it stores it as the record of that call, so a replay gets the same events in
the same places. Events are not shown as step runs in ZenML (a run may take ten thousand); `kitaru show` counts them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from kitaru_zenml.errors import EventTimedOut
from kitaru_zenml.identity import check_name
from kitaru_zenml.journal.records import OpenWait, WaitKind
from kitaru_zenml.suspension import Arrival, await_in_run, grace_passed, is_past, seconds_of

if TYPE_CHECKING:
    from kitaru_zenml.execution import Execution

TAKEN = "inbox"  # under this name a record's metadata says which object of the inbox it took


class EventStream:
    """What is sent to the run under a name; iterate over it, with `async for` in an async flow. It never ends by itself."""

    def __init__(self, name: str, timeout: float | timedelta | None = None, grace: float | None = None) -> None:
        check_name(name)
        self.name, self._timeout, self._grace = name, seconds_of(timeout), grace

    def next(self) -> Any:
        """The next event's payload; in an async flow, an awaitable of it.

        Raises:
            EventTimedOut: If none came within the timeout.
            NotInRun: Outside a flow.
        """
        return await_in_run(AwaitedEvent(self.name, self._timeout, self._grace), self.name, {"event": self.name})

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.next()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            yield await self.next()


def event(name: str, *, timeout: float | timedelta | None = None, grace: float | None = None) -> EventStream:
    """The events that `client.send_event(run, name, payload)` and `kitaru send` put in, in order, each exactly once.

    Args:
        name: Of the events.
        timeout: Seconds, or a timedelta, to wait for each; without one it waits for ever.
        grace: Seconds that the process goes on waiting before the run suspends; the flow's setting by default.

    Raises:
        InvalidStepName: If the name cannot be stored.

    Example:
        for order in event("orders"):
            if order == "close":
                break
            ship(order)
    """
    return EventStream(name, timeout, grace)


@dataclass(frozen=True)
class AwaitedEvent:
    """A `suspension.Waiting` for the next event of a name."""

    name: str
    timeout: float | None
    own_grace: float | None
    kind: WaitKind = "event"
    every: float = 0

    def details(self, now: datetime) -> dict[str, Any]:
        """See `suspension.Waiting`."""
        return {"event": self.name, "deadline": None if self.timeout is None else now + timedelta(seconds=self.timeout)}

    def arrived(self, wait: OpenWait, execution: Execution) -> Arrival | None:
        """See `suspension.Waiting`."""
        if (taken := execution.inbox.take_event(self.name)) is not None:
            item, sent = taken
            return Arrival(sent.payload, metadata={TAKEN: item})
        return Arrival(error=EventTimedOut(self.name, wait.display)) if is_past(wait.deadline) else None

    def give_back(self, arrival: Arrival, execution: Execution) -> None:
        """See `suspension.Waiting`."""
        if TAKEN in arrival.metadata:
            execution.inbox.put_back(arrival.metadata[TAKEN])

    def suspends(self, wait: OpenWait, waited: float, execution: Execution) -> bool:
        """See `suspension.Waiting`."""
        return grace_passed(waited, self.own_grace, execution)
