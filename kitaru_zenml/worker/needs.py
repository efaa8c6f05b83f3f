"""What a run needs of a worker: the one decision, made from what the journal and ZenML say of the run.

`read_facts` reads the journal's side in a few requests that do not grow with the run. `decide` is pure. A run that is suspended says in
the close of its last leg what it suspended on, and how much of its inbox it had looked at: so no record need be read to see news.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from zenml.enums import ExecutionStatus

from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.lease import is_gone
from kitaru_zenml.journal.records import (
    Beat,
    Lease,
    LegClosedEvent,
    OpenWait,
    answer_name,
    cancel_name,
    refused_name,
    run_folder,
    unseal,
    wait_name,
)

NO_LEG = ("settle", "give up")  # purposes of leases under which no code of the flow runs
BEGIN_PATIENCE = 15.0  # seconds in which whoever made a run on this kind of stack begins it
START_PATIENCE = 600.0  # seconds in which a submitted run, or one that ZenML's server resumes, begins its leg
START_LOOK = 10.0  # seconds between two looks at it
BACKOFF, MAX_BACKOFF = 1.0, 60.0  # seconds before a run that crashed without progress is started again

_ON_THE_WAY = {ExecutionStatus.INITIALIZING, ExecutionStatus.PROVISIONING, ExecutionStatus.QUEUED, ExecutionStatus.RUNNING}
_LIVING = {*_ON_THE_WAY, ExecutionStatus.PAUSED, ExecutionStatus.RESUMING}


# --- facts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What the journal says of a run.

    Attributes:
        lease: The newest lease; `None` if nobody ever took one.
        beat: Its last heartbeat.
        close: How its leg ended, if it ended in order.
        gone: Whether its holder is known to be dead.
        waits: What the run suspended on.
        answered: Keys of waits that have an answer nobody has looked at.
        inbox: Objects in the inbox.
        cancelled: Whether somebody asked it to stop.
    """

    lease: Lease | None = None
    beat: Beat | None = None
    close: LegClosedEvent | None = None
    gone: bool = False
    waits: tuple[OpenWait, ...] = ()
    answered: frozenset[str] = frozenset()
    inbox: int = 0
    cancelled: bool = False

    @property
    def released(self) -> bool:
        """Whether the last leg let the run go."""
        return self.beat is not None and self.beat.released

    @property
    def watched(self) -> tuple[int, int]:
        """Epoch and beat, as `take_lease` compares them."""
        return (self.lease.epoch if self.lease else 0, self.beat.count if self.beat else 0)

    @property
    def mark(self) -> tuple[int, int, bool]:
        """Stays the same while nothing happens."""
        return (*self.watched, self.gone)


def read_facts(journal: Journal) -> Facts:
    """Look at a run's journal.

    Raises:
        StoreUnavailable: If its store does not answer.
        CorruptRecord: If an object that matters here is damaged.
    """
    folder = run_folder(journal.run_id)
    epoch = max((_number(name) for name in journal.store.list(folder + "lease/") if name.endswith(".json")), default=0)
    lease = journal.lease(epoch) if epoch else None
    if lease is None:
        return Facts(cancelled=journal.is_cancelled())
    beat = journal.beat(epoch)
    inbox = set(journal.store.list(folder + "inbox/"))
    cancelled = cancel_name(journal.run_id) in inbox
    released = beat is not None and beat.released
    gone = not released and is_gone(lease.holder)
    close = journal.last_close()
    close = close if close is not None and close.epoch == epoch else None
    waits = _suspended_on(journal, close) if close is not None and close.status == "paused" else ()
    answered = frozenset(w.key for w in waits if w.kind == "wait" and _has_answer(journal.run_id, w.key, inbox))
    return Facts(lease, beat, close, gone, waits, answered, len(inbox), cancelled)


def _number(name: str) -> int:
    return int(name.rpartition("/")[2].removesuffix(".json"))


def _suspended_on(journal: Journal, close: LegClosedEvent) -> tuple[OpenWait, ...]:
    names = [wait_name(journal.run_id, key) for key in close.suspended_on]
    found = zip(names, journal.store.get_many(names), strict=True)
    return tuple(unseal(OpenWait, data, name) for name, data in found if data is not None)


def _has_answer(run_id: str, wait: str, inbox: Collection[str]) -> bool:
    number = 0
    while refused_name(run_id, wait, number) in inbox:
        number += 1
    return answer_name(run_id, wait, number) in inbox


def count_crashes(journal: Journal) -> int:
    """How many legs, up to the newest, died one after another without having stored a record."""
    leases = [lease for lease in journal.leases() if lease.purpose not in NO_LEG]
    snapshot = journal.load()
    moved = {record.epoch for record in snapshot.records.values()}
    closed = {event.epoch for event in snapshot.events if isinstance(event, LegClosedEvent)}
    crashes = 0
    for lease in reversed(leases):
        if lease.epoch in moved or lease.epoch in closed:
            break
        beat = journal.beat(lease.epoch)
        if beat is None or not beat.released:  # else it was handed on, or refused to go on: neither crash nor progress
            crashes += 1
    return crashes


# --- decisions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Continue the run now."""

    why: str
    watched: tuple[int, int] | None = None  # a lease that lapsed by this worker's own clock


@dataclass(frozen=True)
class Later:
    """Look at it again at a time."""

    at: datetime
    why: str


@dataclass(frozen=True)
class Leave:
    """It needs nothing; whatever changes that leaves a hint of its own."""

    why: str


@dataclass(frozen=True)
class GiveUp:
    """End it as failed."""

    why: str
    watched: tuple[int, int] | None = None


Decision = Start | Later | Leave | GiveUp


@dataclass(frozen=True)
class Asked:
    """What `decide` may ask for, because only few runs need it.

    Attributes:
        crashes: Counts the crashes in a row.
        unfinished: Of some run ids, those that have not ended.
        begins_here: Whether a run that never began is ours to begin, because nobody else is there who will.
    """

    crashes: Callable[[], int] = lambda: 0
    unfinished: Callable[[Collection[str]], Collection[str]] = lambda ids: ()
    begins_here: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Moment:
    """When it is decided: by the clock, and how long the worker has seen the run as it is."""

    unchanged: float = 0.0
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def later(self, seconds: float, why: str) -> Later:
        """Look again in some seconds."""
        return Later(self.now + timedelta(seconds=seconds), why)


def is_alive(facts: Facts, unchanged: float) -> bool:
    """Whether somebody executes the run, as far as can be told."""
    lease = facts.lease
    return lease is not None and not facts.released and not facts.gone and unchanged < lease.lapse_seconds


def decide(facts: Facts, status: ExecutionStatus, moment: Moment, ask: Asked, max_crashes: int) -> Decision:
    """What a run needs now.

    Args:
        facts: What its journal says.
        status: Its status in ZenML.
        moment: When, and for how many seconds this worker has seen it unchanged.
        ask: What only some decisions need.
        max_crashes: So many legs in a row that die without progress are enough.
    """
    if is_alive(facts, moment.unchanged):
        assert facts.lease is not None
        return moment.later(facts.lease.lapse_seconds, f"executed by {facts.lease.holder}")
    if status == ExecutionStatus.FAILED and facts.cancelled:
        return Start("it failed, and is to be cancelled")
    if status not in _LIVING:
        return Leave(f"it is {status.value}")
    if facts.lease is None:
        return _never_began(status, moment, ask)
    if facts.close is not None and facts.close.status == "failed":
        return GiveUp("it has failed, which ZenML does not show", None if facts.released or facts.gone else facts.watched)
    if not facts.released:
        return _dead(facts, moment, ask, max_crashes)
    if facts.cancelled and (facts.close is not None or status == ExecutionStatus.PAUSED):
        return Start("it is to be cancelled")
    if status == ExecutionStatus.PAUSED:
        return _suspended(facts, moment, ask)
    handed_on = facts.close is None and facts.lease.purpose == "resume"
    if status == ExecutionStatus.RESUMING and (handed_on or (facts.close is not None and facts.close.status == "paused")):
        if moment.unchanged < START_PATIENCE:
            return moment.later(START_LOOK, "it is being started elsewhere")
        return Start("it was to be started elsewhere, and was not")
    return Start("its last process let it go before its end")


def _never_began(status: ExecutionStatus, moment: Moment, ask: Asked) -> Decision:
    if not ask.begins_here():
        return Leave("its parent or its orchestrator is to begin it")
    if moment.unchanged < BEGIN_PATIENCE:
        return moment.later(BEGIN_PATIENCE, "it is about to begin")
    return Start(f"it is {status.value}, and nobody began it")


def _dead(facts: Facts, moment: Moment, ask: Asked, max_crashes: int) -> Decision:
    lease = facts.lease
    assert lease is not None
    dead_for = moment.unchanged if facts.gone else moment.unchanged - lease.lapse_seconds
    how = "is gone" if facts.gone else f"has not beaten for {lease.lapse_seconds:g} s"
    crashes = ask.crashes()
    watched = None if facts.gone else facts.watched
    if crashes >= max_crashes:
        return GiveUp(f"its process died {crashes} times in a row without finishing a step", watched)
    wait = min(BACKOFF * 2 ** (crashes - 1), MAX_BACKOFF) if crashes else 0.0
    if dead_for < wait:
        return moment.later(wait - dead_for, f"it crashed {crashes} times in a row; waiting {wait:g} s")
    return Start(f"{lease.holder} {how}", watched)


def _suspended(facts: Facts, moment: Moment, ask: Asked) -> Decision:
    assert facts.close is not None or not facts.waits
    seen = facts.close.inbox if facts.close is not None else 0
    for wait in facts.waits:
        if wait.key in facts.answered:
            return Start(f"{wait.display} was answered")
        if wait.deadline is not None and wait.deadline <= moment.now:
            return Start(f"{wait.display} is due" if wait.kind == "timer" else f"{wait.display} timed out")
        if wait.kind == "event" and facts.inbox > seen:
            return Start(f"{wait.display} has news")
    joined = {run for wait in facts.waits if wait.kind == "join" for run in wait.runs}
    unfinished = ask.unfinished(joined) if joined else ()
    for wait in facts.waits:
        if wait.kind == "join" and not set(wait.runs) & set(unfinished):
            return Start(f"{wait.display}: its child runs have ended")
    if not facts.waits:  # it paused in a way that we do not know: only a leg can tell what it waits for
        return Start("it is paused, and waits for nothing")
    named = ", ".join(wait.display for wait in facts.waits[:3])
    if deadlines := [wait.deadline for wait in facts.waits if wait.deadline is not None]:
        return Later(min(deadlines), f"it waits for {named}")
    return Leave(f"it waits for {named}")
