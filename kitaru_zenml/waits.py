"""`wait`: a question to a person, or to another system, that the run suspends on.

The question is shown by ZenML (dashboard, `zenml pipeline runs wait-conditions`), `kitaru waits` and `kitaru.client.waits()`; whoever
answers, the journal's answer is what the run uses. How the two agree is in `conditions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from kitaru_zenml import codec
from kitaru_zenml.errors import WaitTimedOut
from kitaru_zenml.journal.inbox import put_refusal
from kitaru_zenml.journal.records import Answer, OpenWait, RefusedAnswer, WaitKind
from kitaru_zenml.suspension import Arrival, await_in_run, grace_passed, is_past, seconds_of

if TYPE_CHECKING:
    from kitaru_zenml.execution import Execution

_RAISE = object()


def wait(
    name: str,
    *,
    schema: Any = None,
    question: str | None = None,
    timeout: float | timedelta | None = None,
    default: Any = _RAISE,
    grace: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """Ask a question and wait for its answer, days if need be: the run suspends meanwhile and holds no process.

    Returns the answer; in an async flow or step, an awaitable of it. Works in the flow's body, in parallel branches, and inside steps
    (the body of the step around it runs again when the run goes on; what it did in steps and waits of its own is replayed).

    Args:
        name: Of the wait; several of one name in a run are told apart as `approve#0`, `approve#1`.
        schema: The type of the answer: anything that Pydantic describes. `None` takes no value: the answer only lets the run go on.
        question: What to ask, shown to whoever answers.
        timeout: Seconds, or a timedelta, from when it is first asked. Without one it waits for ever.
        default: What it returns when the time has run out; without one it raises `WaitTimedOut`.
        grace: Seconds that the process goes on waiting before the run suspends; the flow's setting by default.
        metadata: JSON-like facts for whoever answers, shown beside the question.

    Raises:
        WaitTimedOut: If nobody answered in time and there is no default.
        NotInRun: Outside a flow.
        InvalidStepName: If the name cannot be stored.

    Example:
        decision = wait("approve", schema=Literal["yes", "no"], question=f"Refund {amount} to {customer}?")
    """
    adapter: TypeAdapter[Any] | None = None if schema is None else TypeAdapter(schema)
    asking = HumanWait(question, adapter, schema, seconds_of(timeout), default, grace, dict(metadata or {}))
    inputs = {"question": question, "schema": asking.json_schema, **({"metadata": dict(metadata)} if metadata else {})}
    return await_in_run(asking, name, inputs, Any if schema is None else schema)


@dataclass(frozen=True)
class HumanWait:
    """A `suspension.Waiting` for an answer."""

    question: str | None
    adapter: TypeAdapter[Any] | None
    schema: Any
    timeout: float | None
    default: Any
    own_grace: float | None
    metadata: dict[str, Any] = field(default_factory=dict)
    kind: WaitKind = "wait"
    every: float = 0

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """Of the answer, for whoever answers."""
        return None if self.adapter is None else self.adapter.json_schema()

    def details(self, now: datetime) -> dict[str, Any]:
        """See `suspension.Waiting`."""
        is_class = isinstance(self.schema, type) and "<locals>" not in self.schema.__qualname__
        return {
            "question": self.question,
            "json_schema": self.json_schema,
            "data_type": codec.type_path(self.schema) if is_class else None,
            "deadline": None if self.timeout is None else now + timedelta(seconds=self.timeout),
            "metadata": self.metadata,
        }

    def arrived(self, wait: OpenWait, execution: Execution) -> Arrival | None:
        """See `suspension.Waiting`. An answer that came before the deadline counts, whenever it is looked at."""
        while (answer := execution.inbox.answer(wait.key)) is not None:
            facts = {"answered_by": answer.by, "answered_at": answer.at.isoformat(), "via": answer.via}
            if self.adapter is None:
                return Arrival(None, metadata=facts)
            try:
                return Arrival(self.adapter.validate_python(answer.value), metadata=facts)
            except ValidationError as error:
                self._refuse(answer, describe(error), execution)
        if is_past(wait.deadline):
            if self.default is not _RAISE:
                return Arrival(self.default, metadata={"timed_out": True})
            return Arrival(error=WaitTimedOut(wait.display, f"{wait.deadline:%Y-%m-%d %H:%M:%S} UTC"))
        return None

    def give_back(self, arrival: Arrival, execution: Execution) -> None:
        """See `suspension.Waiting`: it is there for the next look all the same."""

    def suspends(self, wait: OpenWait, waited: float, execution: Execution) -> bool:
        """See `suspension.Waiting`."""
        return grace_passed(waited, self.own_grace, execution)

    def _refuse(self, answer: Answer, reason: str, execution: Execution) -> None:
        refusal = RefusedAnswer(
            nonce=answer.nonce,
            run_id=answer.run_id,
            wait=answer.wait,
            number=answer.number,
            reason=reason,
            at=datetime.now(UTC),
        )
        put_refusal(execution.journal, refusal)
        execution.inbox.note_refusal(refusal)
        execution.answer_refused(refusal)


def describe(error: ValidationError) -> str:
    """What a schema has against a value, in a line."""
    parts = []
    for problem in error.errors(include_url=False)[:5]:
        where = ".".join(str(part) for part in problem["loc"])
        parts.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    return "; ".join(parts)
