"""What can go wrong, as one small tree under `KitaruError`.

Every error carries the facts as attributes and says in its message what to do next. Nothing here imports ZenML, so that the
command line can report an error without paying for that import.

Inside a flow an error that stops the run travels as `RunHalted`, a `BaseException`: code such as `except Exception` in a
framework or in the flow must not swallow the loss of a lease. Who called `.run()` or `.resume()` gets the `KitaruError` itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any


class KitaruError(Exception):
    """Base of every error that kitaru-zenml raises on purpose."""


class RunHalted(BaseException):
    """Unwinds a flow that must not go on; `error` is what the caller of the run gets."""

    def __init__(self, error: KitaruError) -> None:
        super().__init__(str(error))
        self.error = error


# --- finding a run or a step ---------------------------------------------------------------------------------------------


class RunNotFound(KitaruError):
    """No run has this id, id prefix or name."""

    def __init__(self, run: str) -> None:
        super().__init__(f"There is no run `{run}`. List the runs with `kitaru runs`.")
        self.run = run


class AmbiguousRun(KitaruError):
    """An id prefix or a name that fits several runs."""

    def __init__(self, run: str, candidates: Sequence[str]) -> None:
        super().__init__(f"`{run}` fits {len(candidates)} runs: {', '.join(candidates[:5])}. Give more characters of the id.")
        self.run, self.candidates = run, tuple(candidates)


class StepNotFound(KitaruError):
    """No step of the run has this name or path."""

    def __init__(self, run_id: str, step: str, near: Sequence[str] = ()) -> None:
        hint = f" Near names: {', '.join(near)}." if near else ""
        super().__init__(f"Run {run_id} has no step `{step}`.{hint} List its steps with `kitaru show {run_id}`.")
        self.run_id, self.step, self.near = run_id, step, tuple(near)


class AmbiguousStep(KitaruError):
    """A step name that fits several steps of the run."""

    def __init__(self, run_id: str, step: str, candidates: Sequence[str]) -> None:
        super().__init__(f"`{step}` fits several steps of run {run_id}: {', '.join(candidates[:8])}. Name one of them.")
        self.run_id, self.step, self.candidates = run_id, step, tuple(candidates)


class RunFinished(KitaruError):
    """A run that has completed cannot be resumed."""

    def __init__(self, run_id: str, status: str) -> None:
        super().__init__(f"Run {run_id} is {status}: there is nothing to resume. See its result with `kitaru show {run_id}`.")
        self.run_id, self.status = run_id, status


# --- forks and deletion --------------------------------------------------------------------------------------------------


class InvalidOverride(KitaruError):
    """An override that does not fit what the step returns. Nothing was created."""

    def __init__(self, run_id: str, step: str, type_name: str, reason: str) -> None:
        super().__init__(
            f"The override of step `{step}` of run {run_id} does not fit its type `{type_name}`: {reason} Nothing was created. "
            f"See what the step returned with `kitaru step {run_id} '{step}'`."
        )
        self.run_id, self.step, self.type_name, self.reason = run_id, step, type_name, reason


class InvalidInput(KitaruError):
    """A changed input that the flow does not take. Nothing was created."""

    def __init__(self, run_id: str, flow: str, reason: str) -> None:
        super().__init__(f"Flow `{flow}` of run {run_id} does not take these inputs: {reason} Nothing was created.")
        self.run_id, self.flow, self.reason = run_id, flow, reason


class ForkIncomplete(KitaruError):
    """A replay was cut short before it was stored what it reuses; or ZenML's own replay started it."""

    def __init__(self, run_id: str, origin: str) -> None:
        super().__init__(
            f"Run {run_id} is a replay of {origin}, and what it reuses was never stored: `kitaru replay` was cut short, or ZenML's own "
            f"replay started it. Nothing of it ran. Remove it with `kitaru delete {run_id}`, and start again with "
            f"`kitaru replay {origin}`."
        )
        self.run_id, self.origin = run_id, origin


class RunHasForks(KitaruError):
    """A run cannot be deleted while forks reuse its records."""

    def __init__(self, run_id: str, forks: Sequence[str]) -> None:
        super().__init__(
            f"Run {run_id} cannot be deleted: {len(forks)} fork{'s' * (len(forks) != 1)} of it {'need' if len(forks) != 1 else 'needs'} "
            f"its records: {', '.join(forks[:8])}. Delete a fork first with `kitaru delete {forks[0]}`."
        )
        self.run_id, self.forks = run_id, tuple(forks)


class RunBeingDeleted(KitaruError):
    """Somebody has begun to delete the run."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"Run {run_id} is being deleted. If that was cut short, finish it with `kitaru delete {run_id}`.")
        self.run_id = run_id


# --- the journal and its store -------------------------------------------------------------------------------------------


class NoJournal(KitaruError):
    """A ZenML run that has no journal: not a run of a kitaru flow, or its journal was deleted."""

    def __init__(self, run_id: str, uri: str) -> None:
        super().__init__(
            f"Run {run_id} has no journal under {uri}: it is not a run of a kitaru flow, it was killed before it began, "
            "or its journal was deleted. Start it again as a new run."
        )
        self.run_id, self.uri = run_id, uri


class CorruptRecord(KitaruError):
    """A stored object whose content does not fit its own hash or format."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"The stored object `{name}` is corrupt: {reason}. Nothing was changed. Restore it from a backup or an older object "
            "version, or delete it to run that step again; `kitaru verify RUN` lists every such object."
        )
        self.name, self.reason = name, reason


class JournalGap(KitaruError):
    """The numbered events of a journal have a hole: an event was deleted."""

    def __init__(self, run_id: str, missing: Sequence[int]) -> None:
        numbers = ", ".join(str(n) for n in missing)
        super().__init__(
            f"The event log of run {run_id} misses number {numbers}: an event object was deleted. Nothing was changed. "
            "Restore it from a backup or an older object version."
        )
        self.run_id, self.missing = run_id, tuple(missing)


class StoreUnavailable(KitaruError):
    """The artifact store did not answer, or refused, after all retries."""

    def __init__(self, uri: str, action: str, reason: str) -> None:
        super().__init__(
            f"The artifact store {uri} failed to {action}: {reason}. Finished steps are safe. Check the store with "
            "`kitaru doctor`, then go on with `kitaru resume RUN`."
        )
        self.uri, self.action, self.reason = uri, action, reason


class StoreFull(StoreUnavailable):
    """The disk or the quota of the artifact store is full."""


class StoreAccessDenied(StoreUnavailable):
    """The credentials are missing, wrong, expired or lack a permission."""


class BucketNotFound(StoreUnavailable):
    """The bucket or the folder of the artifact store does not exist."""


class StoreNotConditional(KitaruError):
    """The store cannot create an object only if it is absent, so two executors could overwrite each other."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(
            f"The artifact store {uri} cannot write conditionally (create only if absent): {reason}. A durable run needs that. "
            "Use a local artifact store, or an S3, GCS or Azure store that honours `If-None-Match: *`."
        )
        self.uri, self.reason = uri, reason


class WrongArtifactStore(KitaruError):
    """The run's journal lives in another artifact store than the one at hand."""

    def __init__(self, run_id: str, expected: str, actual: str) -> None:
        super().__init__(
            f"Run {run_id} keeps its journal in {expected}, but the stack at hand uses {actual}. Make that artifact store "
            "reachable here, or switch to the run's stack with `zenml stack set`."
        )
        self.run_id, self.expected, self.actual = run_id, expected, actual


# --- who executes the run ------------------------------------------------------------------------------------------------


class RunIsLeased(KitaruError):
    """Another live executor holds the run."""

    def __init__(self, run_id: str, epoch: int, holder: str, until: datetime | None) -> None:
        when = f" until {until:%H:%M:%S} UTC, renewed as long as it lives" if until else ""
        super().__init__(
            f"Run {run_id} is being executed by {holder} (epoch {epoch}){when}. Follow it with `kitaru show {run_id} --watch`, "
            f"or take it over with `kitaru resume {run_id} --takeover`."
        )
        self.run_id, self.epoch, self.holder, self.until = run_id, epoch, holder, until


class LeaseLost(KitaruError):
    """This executor was superseded and stops without touching the run."""

    def __init__(self, run_id: str, epoch: int, holder: str) -> None:
        super().__init__(
            f"This process held epoch {epoch} of run {run_id}, and {holder} has taken the run over. It stops here; the run goes "
            f"on there. Follow it with `kitaru show {run_id} --watch`."
        )
        self.run_id, self.epoch, self.holder = run_id, epoch, holder


class NotInRun(KitaruError):
    """A durable call from a thread or a loop that lost the run's context while a flow is live in this process."""

    def __init__(self, step: str) -> None:
        super().__init__(
            f"`{step}` was called in a thread or event loop that does not know its run, while a flow is running in this process: "
            f"the call would not be durable. Use `{step}.submit(...)` or `{step}.map(...)`, or start the thread with "
            f"`contextvars.copy_context().run`. For a plain call on purpose: `{step}.__wrapped__(...)`."
        )
        self.step = step


class EventLoopRunning(KitaruError):
    """`.run()` or `.resume()` was called inside a running event loop."""

    def __init__(self, flow: str, verb: str) -> None:
        super().__init__(
            f"`{flow}.{verb}(...)` blocks, and an event loop is running in this thread. Use `await {flow}.{verb}_async(...)`."
        )
        self.flow, self.verb = flow, verb


# --- steps ---------------------------------------------------------------------------------------------------------------


class InvalidStepName(KitaruError):
    """A step name or key that cannot be stored."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"`{name}` cannot name a step: {reason}. Use letters, digits, `_`, `-`, `.` and `:`, 100 at most.")
        self.name, self.reason = name, reason


class NotDurableError(KitaruError):
    """A step's value that cannot be stored; the value itself stays reachable as `value` (on the first run, not on a replay)."""

    value: Any = None

    def __init__(self, step: str, type_name: str, reason: str, value: Any = None) -> None:
        super().__init__(
            f"Step `{step}` returned a `{type_name}`, which cannot be stored: {reason}. Return JSON-like values, Pydantic models "
            f"or dataclasses, register a ZenML materializer for `{type_name}`, or opt in with `@flow(allow_pickle=True)`. "
            "The value is on this exception as `.value`."
        )
        self.step, self.type_name, self.reason, self.value = step, type_name, reason, value


class InputsDrifted(KitaruError):
    """A finished step is asked again at the same place with other inputs: the flow is not deterministic there."""

    def __init__(self, run_id: str, step: str, changes: Sequence[tuple[str, str, str]], recorded: Sequence[str] = ()) -> None:
        shown = "; ".join(f"`{name}` was {old}, is {new}" for name, old, new in changes) or "its inputs are not those recorded"
        super().__init__(
            f"Run {run_id} asks step `{step}` with other inputs than before: {shown}. Nothing was run and nothing is lost. "
            f"Choose: `kitaru resume {run_id} --drift reuse` (the same call, a volatile input: take the recorded result), "
            f"`kitaru resume {run_id} --drift rerun` (a new call: run it, retire the old record), or declare the input volatile "
            f'with `@checkpoint(ignore=("{changes[0][0] if changes else "argument"}",))` and resume.'
        )
        self.run_id, self.step, self.changes, self.recorded = run_id, step, tuple(changes), tuple(recorded)


class StepInDoubt(KitaruError):
    """An at-most-once step was started and has no outcome: nobody knows whether it took effect."""

    def __init__(self, run_id: str, step: str, started_at: datetime) -> None:
        super().__init__(
            f"Step `{step}` of run {run_id} runs at most once; it was started at {started_at:%Y-%m-%d %H:%M:%S} UTC and its outcome "
            f"is unknown. Find out what happened, then say `kitaru settle {run_id} '{step}' --value JSON` (it took effect) or "
            f"`kitaru settle {run_id} '{step}' --retry` (it did not), and `kitaru resume {run_id}`."
        )
        self.run_id, self.step, self.started_at = run_id, step, started_at


# --- waiting and stopping ------------------------------------------------------------------------------------------------


class RunSuspended(KitaruError):
    """The run waits for something and holds no process meanwhile. No failure: `.run()` returns, with the run's status `paused`."""

    def __init__(self, run_id: str, waits: Sequence[tuple[str, str]]) -> None:
        shown = ", ".join(f"`{name}`" for _, name in waits)
        hint = (
            f"Answer with `kitaru answer {run_id}`"
            if any(kind == "wait" for kind, _ in waits)
            else "It goes on when that is there"
        )
        super().__init__(
            f"Run {run_id} is suspended: it waits for {shown}. {hint}; `kitaru worker` continues it, or `kitaru resume {run_id}`."
        )
        self.run_id, self.waits = run_id, tuple(waits)


class RunCancelled(KitaruError):
    """Somebody cancelled the run."""

    def __init__(self, run_id: str, reason: str = "", by: str = "") -> None:
        super().__init__(f"Run {run_id} was cancelled{f' by {by}' if by else ''}{f': {reason}' if reason else ''}.")
        self.run_id, self.reason, self.by = run_id, reason, by


class ChildRunFailed(KitaruError):
    """A child run did not complete. Raised into the parent, which may catch it; resuming the parent looks at the child again."""

    def __init__(self, run_id: str, status: str, type_name: str, message: str) -> None:
        said = f"{type_name.rpartition(':')[2]}: {message}" if type_name else message
        super().__init__(
            f"Child run {run_id} ended as {status}: {said}. Correct it (`kitaru failure {run_id}`, then `kitaru resume {run_id}` or "
            f"`kitaru replay {run_id} --override STEP=VALUE`) and resume this run."
        )
        self.run_id, self.status, self.type_name, self.message = run_id, status, type_name, message


class RunIdTaken(KitaruError):
    """A run was started under this id with other arguments."""

    def __init__(self, id: str, run_id: str, arguments: Sequence[str]) -> None:
        super().__init__(
            f"The id `{id}` belongs to run {run_id}, which was started with other arguments ({', '.join(arguments)}). Use another id."
        )
        self.id, self.run_id, self.arguments = id, run_id, tuple(arguments)


class LegInterrupted(KitaruError):
    """The process of a run was asked to end (SIGTERM): it lets the run go, which is continued elsewhere."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"The process of run {run_id} was asked to end and let the run go. Finished steps are safe; `kitaru worker` continues "
            f"it, or `kitaru resume {run_id}`."
        )
        self.run_id = run_id


class RunGivenUp(KitaruError):
    """The worker does not start a run again."""

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(
            f"Run {run_id} was given up: {reason}. Finished steps are safe. See where it was with `kitaru failure {run_id}`, mend the "
            f"cause, and go on with `kitaru resume {run_id}`."
        )
        self.run_id, self.reason = run_id, reason


class InvalidWorkerSettings(KitaruError):
    """What a worker was told cannot be followed."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The worker cannot be started as told: {reason}. See `kitaru worker --help`.")
        self.reason = reason


class WaitTimedOut(KitaruError):
    """Nobody answered in time. Raised into the flow, which may catch it."""

    def __init__(self, wait: str, deadline: str) -> None:
        super().__init__(f"Nobody answered `{wait}` by {deadline}.")
        self.wait, self.deadline = wait, deadline


class EventTimedOut(KitaruError):
    """No event came in time. Raised into the flow, which may catch it."""

    def __init__(self, event: str, wait: str) -> None:
        super().__init__(f"No event `{event}` came in time for `{wait}`.")
        self.event, self.wait = event, wait


class WaitRefused(KitaruError):
    """A wait inside an at-most-once step, which could not be started again after the suspension."""

    def __init__(self, run_id: str, wait: str) -> None:
        super().__init__(
            f"`{wait}` of run {run_id} waits inside a step marked `at_most_once`: a suspended step starts again when the run goes on. "
            "Wait before that step, in the flow or in a step around it."
        )
        self.run_id, self.wait = run_id, wait


class NoSuchWait(KitaruError):
    """The run has no open wait of this name, or several and none was named."""

    def __init__(self, run_id: str, wait: str | None, open_waits: Sequence[str]) -> None:
        listed = f"Open are: {', '.join(open_waits)}." if open_waits else "It waits for no answer now."
        asked = f"has no open wait `{wait}`" if wait is not None else "does not wait for one answer only"
        super().__init__(f"Run {run_id} {asked}. {listed}")
        self.run_id, self.wait, self.open_waits = run_id, wait, tuple(open_waits)


class InvalidAnswer(KitaruError):
    """An answer that the wait's schema does not take. The wait stays open."""

    def __init__(self, run_id: str, wait: str, reason: str) -> None:
        super().__init__(f"The answer does not fit `{wait}` of run {run_id}, which stays open: {reason}")
        self.run_id, self.wait, self.reason = run_id, wait, reason


class AlreadyAnswered(KitaruError):
    """The wait has another answer already; a wait has one."""

    def __init__(self, run_id: str, wait: str, value: Any, by: str, at: str) -> None:
        super().__init__(
            f"`{wait}` of run {run_id} was answered otherwise already, by {by or 'somebody'} at {at}: {value!r}. It stands."
        )
        self.run_id, self.wait, self.value, self.by, self.at = run_id, wait, value, by, at


class StepTimeout(KitaruError):
    """A step took longer than its `timeout`."""

    def __init__(self, step: str, seconds: float) -> None:
        super().__init__(f"Step `{step}` did not finish within {seconds:g} s.")
        self.step, self.seconds = step, seconds


class RecordedFailure(KitaruError):
    """A recorded failure whose exception class is not imported here: its type name and message."""

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(f"{type_name}: {message}")
        self.type_name, self.message = type_name, message
