"""A run in this process: holds the lease, beats, drives the flow's body through the engine, and ends the leg.

The order at the end of a leg is the order in which a crash is safe: the flow's own record, the event that closes the leg, lineage
drained, the lease checked, the run's terminal status in ZenML, the lease released. Resume starts again wherever that stopped.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kitaru_zenml import codec
from kitaru_zenml.children import Children, cancel_children
from kitaru_zenml.drivers import drive
from kitaru_zenml.engine import Engine
from kitaru_zenml.errors import (
    CorruptRecord,
    EventLoopRunning,
    KitaruError,
    LeaseLost,
    LegInterrupted,
    RunCancelled,
    RunHalted,
    RunSuspended,
    StoreUnavailable,
)
from kitaru_zenml.events import TAKEN
from kitaru_zenml.futures import StepFuture
from kitaru_zenml.identity import HERE, Branch, Here, install_task_factory
from kitaru_zenml.inputs import resolve_inputs
from kitaru_zenml.journal.due import Hint, leave_hint
from kitaru_zenml.journal.inbox import Inbox
from kitaru_zenml.journal.journal import AnyEvent, Journal, Snapshot, new_nonce
from kitaru_zenml.journal.lease import HeldLease
from kitaru_zenml.journal.records import (
    CancelRequest,
    LegClosedEvent,
    OpenWait,
    RefusedAnswer,
    StepRecord,
    chain_root,
    display_name,
)
from kitaru_zenml.options import FlowOptions, OnDrift

if TYPE_CHECKING:
    from kitaru_zenml.lineage.recorder import Recorder
    from kitaru_zenml.progress import Hook

logger = logging.getLogger("kitaru_zenml")

WATCH_OPEN = 0.25  # seconds between two looks at the inbox while a call waits

_live: set[Execution] = set()  # what of flows runs in this process, to refuse calls that lost their run


def any_live() -> bool:
    """Whether a flow is running in this process."""
    return bool(_live)


def live() -> list[Execution]:
    """What of flows runs in this process."""
    return list(_live)


@dataclass(frozen=True)
class Ended:
    """How a leg ended."""

    value: Any = None
    error: BaseException | None = None

    @property
    def status(self) -> Literal["completed", "failed", "paused", "stopped"]:
        """How the run stands after this leg."""
        if self.error is None:
            return "completed"
        if isinstance(self.error, RunSuspended):
            return "paused"
        is_stop = isinstance(self.error, RunCancelled | LegInterrupted) or not isinstance(self.error, Exception)
        return "stopped" if is_stop else "failed"

    @property
    def cancelled(self) -> bool:
        """Whether the run was cancelled, which is its end; a leg that Ctrl-C stopped may be resumed."""
        return isinstance(self.error, RunCancelled)

    @property
    def superseded(self) -> bool:
        """Whether another process has the run now, so that this one must not touch it."""
        return isinstance(self.error, LeaseLost)

    @property
    def interrupted(self) -> bool:
        """Whether the process had to let the run go, which is to be continued elsewhere."""
        return isinstance(self.error, LegInterrupted)


@dataclass(frozen=True)
class LegSummary:
    """What a leg did.

    Attributes:
        replayed: Finished steps that were answered from the journal.
        ran: Steps that ran.
        vanished: Finished steps that the code did not ask for, by name, if the leg came to the flow's end.
        code_changed: Whether the flow's source file is another than when the run began.
    """

    replayed: int = 0
    ran: int = 0
    vanished: tuple[str, ...] = ()
    code_changed: bool = False


class Board(Protocol):
    """Where others see what a leg waits for (ZenML's wait conditions). Must not block."""

    def opened(self, wait: OpenWait) -> None:
        """A call begins to wait."""

    def closed(self, wait: OpenWait) -> None:
        """It waits no more: the answer is there, or the time has run out."""

    def refused(self, refusal: RefusedAnswer) -> None:
        """An answer did not fit: ask again."""


class Execution:
    """One leg of a run. Made by `flow`, used by whatever makes durable calls."""

    def __init__(
        self,
        *,
        journal: Journal,
        lease: HeldLease,
        snapshot: Snapshot,
        options: FlowOptions,
        on_drift: OnDrift,
        recorder: Recorder | None,
        materializers: codec.Materializers | None,
        on_progress: Hook | None = None,
        board: Board | None = None,
        on_cancel: Callable[..., Any] | None = None,
    ) -> None:
        self.run_id, self.journal, self.store, self.lease = journal.run_id, journal, journal.store, lease
        self.options, self.recorder, self.materializers, self.on_progress = options, recorder, materializers, on_progress
        self.inbox, self.board, self._on_cancel = Inbox(journal), board, on_cancel
        self.inbox.forget(str(r.metadata[TAKEN]) for r in snapshot.records.values() if TAKEN in r.metadata)
        self.children = Children(options.max_children, snapshot.records.values())
        self._events_lock, self._close_lock, self._is_closed = threading.Lock(), threading.Lock(), False
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._pools_lock = threading.Lock()
        self._futures: set[StepFuture[Any]] = set()  # that may still fail unobserved
        self.hint: Hint | None = None  # for the worker, until the leg ends in order
        self._stopped, self._cancel_seen = threading.Event(), False
        self._closed_covers = {key for e in snapshot.events if isinstance(e, LegClosedEvent) for key in e.covers}
        self._earlier = {key: sha for key, sha in snapshot.hashes.items() if key not in self._closed_covers}
        last = snapshot.last_close
        self._previous_root = last.root if last else snapshot.first_root
        self._root_record = snapshot.current().get("/")
        self.engine = Engine(self, snapshot, on_drift)

    # --- what the engine asks of it ---

    def append_event(self, event: AnyEvent) -> None:
        """Append to the run's events."""
        with self._events_lock:
            self.journal.append(event)

    def register(self, key: str) -> None:
        """Let lineage know of a record, some time."""
        if self.recorder is not None:
            self.recorder.add(key)

    def register_now(self, *keys: str) -> None:
        """Let lineage know of records before going on."""
        if self.recorder is not None:
            self.recorder.register_now(keys)

    def wait_opened(self, wait: OpenWait) -> None:
        """A call begins to wait."""
        if self.board is not None:
            self.board.opened(wait)

    def wait_closed(self, wait: OpenWait) -> None:
        """What a call waited for has arrived, or its time has run out."""
        if self.board is not None:
            self.board.closed(wait)

    def answer_refused(self, refusal: RefusedAnswer) -> None:
        """An answer did not fit, so that its wait is still open."""
        logger.warning("run %s: an answer does not fit its wait, which stays open: %s", self.run_id, refusal.reason)
        if self.board is not None:
            self.board.refused(refusal)

    def input_trees(self, record: StepRecord) -> dict[str, Any]:
        """The whole inputs of a record, for a person."""
        return input_trees(self.journal, record)

    def summary(self, ended: Ended, code_changed: bool) -> LegSummary:
        """What this leg did."""
        engine = self.engine
        vanished = () if ended.error is not None or self._root_record is not None else engine.unclaimed()
        names = tuple(display_name(k.scope.name, k.scope.ordinal, k.scope.key) for k in vanished)
        flow_itself = int(ended.error is None and self._root_record is None)
        return LegSummary(engine.replayed, engine.ran - flow_itself, names, code_changed)

    # --- running the flow ---

    def run(self, function: Callable[..., Any], parameters: dict[str, Any], name: str, returns: Any) -> Ended:
        """Run the flow's body to its end, or take its recorded result, and close the leg.

        Args:
            function: The flow's own function, sync or async.
            parameters: Its arguments by name.
            name: Of the flow.
            returns: Its declared return type.
        """
        if inspect.iscoroutinefunction(function) and asyncio._get_running_loop() is not None:
            raise EventLoopRunning(name, "run")
        try:
            self.inbox.refresh()
        except KitaruError as error:
            return self._end(Ended(error=error))
        beats = threading.Thread(target=self._keep_lease, name=f"kitaru-lease-{self.run_id[:8]}", daemon=True)
        beats.start()
        _live.add(self)
        try:
            if self._root_record is not None:
                return self._end(self._recorded_result(self._root_record))
            ended = self._body(function, parameters, name, returns)
            if isinstance(ended.error, RunCancelled):
                ended = self._cancelled(ended, parameters)
            return self._end(ended)
        finally:
            _live.discard(self)
            self.children.release()
            self._stopped.set()
            beats.join()

    def _body(self, function: Callable[..., Any], parameters: dict[str, Any], name: str, returns: Any) -> Ended:
        if self.inbox.cancel is not None:
            return Ended(error=self._cancel(self.inbox.cancel))
        root = Branch()
        here = Here(self, root)
        self.engine.branch_started(root)
        try:
            value = (
                self._run_async(function, parameters, here)
                if inspect.iscoroutinefunction(function)
                else self._run_sync(function, parameters, here)
            )
            steps = self.engine.finish(name, parameters, returns, value)
            return Ended(drive(steps, self.store, name, lambda: None))
        except RunHalted as halted:
            return Ended(error=halted.error)
        except BaseException as error:
            self.engine.end_waits()
            if self.engine.halted is not None:  # what somebody made of it on its way up does not matter
                return Ended(error=self.engine.halted)
            return Ended(error=error)
        finally:
            self.engine.branch_ended(root)
            self._close_pools()

    def _cancel(self, request: CancelRequest) -> KitaruError:
        return self.engine.halt(RunCancelled(self.run_id, request.reason, request.by)).error

    def _cancelled(self, ended: Ended, parameters: dict[str, Any]) -> Ended:
        """Let the children follow, and run the flow's `on_cancel` as a step. Its failure does not keep the run from ending as cancelled."""
        if self.inbox.cancel is not None and not self.inbox.cancel.keep_children:
            cancel_children(self.children.started, self.inbox.cancel)
        if self._on_cancel is None:
            return ended
        reason = ended.error.reason if isinstance(ended.error, RunCancelled) else ""
        offered = {**parameters, "reason": reason}
        wanted = inspect.signature(self._on_cancel).parameters
        given = {name: value for name, value in offered.items() if name in wanted}
        self.engine.go_on()
        token = HERE.set(Here(self, Branch()))
        try:
            result = self._on_cancel(**given)
            if inspect.isawaitable(result):
                asyncio.run(_awaiting(result))
        except RunHalted as halted:
            return Ended(error=halted.error)
        except Exception as error:
            logger.error("run %s: its on_cancel hook failed: %s", self.run_id, error)
        finally:
            HERE.reset(token)
            self._close_pools()
        return ended

    def _run_sync(self, function: Callable[..., Any], parameters: dict[str, Any], here: Here) -> Any:
        token = HERE.set(here)
        try:
            value = function(**parameters)
            self._settle()
            return value
        finally:
            HERE.reset(token)

    def _run_async(self, function: Callable[..., Any], parameters: dict[str, Any], here: Here) -> Any:
        async def main() -> Any:
            install_task_factory(asyncio.get_running_loop())
            HERE.set(replace(here, is_async=True))
            value = await function(**parameters)
            while pending := [f for f in list(self._futures) if not f.done()]:
                await asyncio.wait([asyncio.wrap_future(f) for f in pending])
            self._settle()
            return value

        with asyncio.Runner() as runner:
            return runner.run(main())

    def _settle(self) -> None:
        """Wait for submitted steps that nobody waited for; their failure is the flow's, as in ZenML."""
        for future in list(self._futures):
            if (error := future.unobserved_failure()) is not None:
                raise error
        if self.engine.halted is not None:
            raise RunHalted(self.engine.halted)

    def _recorded_result(self, record: StepRecord) -> Ended:
        assert record.outcome is not None
        try:
            value = codec.decode_value(
                record.outcome, blob=self.journal.blob, materializers=self.materializers, allow_pickle=self.options.allow_pickle
            )
        except KitaruError as error:
            return Ended(error=error)
        return Ended(value)

    def interrupt(self) -> None:
        """Stop the leg at its next boundary, so that the run is continued elsewhere."""
        self.engine.halt(LegInterrupted(self.run_id))

    def abandon(self) -> None:
        """Close the leg and let the run go while bodies still execute. The process must end right after it.

        Raises:
            KitaruError: If the run is not this process's any more, or the store does not answer.
        """
        self.interrupt()
        self.engine.await_stored(0.5)
        self.lease.check()
        self._close(Ended(error=LegInterrupted(self.run_id)))
        self.lease.release()
        leave_hint(self.store, self.run_id, datetime.now(UTC))

    def _end(self, ended: Ended) -> Ended:
        """Close the leg in the journal, unless the run is somebody else's now."""
        try:
            self.lease.check()
            self._close(ended)
        except KitaruError as error:
            return Ended(error=error if isinstance(error, LeaseLost) or ended.error is None else ended.error)
        return ended

    def _close(self, ended: Ended) -> None:
        with self._close_lock:
            if not self._is_closed:
                self._append_close(ended)
                self._is_closed = True

    def _append_close(self, ended: Ended) -> None:
        covers = {k: sha for k, sha in {**self._earlier, **self.engine.covers}.items() if k not in self._closed_covers}
        error = ended.error
        failed = () if error is None else tuple(codec.paths_on_chain(error))
        suspended_on = tuple(w.key for w in self.engine.open_waits) if ended.status == "paused" else ()
        self.append_event(
            LegClosedEvent(
                nonce=new_nonce(), run_id=self.run_id, epoch=self.lease.epoch, at=datetime.now(UTC), status=ended.status,
                failure=codec.encode_failure(error) if error is not None and ended.status != "paused" else None,
                failed_paths=failed,
                in_flight=self.engine.in_flight(), suspended_on=suspended_on, inbox=self.engine.inbox_seen,
                covers=covers, previous_root=self._previous_root, root=chain_root(self._previous_root, covers),
            )
        )  # fmt: skip
        self._previous_root = chain_root(self._previous_root, covers)

    @property
    def root_hash(self) -> str:
        """The root over all that closed legs cover; ZenML's run metadata holds it too."""
        return self._previous_root

    def _keep_lease(self) -> None:
        """Beat while the leg lives, and find out when somebody has taken the run over."""
        lapse = self.lease.lease.lapse_seconds
        self.hint = leave_hint(self.store, self.run_id, datetime.now(UTC) + timedelta(seconds=lapse))  # should this process die
        beat_every, next_beat = lapse / 3, 0.0
        while True:
            try:
                self.lease.check()
                if time.monotonic() >= next_beat:
                    self.lease.beat(self.engine.in_flight())
                    next_beat = time.monotonic() + beat_every
                if self.inbox.refresh():
                    self.engine.look()
                if self.inbox.cancel is not None and not self._cancel_seen:
                    self._cancel_seen = True
                    self._cancel(self.inbox.cancel)
            except LeaseLost as lost:
                self.engine.halt(lost)
                return
            except CorruptRecord as problem:
                self.engine.halt(problem)
            except StoreUnavailable as problem:
                logger.warning("run %s: the lease could not be kept: %s", self.run_id, problem)
            if self._stopped.wait(min(self.lease.watch_seconds, WATCH_OPEN if self.engine.open_waits else math.inf)):
                return

    # --- submitted calls ---

    def submit(self, work: Callable[[StepFuture[Any]], None], here: Here) -> StepFuture[Any]:
        """Run a call in a thread, as a branch of its own; `work` hands its result to the future.

        The threads of a scope are its own, so that a step that submits and waits never starves the steps it waits for.
        """
        future: StepFuture[Any] = StepFuture()
        branch = here.branch.child()
        inside = Here(self, branch, here.scopes, here.step)
        self.engine.branch_started(branch)

        def run() -> None:
            token = HERE.set(inside)
            try:
                work(future)
            except BaseException as error:
                if not future.done():
                    future.set_exception(error)
            finally:
                HERE.reset(token)
                self.engine.branch_ended(branch)

        try:
            self._pool(here.path).submit(contextvars.copy_context().run, run)
        except RuntimeError:  # the run is ending
            self.engine.branch_ended(branch)
            raise
        self.track(future)
        return future

    def track(self, future: StepFuture[Any]) -> None:
        """The flow's end waits for this call."""
        self._futures.add(future)
        future.add_done_callback(self._untrack)

    def _untrack(self, future: Any) -> None:
        if future.cancelled() or future.unobserved_failure() is None:
            self._futures.discard(future)

    def _pool(self, scope: str) -> ThreadPoolExecutor:
        with self._pools_lock:
            pool = self._pools.get(scope)
            if pool is None:
                pool = self._pools[scope] = ThreadPoolExecutor(self.options.max_workers, thread_name_prefix="kitaru-step")
            return pool

    def close_pool(self, scope: str) -> None:
        """A step's body ended: let go of the threads it submitted to."""
        with self._pools_lock:
            pool = self._pools.pop(scope, None)
        if pool is not None:
            pool.shutdown(wait=False)

    def _close_pools(self) -> None:
        with self._pools_lock:
            pools = list(self._pools.values())
            self._pools.clear()
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


async def _awaiting(awaitable: Any) -> Any:
    return await awaitable


def input_trees(journal: Journal, record: StepRecord) -> dict[str, Any]:
    """The whole input trees of a record, references followed."""
    journal = journal.of(record)
    fetched: dict[str, StepRecord] = {}

    def fetch(key: str) -> StepRecord:
        if key not in fetched:
            fetched[key] = journal.record(key)
        return fetched[key]

    def outcome(key: str) -> Any:
        value = fetch(key).outcome
        return None if value is None else codec.value_tree(value, journal.blob)

    return resolve_inputs(record.inputs, lambda key: fetch(key).inputs, outcome)
