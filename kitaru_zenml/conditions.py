"""Open waits as ZenML shows them: run wait conditions, of which ZenML allows one pending a run.

So ZenML shows one question of a run at a time, the oldest that is open, and whoever consumes an answer posts the next. The journal's
answer is what the run uses; it is created from what ZenML holds (`adopt`), or after ZenML took it (`resolve`): so ZenML and the run
never tell two stories. A condition belongs to a wait by its name, because its metadata is stored after it: `approve#0`, and
`approve#0 (2)` when the first answer was refused.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from zenml.client import Client
from zenml.enums import (
    RunWaitConditionLeaseMode,
    RunWaitConditionResolution,
    RunWaitConditionStatus,
    RunWaitConditionType,
)
from zenml.exceptions import EntityExistsError, IllegalOperationError
from zenml.models import (
    PipelineRunResponse,
    RunWaitConditionLeaseUpdate,
    RunWaitConditionRequest,
    RunWaitConditionResolveRequest,
    RunWaitConditionResponse,
)

from kitaru_zenml.journal.inbox import Inbox, put_answer, put_cancel
from kitaru_zenml.journal.journal import Journal, new_nonce
from kitaru_zenml.journal.records import Answer, CancelRequest, OpenWait, RefusedAnswer
from kitaru_zenml.lineage.translate import shorten, suffixed

logger = logging.getLogger("kitaru_zenml")
POLL = 1.0  # seconds between two looks of an executing leg
LEASE = 20.0  # seconds: so long the server leaves it to the executing leg to go on after an answer


def condition_name(wait: OpenWait, number: int) -> str:
    """Name of the condition that asks for the n-th answer to a wait, n from 0."""
    return shorten(wait.display) if number == 0 else suffixed(wait.display, f" ({number + 1})")


def answer_number(wait: OpenWait, name: str) -> int | None:
    """Which answer to a wait a condition asks for; `None` if it is another's."""
    if name == condition_name(wait, 0):
        return 0
    found = re.search(r" \((\d+)\)$", name)
    number = int(found.group(1)) - 1 if found else 0
    return number if found and name == condition_name(wait, number) else None


def pending(run_id: UUID | str) -> RunWaitConditionResponse | None:
    """The run's pending condition."""
    found = Client().list_run_wait_conditions(
        pipeline_run=str(run_id), status=RunWaitConditionStatus.PENDING.value, hydrate=True
    )
    return found.items[0] if found.items else None


def post_next(
    run: PipelineRunResponse, journal: Journal, waits: Sequence[OpenWait], inbox: Inbox
) -> RunWaitConditionResponse | None:
    """Make ZenML show the oldest wait without an answer, unless it shows one; what was answered there meanwhile is adopted.

    Args:
        run: The run.
        journal: Of the run.
        waits: Its open waits, the oldest first.
        inbox: Of the run, read just now.

    Returns:
        The pending condition, if there is one.
    """
    asked = [wait for wait in waits if wait.kind == "wait" and inbox.answer(wait.key) is None]
    for wait in asked:
        refusals = inbox.refusals(wait.key)
        try:
            condition = Client().zen_store.create_run_wait_condition(_request(run, wait, refusals))
        except IllegalOperationError:
            return pending(run.id)
        except EntityExistsError:  # of a wait of the same name that was asked otherwise before: ask under the next number
            logger.warning(
                "run %s: ZenML has another question named `%s`; this one is shown by `kitaru waits` only", run.id, wait.display
            )
            continue
        if condition.status == RunWaitConditionStatus.PENDING:
            return condition
        adopt(condition, wait, journal, inbox)
        inbox.refresh()
    return None


def _request(run: PipelineRunResponse, wait: OpenWait, refusals: Sequence[RefusedAnswer]) -> RunWaitConditionRequest:
    question, schema = wait.question, wait.json_schema
    if refusals:
        question = f"{question or wait.display}\n(The last answer did not fit: {refusals[-1].reason})"
    if schema is not None and wait.deadline is not None:
        schema = {
            "anyOf": [schema, {"type": "null"}]
        }  # ZenML closes a condition by a value only, and nobody gives one that timed out
    return RunWaitConditionRequest(
        project=run.project_id, run=run.id, name=condition_name(wait, len(refusals)), type=RunWaitConditionType.EXTERNAL_INPUT,
        question=question, data_schema=schema, metadata={name: value for name, value in wait.metadata.items() if value is not None},
    )  # fmt: skip


def adopt(condition: RunWaitConditionResponse, wait: OpenWait, journal: Journal, inbox: Inbox) -> None:
    """Take over into the journal what a resolved condition holds: the answer, or that the run was aborted."""
    number = answer_number(wait, condition.name)
    if number is None:
        return
    at = (condition.resolved_at or datetime.now(UTC)).replace(tzinfo=UTC)
    by = _user_name(condition.resolved_by_user_id)
    if condition.resolution == RunWaitConditionResolution.ABORT:
        reason = f"`{wait.display}` was aborted"
        put_cancel(journal, CancelRequest(nonce=new_nonce(), run_id=journal.run_id, reason=reason, by=by, at=at))
        return
    # A condition may still have asked when an answer that came past ZenML had been refused: this is the next one then.
    refused = inbox.answer(wait.key, number) if number < len(inbox.refusals(wait.key)) else None
    if refused is not None and refused.value != condition.result:
        number = len(inbox.refusals(wait.key))
    put_answer(
        journal,
        Answer(
            nonce=new_nonce(),
            run_id=journal.run_id,
            wait=wait.key,
            number=number,
            value=condition.result,
            by=by,
            via="zenml",
            at=at,
        ),
    )


def adopt_resolved(run: PipelineRunResponse, journal: Journal, waits: Sequence[OpenWait], inbox: Inbox) -> bool:
    """Take over what ZenML holds for open waits that the journal has no answer for; whether there was something."""
    asked = [w for w in waits if w.kind == "wait" and inbox.answer(w.key) is None]
    by_name = {condition_name(w, number): w for w in asked for number in range(1 + len(inbox.refusals(w.key)))}
    if not by_name:
        return False
    conditions = Client().list_run_wait_conditions(
        pipeline_run=str(run.id), status=RunWaitConditionStatus.RESOLVED.value, sort_by="desc:updated", size=100, hydrate=True
    )
    for condition in conditions.items:
        if condition.name in by_name:
            adopt(condition, by_name[condition.name], journal, inbox)
    inbox.refresh()
    return inbox.cancel is not None or any(inbox.answer(w.key) is not None for w in asked)


def _user_name(user: UUID | None) -> str:
    if user is None:
        return ""
    me = Client().active_user
    try:
        return me.name if user == me.id else Client().get_user(user).name
    except (KeyError, IllegalOperationError):  # deleted, or only an administrator may look
        return str(user)


def resolve(condition: RunWaitConditionResponse, value: Any) -> RunWaitConditionResponse:
    """Answer a condition in ZenML; returns it as it is then, by us or by whoever was faster.

    Raises:
        ValueError: If the value does not fit the condition's schema.
    """
    request = RunWaitConditionResolveRequest(resolution=RunWaitConditionResolution.CONTINUE, result=value)
    try:
        return Client().zen_store.resolve_run_wait_condition(condition.id, request)
    except IllegalOperationError:
        return Client().zen_store.get_run_wait_condition(condition.id)


def close_pending(run_id: UUID | str) -> None:
    """An ended run asks nothing more."""
    if (condition := pending(run_id)) is None:
        return
    try:
        Client().zen_store.resolve_run_wait_condition(
            condition.id, RunWaitConditionResolveRequest(resolution=RunWaitConditionResolution.ABORT)
        )
    except IllegalOperationError:
        pass  # it is resolved; the run that ZenML would stop then has ended


class Conditions:
    """The `execution.Board` of a leg: a thread that shows its waits in ZenML and takes over what is answered there."""

    def __init__(
        self, run: PipelineRunResponse, inbox: Inbox, waits: Callable[[], Sequence[OpenWait]], look: Callable[[], None]
    ) -> None:
        self._run, self._inbox, self._waits, self._look = run, inbox, waits, look
        self._changed, self._closing = threading.Event(), False
        self._posted: RunWaitConditionResponse | None = None
        self._closed: set[str] = set()  # names of conditions whose waits ended in this leg
        self._seen: set[str] = set()  # keys of waits that were looked for in what ZenML had resolved before this leg asked them
        self._thread: threading.Thread | None = None

    def opened(self, wait: OpenWait) -> None:
        """See `execution.Board`."""
        if wait.kind != "wait" or self._closing:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name=f"kitaru-conditions-{str(self._run.id)[:8]}", daemon=True)
            self._thread.start()
        self._changed.set()

    def closed(self, wait: OpenWait) -> None:
        """See `execution.Board`."""
        self._closed.update(condition_name(wait, number) for number in range(1 + len(self._inbox.refusals(wait.key))))
        self._changed.set()

    def refused(self, refusal: RefusedAnswer) -> None:
        """See `execution.Board`."""
        self._changed.set()

    def close(self, *, suspending: bool) -> bool:
        """The leg ends. If it suspends, ZenML gets the run's paused status together with the end of our lease on the condition.

        Returns:
            Whether ZenML holds an answer that the leg has not seen.
        """
        self._closing = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join()
        if not suspending:
            return False
        waits = list(self._waits())
        if not any(w.kind == "wait" for w in waits):
            return False
        if self._adopt_earlier(waits):
            return True
        if self._posted is None:
            self._posted = post_next(self._run, self._inbox.journal, waits, self._inbox)
        if self._posted is None:
            return True  # all are answered
        status = self._lease(RunWaitConditionLeaseMode.FINALIZE)
        return status != RunWaitConditionStatus.PENDING and adopt_resolved(self._run, self._inbox.journal, waits, self._inbox)

    def _main(self) -> None:
        while not self._closing:
            self._changed.clear()
            try:
                while self._turn():
                    pass
            except Exception as error:
                logger.warning("run %s: its waits cannot be shown in ZenML now: %s", self._run.id, error)
                self._posted = None
            if self._waits() or self._posted is not None:
                self._changed.wait(POLL)
            else:
                self._changed.wait()

    def _turn(self) -> bool:
        """Bring ZenML and the journal to agree; whether there may be more to do at once."""
        waits, journal = list(self._waits()), self._inbox.journal
        if self._adopt_earlier(waits):
            self._look()
        if self._posted is None:
            self._posted = post_next(self._run, journal, waits, self._inbox)
            if self._posted is not None:
                self._lease(RunWaitConditionLeaseMode.REFRESH)
            self._look()
            return False
        wait = next((w for w in waits if answer_number(w, self._posted.name) is not None), None)
        answer = self._inbox.answer(wait.key) if wait is not None else None
        if self._posted.name in self._closed or answer is not None:  # answered past ZenML, or timed out
            resolve(self._posted, answer.value if answer is not None else None)
            self._posted = None
            return True
        if self._lease(RunWaitConditionLeaseMode.REFRESH) == RunWaitConditionStatus.PENDING:
            return False
        if wait is None:  # its branch is gone
            return False
        adopt(Client().zen_store.get_run_wait_condition(self._posted.id), wait, journal, self._inbox)
        self._posted = None
        self._inbox.refresh()
        self._look()
        return True

    def _adopt_earlier(self, waits: Sequence[OpenWait]) -> bool:
        """Take over what ZenML held when this leg asked a wait again; whether there was something.

        Of each wait once, and of all while nothing is posted: the waits come one by one, and the first may be posted before the one is
        asked that was answered in ZenML between two legs.
        """
        asked = [wait for wait in waits if self._posted is None or wait.key not in self._seen]
        found = adopt_resolved(self._run, self._inbox.journal, asked, self._inbox)
        self._seen.update(wait.key for wait in asked)
        return found

    def _lease(self, mode: RunWaitConditionLeaseMode) -> RunWaitConditionStatus:
        assert self._posted is not None
        update = RunWaitConditionLeaseUpdate(
            poller_instance_id=str(self._run.id), poller_lease_expires_at=datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=LEASE),
            mode=mode,
        )  # fmt: skip
        return Client().zen_store.update_run_wait_condition_lease(self._posted.id, update)
