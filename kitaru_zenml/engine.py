"""Replay or run: the one decision about a durable call, without I/O of its own (DESIGN §5).

`Engine.call` is a generator: it yields what must be done (wait, write, run the body) and gets the result sent back, so that a thin
sync and a thin async driver (`drivers`) share one implementation. A call is resolved to a path (§4):

1. The record, or open scope, at its own path answers it.
2. Else, if a step of that scope and name is still unclaimed that has equal inputs, or stands at the same turn with other inputs, the
   other live branches get their turn first. Then equal inputs: it takes that one. Other inputs: `InputsDrifted`.
3. Else it is new, and runs.

In a fork, what it reuses of another run answers calls by the same rule, but is never held against one: other inputs than a reused
record's simply mean a new call. Only a step that a person overrode answers the call at its turn whatever the inputs.

Outcomes get the next number before they are stored and reach the code in that order, live and on replay, one at a time. All state is
behind one lock of this run; nothing is shared between runs.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from kitaru_zenml import codec
from kitaru_zenml.delivery import Delivery, Rank
from kitaru_zenml.effects import Caller, Create, Perform, RunBody, Sleep, Steps, Wait, Waiter
from kitaru_zenml.errors import (
    InputsDrifted,
    KitaruError,
    LeaseLost,
    NotDurableError,
    RunCancelled,
    RunHalted,
    RunSuspended,
    StepInDoubt,
    WaitRefused,
)
from kitaru_zenml.identity import Branch, Claims, Counts, CurrentStep, Here, Known, call_prefix
from kitaru_zenml.inputs import REFERENCE_FROM, Inputs, References, canonical, digest_inputs, reference_digest
from kitaru_zenml.journal.journal import ASKED_FOR, Snapshot, new_nonce
from kitaru_zenml.journal.records import (
    Attempt,
    Failure,
    InFlight,
    JsonValue,
    OpenWait,
    Reopened,
    RetireEvent,
    Scope,
    StartedMarker,
    StepRecord,
    Value,
    artifact_folder,
    blob_name,
    display_path,
    record_key,
    seal,
    sealed_hash,
    started_name,
    step_name,
    unseal,
    wait_name,
)
from kitaru_zenml.limits import LOOK as SLOT_LOOK
from kitaru_zenml.limits import Slot, limits_of_process
from kitaru_zenml.options import OnDrift, StepOptions

if TYPE_CHECKING:
    from kitaru_zenml.execution import Execution
    from kitaru_zenml.suspension import Waiting

logger = logging.getLogger("kitaru_zenml")

SPLICE_FROM = 4096  # bytes
TICK = 0.02  # seconds without an engine call, while other branches live
TICKS_TO_TAKE_EQUAL = 2
TICKS_TO_DELIVER_OUT_OF_ORDER = 25
TICKS_TO_DRIFT = 100
LOOK = 0.1  # seconds between two looks of a waiting call
QUIET = 0.3  # seconds without an engine call after which nothing else is taken to move, and the run may suspend


@dataclass(frozen=True, slots=True)
class Call:
    """A durable call as asked."""

    name: str
    inputs: Inputs
    options: StepOptions
    key: str | None = None
    kind: str = "step"
    returns: Any = Any  # the declared return type
    waiting: Waiting | None = None  # instead of a body: what the call waits for
    after: tuple[str, ...] = ()  # keys of records that it follows, beside what its branch got last


class Engine:
    """The state of one leg of a run."""

    def __init__(self, execution: Execution, snapshot: Snapshot, on_drift: OnDrift) -> None:
        self.execution, self.on_drift = execution, on_drift
        self.run_id, self.epoch = execution.run_id, execution.lease.epoch
        self.lock = threading.RLock()
        self.halted: KitaruError | None = None
        self.claims = Claims()
        self.references = References()
        self.covers: dict[str, str] = {}  # key -> hash of each record this leg stored or adopted
        self.replayed = self.ran = 0
        self._scopes: dict[str, Counts] = {}
        self._live: set[Branch] = set()
        self._threads = {t.ident for t in threading.enumerate()}
        self._executing: dict[str, InFlight] = {}
        self._parked: dict[Waiter, str] = {}
        self._open: dict[Waiter, _Open] = {}
        self._suspended_on: list[OpenWait] = []
        self._ends = False
        self._looked: dict[Waiter, int] = {}  # size of the inbox before the last look of each that waits
        self.inbox_seen = 0  # what of the inbox the leg has looked at for all that it suspended on
        self._holds: dict[str, str] = {}  # path of an executing step -> limit whose slot it holds
        self._at_most_once: set[str] = set()  # of those that execute
        self._storing = 0
        self._activity = 0
        self.delivery = Delivery()
        self.reused = snapshot.reused  # shared with lineage: what is stored anew is reused no more
        self._given = {*snapshot.reused, *snapshot.overridden}  # keys of what the fork began with
        self._overridden = set(snapshot.overridden)
        self._given_inside: dict[str, list[_Given]] = {}  # by the path of each scope around, and by its own
        self._taken: set[str] = set()  # of them, by calls
        self._load(snapshot)

    # --- what the journal knows ---

    def _load(self, snapshot: Snapshot) -> None:
        current, opened = snapshot.current(), snapshot.generations
        current.pop("/", None)
        own: set[str] = set()  # paths that this run itself has come to
        for key, record in snapshot.records.items():
            around_and_it = {record.path, *(scope.path for scope in record.scopes)}
            if key not in self._given:
                self.references.learn(key, record.outcome_digest, record.known)
                own |= around_and_it
                continue
            for path in around_and_it:
                given = _Given(record.number, record.path, key, record.outcome_digest)
                self._given_inside.setdefault(path, []).append(given)
        begun: list[StartedMarker | OpenWait] = [*snapshot.markers.values(), *snapshot.waits.values()]
        for one in begun:
            own |= {one.scope.path, *(scope.path for scope in one.scopes)}
        self._taken = snapshot.asked_for() if self._given else set()
        self.covers |= {key: self.reused[key].sha256 for key in self._taken if key in self.reused}
        known: dict[str, Known] = {}
        inside: dict[str, tuple[Scope, ...]] = {}
        for record in snapshot.records.values():
            for depth, scope in enumerate(record.scopes):  # open, unless a record says more below
                known.setdefault(scope.path, Known(scope, generation=opened.get(scope.path, 0)))
                inside.setdefault(scope.path, record.scopes[:depth])
            if record.path in opened and record.path not in current and record.path not in snapshot.retired:
                known[record.path] = Known(record.scope, generation=opened[record.path])  # reopened
                inside[record.path] = record.scopes
        for key, marker in snapshot.markers.items():
            path, generation = marker.scope.path, opened.get(marker.scope.path, 0)
            if path in current or marker.generation > generation:
                continue
            if marker.generation == generation:
                known[path] = Known(marker.scope, key, marker=marker, generation=generation)
            elif known.get(path) is None or known[path].marker is None:
                known[path] = Known(marker.scope, generation=generation)  # a person said that it did not take effect
            inside[path] = marker.scopes
        for wait in snapshot.waits.values():
            path, generation = wait.scope.path, opened.get(wait.scope.path, 0)
            if path not in current and wait.generation == generation:
                known[path] = Known(wait.scope, generation=generation)
                inside[path] = wait.scopes
                for depth, scope in enumerate(wait.scopes):
                    known.setdefault(scope.path, Known(scope, generation=opened.get(scope.path, 0)))
                    inside.setdefault(scope.path, wait.scopes[:depth])
        for record in current.values():
            known[record.path] = Known(record.scope, record.object_key, record.number, record, generation=record.generation)
            inside[record.path] = record.scopes
        for path, entry in known.items():
            entry.reused = bool(self._given) and path not in own
            around = [current[scope.path] for scope in inside[path] if scope.path in current]
            if path == "/" or any(record.failure is None for record in around):
                continue  # what a finished step did inside is not asked again
            self._scope(inside[path]).note(entry.scope)
            if entry.record is None and path in snapshot.retired:
                continue
            self.claims.add(entry)
            entry.dormant = bool(around)
            if entry.record is not None and not entry.dormant:
                self.delivery.expect(entry.rank)
        self._next_number = 1 + max((r.number for r in snapshot.records.values()), default=-1)

    def _scope(self, scopes: tuple[Scope, ...]) -> Counts:
        path = scopes[-1].path if scopes else ""
        found = self._scopes.get(path)
        if found is None:
            found = self._scopes[path] = Counts()
        return found

    @property
    def activity(self) -> int:
        """Changes with every call."""
        return self._activity

    def unclaimed(self) -> list[Known]:
        """Finished steps that the code has not asked for. A fork reuses what is asked for, so the rest of that is no news."""
        with self.lock:
            return [
                known
                for known in self.claims
                if known.record is not None and not known.dormant and (not known.reused or known.key in self._overridden)
            ]

    def in_flight(self) -> tuple[InFlight, ...]:
        """The steps whose bodies are executing now, and the calls that wait."""
        with self.lock:
            waiting = (
                InFlight(path=o.path, display=o.wait.display, kind=o.wait.kind, started_at=o.wait.asked_at)
                for o in self._open.values()
            )
            return (*self._executing.values(), *waiting)

    @property
    def open_waits(self) -> list[OpenWait]:
        """What this leg waits for, or suspended on."""
        with self.lock:
            return list(self._suspended_on) or [o.wait for o in self._open.values()]

    def look(self) -> None:
        """Something has arrived: let the waiting calls look for it now."""
        with self.lock:
            for waiter in self._open:
                waiter.set()

    # --- branches ---

    def branch_started(self, branch: Branch) -> None:
        """A task or a submitted call begins to live."""
        with self.lock:
            self._live.add(branch)

    def branch_ended(self, branch: Branch) -> None:
        """It will make no more calls."""
        with self.lock:
            self._live.discard(branch)
            self._moved()

    def _alone(self, here: Here) -> bool:
        """Whether no other branch lives that could claim, or ask for, what this call waits for."""
        if self._live - set(here.branch.stack()):
            return False
        strangers = (t for t in threading.enumerate() if t.ident not in self._threads and not t.name.startswith("kitaru-"))
        return not any(t is not threading.current_thread() for t in strangers)

    def _busy(self, here: Here) -> bool:
        """Whether a step executes that can move: not one that only waits for a parked, held or waiting call inside it."""
        waiting = [*self._parked.values(), *self.delivery.waiting_in(), *(o.path for o in self._open.values()), here.path + "/"]
        return any(not any(path.startswith(step + "/") for path in waiting) for step in self._executing)

    def _moved(self) -> None:
        self._activity += 1
        for waiter in self._parked:
            waiter.set()

    def halt(self, error: KitaruError) -> RunHalted:
        """Stop every branch of the run at its next boundary; the first error stands."""
        with self.lock:
            self.halted = self.halted or error
            for waiter in (*self._parked, *self._open, *self.delivery.waiters()):
                waiter.set()
            return RunHalted(self.halted)

    def await_stored(self, seconds: float) -> None:
        """Let the records that are being written be written, for some seconds at most."""
        deadline = time.monotonic() + seconds
        while self._storing and time.monotonic() < deadline:
            time.sleep(0.01)

    def end_waits(self) -> None:
        """The flow's body has failed: nobody wants any more what its submitted branches wait for."""
        with self.lock:
            self._ends = True
        self.look()

    def go_on(self) -> None:
        """Take calls again after a cancellation, for the flow's `on_cancel` hook."""
        with self.lock:
            if isinstance(self.halted, RunCancelled):
                self.halted, self._ends = None, False

    def _check(self) -> None:
        if self.halted is not None:
            raise RunHalted(self.halted)

    # --- a call ---

    def call(self, call: Call, here: Here, caller: Caller) -> Steps:
        """Replay or run a call; returns its value or raises its recorded failure.

        Raises:
            RunHalted: If the run must stop: lease lost, inputs drifted, step in doubt, store unavailable.
        """
        try:
            yield from self._boundary()
            known, scope = yield from self._resolve(call, here, caller)
            record = known.record if known else None
            if record is None and known is not None and known.key is not None and known.marker is None:
                record = yield Perform(lambda: self.execution.journal.record(known.key or ""))
            if known is not None and known.marker is not None:
                raise self.halt(StepInDoubt(self.run_id, known.marker.display, known.marker.started_at))
            if record is not None:
                self.replayed += 1
                if record.object_key in self._given:
                    yield from self._take_given(record)
                if self.execution.on_progress:
                    self.execution.on_progress("replayed", display_path((*here.scopes, scope)))
                value, error = yield from self._decode(record)
                rank, key = (record.number, record.path), record.object_key
            else:
                generation = known.generation if known else 0
                run = self._execute if call.waiting is None else self._await
                rank, key, value, error = yield from run(call, here, caller, scope, generation)
            yield from self._my_turn(rank, here, caller, value, error)
            here.branch.last = key
        except KitaruError as problem:  # of the machinery, not of the step: that is a value here
            raise self.halt(problem) from problem.__cause__
        if error is not None:
            raise error
        return value

    def enter(self, call: Call, here: Here, caller: Caller) -> Steps:
        """Open a scope that has no outcome of its own; returns it.

        Raises:
            RunHalted: If the run must stop.
        """
        try:
            yield from self._boundary()
            _, scope = yield from self._resolve(call, here, caller)
        except KitaruError as problem:
            raise self.halt(problem) from problem.__cause__
        return scope

    def leave(self, scope: Scope, here: Here) -> None:
        """The scope is done. Inside a step its numbers are kept, because a retry of that step opens it again."""
        with self.lock:
            self._activity += 1
            if not here.scopes:
                self._forget_inside(scope.path)

    def count_here(self, what: Any, here: Here) -> int:
        """How often something was counted before within the scope; a retry of the body around it counts anew."""
        with self.lock:
            return self._scope(here.scopes).count(what)

    def finish(self, flow: str, parameters: dict[str, Any], returns: Any, value: Any) -> Steps:
        """Store the flow's own outcome, under the path "/"; returns it as a replay gives it.

        Raises:
            NotDurableError: If it cannot be stored.
        """
        yield from self._boundary()
        inputs = digest_inputs(parameters)
        call = Call(flow, inputs, StepOptions(), kind="flow", returns=returns)
        scope = Scope(path="/", name=flow, ordinal=0, digest=inputs.digest, turn=("", 0), kind="flow")
        outcome = _Outcome(encoded=(yield from self._encode(call, value, record_key(flow, "/", 0))))
        if self._taken:  # nobody asks for it again once the flow has its outcome
            outcome.step = CurrentStep(flow, "/", "", 1, self.run_id, {ASKED_FOR: sorted(self._taken)})
        here = Here(self.execution, Branch())
        rank, _, stored, _ = yield from self._store(call, here, scope, 0, outcome, [], "")
        with self.lock:
            self.delivery.forget(rank)
        return stored

    def _my_turn(self, rank: Rank, here: Here, caller: Caller, value: Any, error: BaseException | None) -> Steps:
        """Hand the result over after every result that came before it, or when nothing moves any more."""
        delivery = self.delivery
        with self.lock:
            self._check()
            if caller.holds_loop or delivery.is_next(rank):
                caller.hand_over(value, error)
                self._activity += 1
                delivery.forget(rank)
                delivery.release()
                return
            waiter = caller.waiter()
            delivery.hold(rank, waiter, here.path + "/")
        try:
            quiet = 0
            while delivery.delivering != rank:
                before = self._activity
                yield Wait(waiter, TICK)
                with self.lock:
                    self._check()
                    moves = self._activity != before or self._storing or self._busy(here)
                    quiet = 0 if moves else quiet + 1
                    if quiet >= (1 if self._alone(here) else TICKS_TO_DELIVER_OUT_OF_ORDER):
                        delivery.give_up_on_those_before(rank)
            caller.hand_over(value, error)
        finally:
            with self.lock:
                self._activity += 1
                delivery.done(rank)

    def _boundary(self) -> Steps:
        self._check()
        if self.execution.lease.lost is not None or self.execution.lease.is_stale:
            yield Perform(self.execution.lease.check)

    # --- which step is this ---

    def _resolve(self, call: Call, here: Here, caller: Caller) -> Steps:
        """The unclaimed entry this call takes, if any, and its scope."""
        with self.lock:
            mine = self._own_scope(call, here)
        path, quiet = mine.path, 0
        while True:
            with self.lock:
                self._check()
                own = self.claims.get(path)
                if own is not None and own.scope.digest == mine.digest:
                    return self._claim(own, here), own.scope
                equal = self.claims.equal(mine.group, mine.digest)
                suspicious = self.claims.at_turn(mine.group, mine.turn) if own is None else [own]
                if not equal and call.options.ignore:
                    equal = [k for k in self.claims.of(mine.group) if _equal_but_for(call.options.ignore, call, k)]
                    if equal and (own in equal or equal[0] in suspicious):
                        return self._claim(equal[0], here), equal[0].scope
                if self._given and not equal:
                    overridden = next((known for known in suspicious if known.key in self._overridden), None)
                    if overridden is not None:
                        return self._claim(overridden, here), overridden.scope
                    replaced = next((known for known in suspicious if known.reused), None)
                    suspicious = [known for known in suspicious if not known.reused]
                    if not suspicious:
                        return self._instead_of(replaced, mine, here)
                if not equal and not suspicious:
                    return None, self._new(mine, here)
                alone = self._alone(here)
                if caller.holds_loop:  # nobody else of this loop can move meanwhile
                    if equal:
                        return self._claim(equal[0], here), equal[0].scope
                    if not alone and own is None:
                        return None, self._new(mine, here)
                if equal and (alone or quiet >= TICKS_TO_TAKE_EQUAL):
                    return self._claim(equal[0], here), equal[0].scope
                if not equal and (alone or own is not None or (quiet >= TICKS_TO_DRIFT and not self._busy(here))):
                    break
                waiter = caller.waiter()
                self._parked[waiter] = path
                before = self._activity
            try:
                yield Wait(waiter, TICK)
            finally:
                with self.lock:
                    self._parked.pop(waiter, None)
            quiet = quiet + 1 if self._activity == before else 0
        return (yield from self._drifted(call, here, mine, suspicious[0]))

    def _own_scope(self, call: Call, here: Here) -> Scope:
        self._activity += 1
        counts, name, digest, branch = self._scope(here.scopes), call.name, call.inputs.digest, here.branch.name
        turn = (branch, counts.count((name, branch)))
        key = call.key
        if key is None:
            path = f"{call_prefix(here.path, name, digest)}#{branch}.{counts.count((name, digest, branch))}"
        else:
            repeated = counts.count((name, "key", key))
            key = f"{key}~{repeated}" if repeated else key
            path = f"{here.path}/{name}[{key}]"
        return Scope(path=path, name=name, ordinal=0, digest=digest, turn=turn, key=key, kind=call.kind)

    def _new(self, mine: Scope, here: Here, ordinal: int | None = None) -> Scope:
        counts = self._scope(here.scopes)
        if ordinal is None:
            ordinal = counts.lowest_free(("ordinal", mine.name)) if mine.key is None else 0
        equal = counts.lowest_free(("equal", mine.name, mine.key, mine.digest))
        self._moved()
        return mine.model_copy(update={"ordinal": ordinal, "equal": equal})

    def _instead_of(self, replaced: Known | None, mine: Scope, here: Here) -> tuple[Known | None, Scope]:
        """A new call of a fork, at the turn of what it would have reused with the same inputs: that gives it its number for people."""
        if replaced is None:
            if any(given.path == mine.path for given in self._given_inside.get(mine.path, ())):
                mine = mine.model_copy(
                    update={"path": f"{mine.path}'"}
                )  # an equal call of another branch has taken that record
            return None, self._new(mine, here)
        for given in self._given_inside.get(replaced.scope.path, ()):
            self.delivery.forget((given.number, given.path))  # most likely nobody asks for it now
        scope = self._new(mine, here, replaced.scope.ordinal)
        if scope.path != replaced.scope.path:
            return None, scope
        self.claims.remove(scope.path)  # a keyed step: it runs under the same path and key, and its record stands from then on
        return Known(scope, generation=replaced.generation), scope

    def _take_given(self, record: StepRecord) -> Steps:
        """A reused or overridden record answers a call: cover it and what happened inside, and let lineage know."""
        with self.lock:
            given = sorted(g for g in self._given_inside.get(record.path, ()) if g.key in self._given - self._taken)
            for one in given:
                self._taken.add(one.key)
                if one.key in self.reused:
                    self.covers[one.key] = self.reused[one.key].sha256
                # Where its inputs lie is not remembered: what they refer to is to be looked up in the run that holds them.
                self.references.learn(one.key, one.outcome_digest, {})
        if self.execution.options.lineage == "sync":
            yield Perform(lambda: self.execution.register_now(*(one.key for one in given)))
            return
        for one in given:
            self.execution.register(one.key)

    def _claim(self, known: Known, here: Here) -> Known:
        self.claims.remove(known.scope.path)
        if here.scopes:
            again = known.record is not None and _runs_again(known.record)
            self._scope(here.scopes).finished.append((replace(known, record=None), again))
        self._moved()
        return known

    def _drifted(self, call: Call, here: Here, mine: Scope, known: Known) -> Steps:
        """A finished step is asked again with other inputs: stop, reuse it, or retire it and run anew."""
        step = display_path((*here.scopes, known.scope))
        choice = call.options.on_drift or self.on_drift
        if choice == "raise":
            changes = yield from self._changes(call, known)
            raise self.halt(InputsDrifted(self.run_id, step, changes, recorded=(known.scope.path,)))
        if choice == "reuse":
            logger.warning("run %s: step %s has other inputs than recorded; its recorded outcome is reused", self.run_id, step)
            with self.lock:
                return self._claim(known, here), known.scope
        paths = [known.scope.path]
        logger.warning("run %s: step %s has other inputs than recorded; it runs anew", self.run_id, step)
        event = RetireEvent(
            nonce=new_nonce(), run_id=self.run_id, epoch=self.epoch, at=_now(), reason="inputs drifted",
            reopened=tuple(Reopened(path=p, generation=known.generation + 1) for p in paths),
        )  # fmt: skip
        yield Perform(self.execution.lease.check)
        yield Perform(lambda: self.execution.append_event(event))
        with self.lock:
            self.claims.remove(known.scope.path)
            self.delivery.forget(known.rank)
            scope = self._new(mine, here)
        if scope.path == known.scope.path:  # a keyed step runs under its own path, in the next generation
            return replace(known, record=None, key=None, marker=None, scope=scope, generation=known.generation + 1), scope
        return None, scope

    def _changes(self, call: Call, known: Known) -> Steps:
        """(argument, recorded value, new value) of what differs, shortened for a person."""
        record = known.record
        if record is None:
            return ()
        try:
            stored = yield Perform(lambda: self.execution.input_trees(record))
        except KitaruError:
            stored = {}
        names = [
            n for n in {**record.arguments, **call.inputs.arguments} if record.arguments.get(n) != call.inputs.arguments.get(n)
        ]
        return [(n, _short(stored.get(n, "nothing")), _short(call.inputs.trees.get(n, "nothing"))) for n in names]

    # --- run it ---

    def _execute(self, call: Call, here: Here, caller: Caller, scope: Scope, generation: int) -> Steps:
        """Run the body with its retries, number and store the outcome. Returns rank, key, value, error."""
        chain, options = (*here.scopes, scope), call.options
        display, key = display_path(chain), record_key(scope.name, scope.path, generation)
        idempotency_key = self._idempotency_key(chain)
        attempts: list[Attempt] = []
        with self.lock:
            if options.at_most_once:
                self._at_most_once.add(scope.path)
            began = self._next_number
            self._executing[scope.path] = InFlight(path=scope.path, display=display, kind=call.kind, started_at=_now())
        outcome, slot = _Outcome(began=began), None
        try:
            slot = yield from self._slot(call, here, scope)
            if options.at_most_once:  # not before there is a slot: a crash while it waits for one leaves no doubt
                yield from self._mark_started(here, scope, generation, display, key)
            if self.execution.on_progress:
                self.execution.on_progress("running", display)
            while True:
                started = _now()
                step = CurrentStep(
                    scope.name, scope.path, idempotency_key, len(attempts) + 1, self.run_id, dict(options.metadata)
                )
                body_here = Here(self.execution, Branch(enclosing=here.branch), chain, step)
                outcome = _Outcome(started, step, began=began)
                try:
                    outcome.value = yield RunBody(body_here, options.timeout)
                except Exception as error:
                    outcome.error, outcome.failure = error, codec.encode_failure(error)
                    if len(attempts) < options.retries and options.is_retried(error):
                        attempts.append(Attempt(started_at=started, ended_at=_now(), failure=outcome.failure))
                        if self.execution.on_progress:
                            self.execution.on_progress("retrying", display)
                        self._free(slot, scope)
                        yield Sleep(options.delay_before(len(attempts)))
                        slot = yield from self._slot(call, here, scope)
                        self._ask_again_inside(scope.path)
                        continue
                else:
                    try:
                        outcome.encoded = yield from self._encode(call, outcome.value, key)
                    except NotDurableError as error:
                        outcome.error, outcome.failure = error, codec.encode_failure(error)
                break
        finally:
            self._free(slot, scope)
            self.execution.close_pool(scope.path)
            with self.lock:
                self._executing.pop(scope.path, None)
                self._at_most_once.discard(scope.path)
                self._activity += 1
        if isinstance(self.halted, LeaseLost):
            raise RunHalted(self.halted)  # whatever else stops the run, a finished body's outcome is kept
        return (yield from self._store(call, here, scope, generation, outcome, attempts, idempotency_key))

    def _mark_started(self, here: Here, scope: Scope, generation: int, display: str, key: str) -> Steps:
        marker = StartedMarker(
            nonce=new_nonce(), run_id=self.run_id, epoch=self.epoch, scope=scope, scopes=here.scopes, generation=generation,
            started_at=_now(),
        )  # fmt: skip
        theirs = yield Create(started_name(self.run_id, key), seal(marker))
        yield Perform(self.execution.lease.check)
        if theirs is not None:
            other = unseal(StartedMarker, theirs, started_name(self.run_id, key))
            raise self.halt(StepInDoubt(self.run_id, display, other.started_at))

    def _slot(self, call: Call, here: Here, scope: Scope) -> Steps:
        """Wait for a slot of the step's limit; `None` if nothing limits it, or a step around it holds one."""
        limit, limits = call.options.limit, limits_of_process()
        if limit is None or not limits.binds(limit) or any(self._holds.get(s.path) == limit for s in here.scopes):
            return None
        while (slot := limits.try_slot(limit)) is None:  # never blocks, so no cancellation comes between it and its release
            yield Sleep(SLOT_LOOK * (1 + random.random()))
            self._check()
        self._holds[scope.path] = limit
        return slot

    def _free(self, slot: Slot | None, scope: Scope) -> None:
        if slot is not None:
            self._holds.pop(scope.path, None)
            slot.release()

    # --- wait for it ---

    def _await(self, call: Call, here: Here, caller: Caller, scope: Scope, generation: int) -> Steps:
        """Store what is waited for, look until it has arrived, and store that. Returns rank, key, value, error.

        Suspends the run when nothing in it moves but calls like this one, and each has had its grace.
        """
        waiting, execution = call.waiting, self.execution
        assert waiting is not None
        if not self._at_most_once.isdisjoint(s.path for s in here.scopes):
            raise self.halt(WaitRefused(self.run_id, display_path((*here.scopes, scope))))
        wait = OpenWait(
            nonce=new_nonce(), run_id=self.run_id, epoch=self.epoch, kind=waiting.kind, scope=scope, scopes=here.scopes,
            generation=generation, asked_at=_now(), **waiting.details(_now()),
        )  # fmt: skip
        with self.lock:
            began = self._next_number
        arrival = waiting.arrived(wait, execution) if waiting.kind == "event" else None  # of many, most are there already
        if arrival is None:
            wait, arrival = yield from self._wait_for(waiting, wait, caller)
        step = CurrentStep(scope.name, scope.path, "", 1, self.run_id, dict(arrival.metadata))
        outcome = _Outcome(wait.asked_at, step, arrival.value, error=arrival.error, began=began)
        try:
            if arrival.error is not None:
                outcome.failure = codec.encode_failure(arrival.error)
            else:
                outcome.encoded = yield from self._encode(call, arrival.value, wait.key)
            return (yield from self._store(call, here, scope, generation, outcome, [], ""))
        except BaseException:
            waiting.give_back(arrival, execution)
            raise

    def _wait_for(self, waiting: Waiting, wait: OpenWait, caller: Caller) -> Steps:
        """Look until it has arrived. Returns the stored wait, which an earlier leg may have stored, and the arrival."""
        execution, waiter, name = self.execution, caller.waiter(), wait_name(self.run_id, wait.key)
        theirs = yield Create(name, seal(wait))
        wait = wait if theirs is None else unseal(OpenWait, theirs, name)
        with self.lock:
            self._open[waiter] = _Open(wait.scope.path, wait, waiting, time.monotonic())
        if execution.on_progress:
            execution.on_progress("waiting", wait.display)
        execution.wait_opened(wait)
        looked_at, seen, quiet_since = -math.inf, -1, time.monotonic()
        try:
            while True:
                if (now := time.monotonic()) - looked_at >= waiting.every:
                    arrival, looked_at = (yield from self._look(waiting, wait, waiter)), now
                if arrival is not None:
                    break
                if self._activity != seen:
                    seen, quiet_since = self._activity, now
                if now - quiet_since >= QUIET and self._may_suspend():
                    yield Perform(execution.inbox.refresh)  # what came since the last look must not wait for somebody to notice
                    if (arrival := (yield from self._look(waiting, wait, waiter))) is not None:
                        break
                    with self.lock:
                        self._check()
                        if self._activity == seen and self._may_suspend():
                            self._suspended_on = [o.wait for o in self._open.values()]
                            self.inbox_seen = min(self._looked.get(w, 0) for w in self._open)
                            raise self.halt(RunSuspended(self.run_id, [(w.kind, w.display) for w in self._suspended_on]))
                yield Wait(waiter, _until(wait.deadline, LOOK))
                self._check()
                if self._ends:
                    raise RunHalted(KitaruError(f"Run {self.run_id} is ending, so `{wait.display}` waits no more."))
        finally:
            with self.lock:
                self._open.pop(waiter, None)
                self._looked.pop(waiter, None)
                self._activity += 1
        execution.wait_closed(wait)
        return wait, arrival

    def _look(self, waiting: Waiting, wait: OpenWait, waiter: Waiter) -> Steps:
        size = self.execution.inbox.size
        if waiting.every:
            arrival = yield Perform(lambda: waiting.arrived(wait, self.execution))
        else:
            arrival = waiting.arrived(wait, self.execution)
        self._looked[waiter] = size
        return arrival

    def _may_suspend(self) -> bool:
        """Whether nothing can move but waiting calls, and each of them may be suspended on."""
        with self.lock:
            opened, now = list(self._open.values()), time.monotonic()
            if self._storing or self._parked or any(True for _ in self.delivery.waiters()):
                return False
            if any(not any(o.path.startswith(path + "/") for o in opened) for path in self._executing):
                return False
            return all(o.waiting.suspends(o.wait, now - o.since, self.execution) for o in opened)

    def _idempotency_key(self, chain: tuple[Scope, ...]) -> str:
        # By content, not by path: a crash before the record may let another branch make the same call.
        text = "".join(f"/{s.name}|{s.key if s.key is not None else s.digest}|{s.equal}" for s in chain)
        return sha256(f"{self.run_id}{text}".encode()).hexdigest()[:32]

    def _encode(self, call: Call, value: Any, key: str) -> Steps:
        settings = self.execution.options
        encoded = codec.encode_plain(value, settings.inline_limit)
        if encoded is None:
            folder = f"{artifact_folder(self.run_id, key)}/{secrets.token_hex(4)}"
            encoded = yield Perform(
                lambda: codec.encode_value(
                    value, step=call.name, annotation=call.returns, inline_limit=settings.inline_limit, folder=lambda: folder,
                    materializers=self.execution.materializers, allow_pickle=settings.allow_pickle,
                )
            )  # fmt: skip
        if encoded.blob is not None:
            sha, data = encoded.blob
            yield Create(blob_name(self.run_id, sha), data)
        return encoded

    def _ask_again_inside(self, path: str) -> None:
        """Before a retry of a body: what finished inside answers again, what failed inside is open again."""
        with self.lock:
            for scope_path in [p for p in self._scopes if p == path or p.startswith(path + "/")]:
                state = self._scopes.pop(scope_path)
                fresh = self._scopes[scope_path] = Counts()
                for known, again in state.finished:
                    if again:  # the next generation is a register of its own
                        known = replace(known, key=None, generation=known.generation + 1)
                    self.claims.add(known)
                    fresh.note(known.scope)

    def _store(
        self,
        call: Call,
        here: Here,
        scope: Scope,
        generation: int,
        outcome: _Outcome,
        attempts: list[Attempt],
        idempotency_key: str,
    ) -> Steps:
        encoded, failure, step = outcome.encoded, outcome.failure, outcome.step
        key = record_key(scope.name, scope.path, generation)
        if failure is not None:
            yield Perform(self.execution.lease.check)
        with self.lock:
            number, self._next_number = self._next_number, self._next_number + 1
            rank = (number, scope.path)
            self.delivery.expect(rank)
            self._storing += 1
            inputs, known = self.references.encode(call.inputs.trees)
        try:
            # A large outcome is written out once: its JSON is at hand.
            value: Value | None = encoded.value if encoded else None
            splice: tuple[str, bytes] | None = None
            if encoded is not None and isinstance(value, JsonValue) and len(encoded.text) > SPLICE_FROM:
                splice = secrets.token_hex(8), encoded.text
                value = JsonValue(data=splice[0])
            record = StepRecord(
                nonce=new_nonce(), run_id=self.run_id, epoch=self.epoch, path=scope.path, name=scope.name, ordinal=scope.ordinal,
                key=scope.key, equal=scope.equal, kind=call.kind, generation=generation, number=number, began=outcome.began,
                digest=scope.digest, turn=scope.turn, scopes=here.scopes, arguments=call.inputs.arguments, inputs=inputs, known=known,
                opaque=call.inputs.opaque, outcome=value,
                outcome_digest=_outcome_digest(encoded), failure=failure, attempts=tuple(attempts),
                after=_follows(call, here), idempotency_key=idempotency_key,
                usage=step.usage if step else None, at_most_once=call.options.at_most_once, metadata=_plain(step.metadata if step else {}),
                step_run=step.step_run if step else None, started_at=outcome.started, ended_at=_now(),
            )  # fmt: skip
            data = seal(record, splice)
            theirs = yield Create(step_name(self.run_id, key), data)
        except BaseException:
            with self.lock:
                self.delivery.forget(rank)
            raise
        finally:
            with self.lock:
                self._storing -= 1
                self._activity += 1
        if theirs is not None:  # lost the race: a step has one outcome, the first
            data, record = theirs, unseal(StepRecord, theirs, step_name(self.run_id, key))
            outcome.value, outcome.error = yield from self._decode(record)
            yield Perform(self.execution.lease.check)
        elif failure is not None:
            outcome.value, outcome.error = None, codec.raised(failure, outcome.error, scope.path)
        elif encoded is not None:
            outcome.value, outcome.error = encoded.decoded, None
        with self.lock:
            self.covers[key] = sealed_hash(data)
            self.references.learn(key, record.outcome_digest, record.known)
            if self.reused.pop(key, None) is not None:
                self._given.discard(key)
            self.ran += 1
            if here.scopes:
                entry = Known(scope, key, record.number, generation=record.generation)
                self._scope(here.scopes).finished.append((entry, _runs_again(record)))
            if record.failure is None or not here.scopes:  # else a retry of the step around it asks again
                self._forget_inside(scope.path)
        if scope.path != "/":
            yield from self._recorded(key, display_path((*here.scopes, scope)), record)
        return rank, key, outcome.value, outcome.error

    def _recorded(self, key: str, display: str, record: StepRecord) -> Steps:
        if self.execution.on_progress:
            self.execution.on_progress("failed" if record.failure else "finished", display, record.usage)
        if not record.is_shown:
            return
        if self.execution.options.lineage == "sync":
            yield Perform(lambda: self.execution.register_now(key))
        else:
            self.execution.register(key)

    def _forget_inside(self, path: str) -> None:
        self._scopes.pop(path, None)
        prefix = path + "/"
        if any(p.startswith(prefix) for p in self._scopes):
            for inner in [p for p in self._scopes if p.startswith(prefix)]:
                del self._scopes[inner]

    def _decode(self, record: StepRecord) -> Steps:
        """Value and error of a record."""
        if record.failure is not None:
            return None, codec.raised(record.failure, None, record.path)
        value = record.outcome
        assert value is not None
        if value.kind == "json":
            return codec.from_tree(value.data), None
        decode = lambda: codec.decode_value(  # noqa: E731
            value, blob=self.execution.journal.blob, materializers=self.execution.materializers,
            allow_pickle=self.execution.options.allow_pickle,
        )  # fmt: skip
        return (yield Perform(decode)), None


@dataclass(frozen=True, slots=True)
class _Open:
    """A call that waits now."""

    path: str
    wait: OpenWait
    waiting: Waiting
    since: float  # by the monotonic clock, in this leg


@dataclass(slots=True)
class _Outcome:
    """What the body came to."""

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    step: CurrentStep | None = None
    value: Any = None
    encoded: codec.Encoded | None = None
    error: BaseException | None = None
    failure: Failure | None = None
    began: int = -1


class _Given(NamedTuple):
    """A record that a fork began with."""

    number: int
    path: str
    key: str
    outcome_digest: str | None


def _until(deadline: datetime | None, at_most: float) -> float:
    """Seconds until a deadline, if that comes first."""
    return at_most if deadline is None else max(0.0, min(at_most, (deadline - _now()).total_seconds()))


def _now() -> datetime:
    return datetime.now(UTC)


def _equal_but_for(ignored: tuple[str, ...], call: Call, known: Known) -> bool:
    """Whether a recorded call has the same inputs, leaving out arguments that are ignored by now: a remedy for drift."""
    if known.record is None:
        return False
    return {n: d for n, d in known.record.arguments.items() if n not in ignored} == call.inputs.arguments


def _follows(call: Call, here: Here) -> tuple[str, ...]:
    """The records that a step comes after."""
    last = () if here.branch.last is None else (here.branch.last,)
    return tuple(dict.fromkeys((*call.after, *last)))


def _runs_again(record: StepRecord) -> bool:
    """Whether a retry of the step around it, or of the run, runs this one again."""
    return record.failure is not None and not record.at_most_once


def _outcome_digest(encoded: codec.Encoded | None) -> str | None:
    """What later inputs find this outcome by; small values are not worth a reference."""
    if encoded is None or len(encoded.text) < REFERENCE_FROM:
        return None
    return reference_digest(encoded.tree, encoded.text)


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    opaque: list[str] = []
    return {name: canonical(value, opaque) for name, value in metadata.items()}


def _short(tree: Any) -> str:
    text = tree if isinstance(tree, str) else codec.tree_text(tree)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
