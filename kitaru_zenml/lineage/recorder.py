"""The recorder: a thread that tells ZenML of every finished step, behind the run, and never makes a step wait.

It is fed with record keys, not values, and reads the records from the journal. Steps go first: talking to ZenML costs some 30 ms of
processor time a step, which a flow in the same process would wait for, so it waits for a pause (a model call, say), and takes a tenth of
the time at most while there is none. It keeps the records' order, takes what has queued up as one batch, and retries for as long as ZenML
does not answer; what it has not told when the process dies, `reconcile` finds on resume. A record that ZenML refuses while it answers
others is given up and reported, so that it does not hold up the rest.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from sqlalchemy.exc import InterfaceError, OperationalError
from zenml.client import Client
from zenml.enums import ExecutionStatus

from kitaru_zenml.errors import StoreUnavailable
from kitaru_zenml.journal.records import Reused
from kitaru_zenml.journal.store import Store
from kitaru_zenml.lineage.registration import Registration
from kitaru_zenml.lineage.translate import Run

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

logger = logging.getLogger("kitaru_zenml.lineage")

BATCH = 50
PAUSE = 0.05  # seconds without a call of the engine that count as a pause of the flow
LAG = 2.0  # seconds after which a few steps are registered although there was no pause
HASTE = 10  # as many steps
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between tries while ZenML does not answer
STRIKES = 5  # tries of a record that ZenML answers with an error that may pass

_CLOSED_TO_STEPS = {ExecutionStatus.FAILED, ExecutionStatus.STOPPING, ExecutionStatus.STOPPED}
_HOPELESS = (ValueError, TypeError, KeyError, AttributeError, AssertionError)

T = TypeVar("T")


@dataclass(frozen=True)
class Drained:
    """How far lineage is. `pending` steps are in the journal and not yet in ZenML; `error` says why, or which were given up."""

    registered: int
    pending: int
    error: str | None = None


class Recorder:
    """Registers the steps of one run in ZenML from a thread of its own.

    Args:
        run: The ZenML pipeline run.
        store: The run's store, which holds its journal.
        artifact_store_id: Of the ZenML artifact store that the journal lives in.
        artifact_store_root: Its URI.
        flow: Name of the flow.
        reused: Of a fork: the records that another run holds, by key. May change while the run goes on.
        on_error: Told in one sentence when lineage begins to lag, and of each step that is given up; called on this thread.
    """

    def __init__(
        self,
        *,
        run: PipelineRunResponse,
        store: Store,
        artifact_store_id: UUID,
        artifact_store_root: str,
        flow: str,
        reused: Mapping[str, Reused] | None = None,
        on_error: Callable[[str], None] | None = None,
    ) -> None:
        self._run_id, self._on_error = run.id, on_error
        self._shape = Run(run.id, run.project_id, flow, artifact_store_id, artifact_store_root)
        self._store, self._reused = store, reused if reused is not None else {}
        self._changed = threading.Condition()
        self._queue: deque[str | _Survey] = deque()
        self._working = 0  # taken from the queue and not done
        self._registered = 0
        self._given_up: list[str] = []
        self._given_up_count = 0
        self._trouble: str | None = None  # why lineage lags now
        self._refused = False
        self._tries = 0
        self._nudged = False
        self._closing = False
        self._awaited = 0  # calls that wait for us: no more waiting for pauses
        self._forced_at = 0.0
        self._activity: Callable[[], int] = lambda: 0
        self._thread: threading.Thread | None = None

    # --- what the run calls ---

    def start(self) -> None:
        """Start the thread; a second call does nothing."""
        with self._changed:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._main, name="kitaru-recorder", daemon=True)
                self._thread.start()

    def watch(self, activity: Callable[[], int]) -> None:
        """Keep out of the flow's way; `activity` is a number that changes with every call of the engine."""
        self._activity = activity

    def add(self, key: str) -> None:
        """Register a stored record, some time. Returns at once."""
        with self._changed:
            self._queue.append(key)
            if len(self._queue) == 1:
                self._changed.notify_all()

    def reconcile_later(self, keys: Sequence[str]) -> None:
        """On resume: register those records of the journal that are not in ZenML, in order of delivery. Returns at once.

        What is added afterwards waits for it, so that edges to earlier steps are found.

        Args:
            keys: Of all records in the journal.
        """
        with self._changed:
            self._queue.append(_Survey(tuple(keys)))
            self._changed.notify_all()

    def reconcile(self, keys: Sequence[str], timeout: float | None = None) -> Drained:
        """`reconcile_later`, and wait until it is done; see `drain`."""
        self.reconcile_later(keys)
        return self.drain(timeout)

    def register_now(self, keys: Sequence[str], timeout: float | None = None) -> Drained:
        """Register stored records and wait until ZenML has them; see `drain`."""
        with self._changed:
            self._queue.extend(keys)
            self._changed.notify_all()
        return self.drain(timeout)

    def drain(self, timeout: float | None) -> Drained:
        """Wait until all that was added is in ZenML.

        Returns early when ZenML refuses steps because of the run's status. While it does not answer, a call makes the recorder
        try at once, and waits on.

        Args:
            timeout: Seconds to wait at most; `None` for as long as it takes.
        """
        self.start()
        with self._changed:
            tries = self._tries
            self._nudged = True
            self._awaited += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_idle() or (self._refused and self._tries > tries), timeout)
            self._awaited -= 1
            return self._drained()

    def close(self) -> None:
        """Stop the thread after the request it is at. What is pending stays so, until a resume reconciles it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=10)  # a request may hang; cut short, it is found on resume

    def _is_idle(self) -> bool:
        return (not self._queue and not self._working) or self._closing

    def _drained(self) -> Drained:
        pending = self._working + sum(len(item.keys) if isinstance(item, _Survey) else 1 for item in self._queue)
        error = self._trouble
        if error is None and self._given_up:
            error = f"{self._given_up_count} given up, the last: {self._given_up[-1]}"
        return Drained(self._registered, pending, error)

    # --- the thread ---

    def _main(self) -> None:
        registration: Registration | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                in_a_pause = self._await_pause()
                if self._closing:
                    return
                taken = self._take(BATCH if in_a_pause else HASTE)
            began = time.monotonic()
            try:
                if registration is None:
                    registration = self._patiently(
                        lambda: Registration(self._shape, self._store, Client().zen_store, self._reused)
                    )
                if isinstance(taken, _Survey):
                    self._survey(registration, taken)
                else:
                    self._register(registration, taken)
            except _Closing:
                return
            except Exception as error:  # a defect of ours: the run must not suffer from it, and later records may do
                logger.exception("The lineage recorder failed; the journal is not affected.")
                self._give_up("a batch of steps", error)
                self._done(self._working)
            self._forced_at = time.monotonic() + max(LAG, 9 * (time.monotonic() - began))

    def _await_pause(self) -> bool:
        """Wait until the flow pauses, somebody waits for lineage, or it has lagged for long; whether there was a pause."""
        seen = self._activity()
        self._forced_at = max(self._forced_at, time.monotonic() + LAG)
        while not (self._closing or self._awaited):
            self._changed.wait(PAUSE)
            if (now := self._activity()) == seen:
                break
            if time.monotonic() > self._forced_at:
                return False
            seen = now
        return True

    def _take(self, most: int) -> _Survey | list[str]:
        first = self._queue.popleft()
        if isinstance(first, _Survey):
            self._working = len(first.keys)
            return first
        keys = [first]
        while self._queue and len(keys) < most and isinstance(following := self._queue[0], str):
            keys.append(following)
            self._queue.popleft()
        self._working = len(keys)
        return keys

    def _survey(self, registration: Registration, survey: _Survey) -> None:
        missing, partly = self._patiently(lambda: registration.survey(survey.keys))
        self._done(len(survey.keys) - len(missing))
        for at in range(0, len(missing), BATCH):
            self._register(registration, missing[at : at + BATCH], after_crash=True, partly=partly)

    def _register(
        self, registration: Registration, keys: Sequence[str], *, after_crash: bool = False, partly: Collection[str] = ()
    ) -> None:
        fresh = [key for key in dict.fromkeys(keys) if key not in registration.places]
        work, lost = self._patiently(lambda: registration.load(fresh))
        for key, error in lost:
            self._give_up(f"`{key}`", error)
        self._done(len(keys) - len(work))
        for pending in work:
            pending.artifact_in_doubt = pending.artifact_in_doubt or after_crash
            pending.step_in_doubt = pending.key in partly
        at_once, strikes = len(work), 0
        while work:
            before = len(work)
            try:
                registration.register(work, at_once)
            except Exception as error:
                self._done(before - len(work), registered=True)
                strikes = strikes + 1 if len(work) == before else 1
                if self._can_pass(error):
                    self._lag(error, strikes)
                elif min(at_once, before) > 1 and len(work) == before:
                    at_once, strikes = 1, 0  # which of them is it?
                elif isinstance(error, _HOPELESS) or strikes >= STRIKES:
                    self._give_up(f"`{work.pop(0).record.display}`", error)
                    self._done(1)
                    strikes = 0
                else:
                    self._lag(error, strikes)
            else:
                self._done(before - len(work), registered=True)
                strikes = 0
                self._on_track()

    def _patiently(self, action: Callable[[], T]) -> T:
        strikes = 0
        while True:
            try:
                result = action()
            except Exception as error:
                strikes += 1
                if not self._can_pass(error) and strikes >= STRIKES:
                    raise
                self._lag(error, strikes)
            else:
                self._on_track()
                return result

    def _can_pass(self, error: Exception) -> bool:
        """Whether the error is about ZenML, a store or the run's status, rather than about one record."""
        self._refused = False
        if isinstance(error, StoreUnavailable | OSError | OperationalError | InterfaceError):
            return True
        try:
            run = Client().zen_store.get_run(self._run_id, hydrate=False)
        except KeyError:
            return False  # the run was deleted
        except Exception:
            return True
        self._refused = run.status in _CLOSED_TO_STEPS
        return self._refused

    def _lag(self, error: Exception, strikes: int) -> None:
        reason = f"{type(error).__name__}: {error}"
        is_news = self._trouble is None
        if is_news:
            self._tell(f"Lineage lags behind, and the run goes on: {reason}")
        with self._changed:
            self._trouble = reason
            self._tries += 1
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._nudged or self._closing, timeout=min(FIRST_DELAY * 2 ** min(strikes - 1, 10), LONGEST_DELAY)
            )
            self._nudged = False
            if self._closing:
                raise _Closing

    def _on_track(self) -> None:
        with self._changed:
            if self._trouble is not None:
                logger.info("Lineage catches up with the run again.")
            self._trouble, self._refused = None, False
            if self._closing:
                raise _Closing

    def _give_up(self, what: str, error: Exception) -> None:
        message = f"{what} is not shown in ZenML: {type(error).__name__}: {error}"
        with self._changed:
            self._given_up.append(message[:2000])
            del self._given_up[:-20]
            self._given_up_count += 1
        self._tell(message)

    def _tell(self, message: str) -> None:
        logger.warning("%s", message)
        if self._on_error is not None:
            try:
                self._on_error(message)
            except Exception:
                logger.exception("The `on_error` callback of the lineage recorder failed.")

    def _done(self, count: int, *, registered: bool = False) -> None:
        with self._changed:
            self._working -= count
            if registered:
                self._registered += count
            self._changed.notify_all()


@dataclass(frozen=True)
class _Survey:
    """Asks for a reconciliation with all keys of the journal."""

    keys: tuple[str, ...]


class _Closing(Exception):
    """Ends the thread's work."""
