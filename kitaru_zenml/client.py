"""The verbs of a program or a person towards runs that others execute: list waits, answer, send events, cancel.

Each writes once into the run's inbox, under an idempotency key, and leaves a hint for the worker; so each may be repeated after a
crash, and two people who do the same do it once.
"""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import jsonschema
from pydantic import TypeAdapter, ValidationError
from zenml.client import Client
from zenml.enums import ExecutionStatus, RunWaitConditionStatus
from zenml.models import PipelineRunResponse

from kitaru_zenml import codec, conditions
from kitaru_zenml.artifact_store import open_store
from kitaru_zenml.errors import (
    AlreadyAnswered,
    InvalidAnswer,
    NoJournal,
    NoSuchWait,
    NotDurableError,
    RunCancelled,
    RunFinished,
    RunIsLeased,
)
from kitaru_zenml.identity import check_name
from kitaru_zenml.journal.due import leave_hint
from kitaru_zenml.journal.inbox import Inbox, put_answer, put_cancel, put_event
from kitaru_zenml.journal.journal import Journal, new_nonce
from kitaru_zenml.journal.records import Answer, CancelRequest, OpenWait, SentEvent
from kitaru_zenml.resumption import resume
from kitaru_zenml.runs import artifact_store_of, find_run, flow_options, open_journal
from kitaru_zenml.waits import describe

_READERS = 8  # runs that are read at once
_LAUNCH_PATIENCE = 120.0  # seconds in which a server brings a workload up
_PATIENCE = 5.0  # seconds in which a live executor notices that it is to stop


@dataclass(frozen=True)
class Question:
    """An open wait of a run.

    Attributes:
        run_id: Of the run.
        flow: Its flow.
        wait: The wait's name in the run, as `answer` takes it.
        question: What is asked.
        json_schema: Of the answer; `None` takes no value.
        metadata: What the flow said beside the question.
        asked_at: Since when it is open.
        deadline: When it times out, or `None`.
        refused: Why the last answer did not fit, or `None`.
        key: Of the wait in the journal.
    """

    run_id: str
    flow: str
    wait: str
    question: str | None
    json_schema: dict[str, Any] | None
    metadata: dict[str, Any]
    asked_at: datetime
    deadline: datetime | None
    refused: str | None = None
    key: str = ""


def waits(run: str | UUID | None = None) -> list[Question]:
    """The open questions of a run, or of all runs, the oldest first.

    Args:
        run: Id, unambiguous prefix or name; `None` for all.

    Raises:
        RunNotFound: If there is no such run.
    """
    runs = _asking_runs() if run is None else [find_run(run)]
    with ThreadPoolExecutor(_READERS) as pool:
        found = [question for questions in pool.map(_questions, runs) for question in questions]
    return sorted(found, key=lambda q: (q.asked_at, q.wait))


def _asking_runs() -> list[PipelineRunResponse]:
    """Runs with a question that ZenML shows: a run with any open question has one there."""
    ids: dict[UUID, None] = {}
    page = 1
    while True:
        found = Client().list_run_wait_conditions(
            status=RunWaitConditionStatus.PENDING.value, page=page, size=200, hydrate=True
        )
        ids.update((condition.run.id, None) for condition in found.items)
        if page >= found.total_pages:
            break
        page += 1
    return [Client().get_pipeline_run(id, allow_name_prefix_match=False) for id in ids]


def _questions(run: PipelineRunResponse) -> list[Question]:
    if run.status.is_finished and run.status != ExecutionStatus.FAILED:
        return []
    journal = open_journal(run)
    opened = [w for w in journal.open_waits() if w.kind == "wait"]
    inbox = Inbox(journal)
    inbox.refresh()
    if opened and conditions.pending(run.id) is None:  # answered in ZenML, and no leg has come by since
        conditions.adopt_resolved(run, journal, opened, inbox)
    flow = run.pipeline.name if run.pipeline else ""
    return [
        Question(
            run_id=str(run.id), flow=flow, wait=w.display, question=w.question, json_schema=w.json_schema, metadata=w.metadata,
            asked_at=w.asked_at, deadline=w.deadline, refused=next((r.reason for r in reversed(inbox.refusals(w.key))), None), key=w.key,
        )
        for w in opened
        if inbox.answer(w.key) is None
    ]  # fmt: skip


# --- answers -------------------------------------------------------------------------------------------------------------


def answer(
    run: str | UUID, value: Any = None, *, wait: str | None = None, by: str | None = None, via: str = "client"
) -> Answer:
    """Answer an open wait of a run. The worker, or `resume`, continues the run.

    Args:
        run: Id, unambiguous prefix or name.
        value: JSON-like; a Pydantic model is taken as its JSON. `None` for a wait without a schema.
        wait: Its name, `approve#0` or `approve` if that is unambiguous; may be left out if only one is open.
        by: Who answers; ZenML's user by default.
        via: By what means, for the record.

    Returns:
        The answer as stored: the same that was given, by whoever gave it first.

    Raises:
        RunNotFound: If there is no such run.
        NoSuchWait: If no open wait has this name, or several are open and none is named.
        InvalidAnswer: If the value does not fit the wait's schema; the wait stays open.
        AlreadyAnswered: If it has another answer; an equal one is accepted.
        RunFinished: If the run has ended.
    """
    found = find_run(run)
    journal = open_journal(found)
    inbox = Inbox(journal)
    inbox.refresh()
    asked = _the_wait(journal, inbox, wait)
    if found.status.is_finished and found.status != ExecutionStatus.FAILED and inbox.answer(asked.key) is None:
        raise RunFinished(journal.run_id, found.status.value)
    tree = _json_of(value)
    _validate(journal.run_id, asked, tree)
    number = len(inbox.refusals(asked.key))
    given = Answer(
        nonce=new_nonce(),
        run_id=journal.run_id,
        wait=asked.key,
        number=number,
        value=tree,
        by=by or _me(),
        via=via,
        at=datetime.now(UTC),
    )
    in_zenml = conditions.pending(found.id)
    if in_zenml is not None and conditions.answer_number(asked, in_zenml.name) is not None:
        resolved = conditions.resolve(in_zenml, tree)
        if resolved.result != tree or resolved.resolution != "continue":  # somebody was faster there
            conditions.adopt(resolved, asked, journal, inbox)
    stored = put_answer(journal, given)
    leave_hint(journal.store, journal.run_id, datetime.now(UTC))
    if stored.value != tree:
        raise AlreadyAnswered(journal.run_id, asked.display, stored.value, stored.by, f"{stored.at:%Y-%m-%d %H:%M:%S} UTC")
    return stored


def go_on(answer: Answer, timeout: float = 60) -> str:
    """Continue a run whose wait was answered, unless somebody else does.

    An executor that is just suspending may not have seen the answer, so this ends only when the answer was taken, or the run continued.

    Args:
        answer: As `answer` returned it.
        timeout: Seconds to wait for an executor that does not take it.

    Returns:
        The run's status then.

    Raises:
        Exception: What ended the run, if it went on here.
    """
    began, run_id = time.monotonic(), answer.run_id
    while True:
        run = find_run(run_id)
        journal = open_journal(run)
        is_taken = not any(wait.key == answer.wait for wait in journal.open_waits())
        if is_taken or run.status.is_finished or being_launched(run) or time.monotonic() - began > timeout:
            return run.status.value
        try:
            return resume(run_id, wait=time.monotonic() - began > _PATIENCE).status
        except (RunIsLeased, RunFinished):
            time.sleep(0.3)


def being_launched(run: PipelineRunResponse) -> bool:
    """Whether a ZenML server that can launch workloads has just taken it on itself to continue a run: ours must not double it."""
    if run.status != ExecutionStatus.RESUMING:
        return False
    return (datetime.now(UTC) - run.updated.replace(tzinfo=UTC)).total_seconds() < _LAUNCH_PATIENCE


def _the_wait(journal: Journal, inbox: Inbox, name: str | None) -> OpenWait:
    """The wait of a name among those that are open, or were answered and not consumed yet; else among the consumed ones."""
    everything = [w for w in journal.waits() if w.kind == "wait"]
    unconsumed = {w.key for w in journal.open_waits()}
    if name is not None:
        exact = [w for w in everything if name in (w.display, w.scope.path)]
        fits = exact or [w for w in everything if is_named(w.display, name)]
    else:
        fits = everything
    opened = [w for w in fits if w.key in unconsumed and inbox.answer(w.key) is None]
    if len(opened) == 1:
        return opened[0]
    if not opened and len(fits) == 1 and inbox.answer(fits[0].key) is not None:
        return fits[0]  # to tell whether the answer is the same
    listed = [w.display for w in everything if w.key in unconsumed and inbox.answer(w.key) is None]
    raise NoSuchWait(journal.run_id, name, listed)


def is_named(display: str, name: str) -> bool:
    """Whether a wait may be called so: by the end of its path, its number left out if one likes: `refund#1/approve#0`, `approve`."""
    return any(path == name or path.endswith("/" + name) for path in (display, display.rpartition("#")[0]))


def _json_of(value: Any) -> Any:
    try:
        return TypeAdapter(Any).dump_python(value, mode="json")
    except Exception as error:
        raise NotDurableError("answer", type(value).__name__, str(error), value) from None


def _validate(run_id: str, wait: OpenWait, tree: Any) -> None:
    """By the schema's class if it can be imported here, else by the JSON schema; the run looks again with the real type."""
    if wait.json_schema is None:
        if tree is not None:
            raise InvalidAnswer(run_id, wait.display, "it takes no value: the answer only lets the run go on")
        return
    kind = codec.find_class(wait.data_type) if wait.data_type else None
    try:
        if kind is not None:
            TypeAdapter(kind).validate_python(tree)
        else:
            jsonschema.validate(tree, wait.json_schema)
    except ValidationError as error:
        raise InvalidAnswer(run_id, wait.display, describe(error)) from None
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        raise InvalidAnswer(run_id, wait.display, f"{where}: {error.message}" if where else error.message) from None


def _me() -> str:
    return Client().active_user.name


# --- events and cancellation ---------------------------------------------------------------------------------------------


def send_event(run: str | UUID, name: str, payload: Any = None, *, idempotency_key: str | None = None) -> SentEvent:
    """Send an event to a run; its flow gets it from `event(name)`, exactly once.

    Args:
        run: Id, unambiguous prefix or name.
        name: Of the event.
        payload: JSON-like.
        idempotency_key: The same for every try to send the same event; a fresh one by default.

    Returns:
        The event as stored: the first that was sent under the key.

    Raises:
        RunNotFound: If there is no such run.
        RunFinished: If the run takes no events any more.
    """
    with EventSender(run) as sender:
        return sender.send(name, payload, idempotency_key=idempotency_key)


class EventSender:
    """Sends many events to one run, which is looked up once. Thread-safe."""

    def __init__(self, run: str | UUID) -> None:
        found = find_run(run)
        if found.status.is_finished and found.status != ExecutionStatus.FAILED:
            raise RunFinished(str(found.id), found.status.value)
        self._journal, self._by = open_journal(found), _me()

    def __enter__(self) -> EventSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, name: str, payload: Any = None, *, idempotency_key: str | None = None) -> SentEvent:
        """See `send_event`."""
        check_name(name)
        return put_event(
            self._journal,
            SentEvent(
                nonce=new_nonce(), run_id=self._journal.run_id, name=name, idempotency_key=idempotency_key or secrets.token_hex(16),
                payload=_json_of(payload), sent_at=time.time_ns(), by=self._by,
            ),
        )  # fmt: skip

    def close(self) -> None:
        """Tell the worker that the run may have something to do."""
        leave_hint(self._journal.store, self._journal.run_id, datetime.now(UTC))


def request_cancel(run: str | UUID, reason: str = "", *, keep_children: bool = False) -> CancelRequest:
    """Ask a run to stop at its next boundary. Whoever executes it does; `cancel` also sees to a run that nobody executes.

    Raises:
        RunNotFound: If there is no such run.
        RunFinished: If it has ended.
        NoJournal: If it is not a run of a kitaru flow.
    """
    found = find_run(run)
    if found.status.is_finished and found.status != ExecutionStatus.FAILED:
        raise RunFinished(str(found.id), found.status.value)
    journal = Journal(open_store(artifact_store_of(found)), str(found.id))  # a run that has not begun has none yet
    if flow_options(found) is None:
        raise NoJournal(journal.run_id, journal.store.uri)
    request = CancelRequest(
        nonce=new_nonce(), run_id=journal.run_id, reason=reason, keep_children=keep_children, by=_me(), at=datetime.now(UTC)
    )
    stored = put_cancel(journal, request)
    leave_hint(journal.store, journal.run_id, datetime.now(UTC))
    return stored


def cancel(run: str | UUID, reason: str = "", *, keep_children: bool = False, timeout: float = 60) -> str:
    """Cancel a run, running or suspended; its child runs follow.

    A run that nobody executes is ended here, with its `on_cancel` hook; one that somebody executes stops at its next boundary, which is
    waited for.

    Args:
        run: Id, unambiguous prefix or name.
        reason: For the record.
        keep_children: Leave its child runs alone.
        timeout: Seconds to wait for the executor.

    Returns:
        The run's status then: `stopped`, or what it is still.

    Raises:
        RunNotFound: If there is no such run.
        RunFinished: If it has ended.
    """
    run_id = request_cancel(run, reason, keep_children=keep_children).run_id
    began = time.monotonic()
    while True:
        try:
            resume(run_id, wait=time.monotonic() - began > _PATIENCE)
        except (RunCancelled, RunFinished):
            break
        except RunIsLeased:
            pass
        if find_run(run_id).status.is_finished or time.monotonic() - began > timeout:
            break
        time.sleep(0.3)
    return find_run(run_id).status.value
