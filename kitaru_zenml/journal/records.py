"""What the journal stores: frozen, versioned models and the envelope around them.

Every object is JSON, `{"sha256": <hash of body>, "body": {...}}`, so that a torn or edited object shows without knowing its
model. A body carries the nonce of who wrote it: a writer that finds its own bytes under a name knows that it won. Layout under
`kitaru/<run id>/` (the folder functions below are the only place that spells it):

    run.json             RunInfo       derived from the ZenML run
    fork.json            Fork          what a fork reuses of other runs; before its first leg
    forks/<run id>.json  ForkMarker    that fork needs this run's objects
    deleting.json        Deletion      the run is being deleted: its objects go, in any order
    steps/<key>.json     StepRecord    write-once outcome of a step; path "/" is the flow itself
    started/<key>.json   StartedMarker an at-most-once step has begun
    waits/<key>.json     OpenWait      what a call waits for; open until the record of the same key exists
    inbox/<key>.json     Answer, SentEvent, CancelRequest: what comes from outside, write-once under its idempotency key
    events/<n>.json      Event         numbered notes of the executing leg
    lease/<n>.json       Lease         who holds epoch n; lease/<n>.beat is overwritten by its holder alone
    blobs/<sha256>       bytes of a large value

An example record, as stored (see tests/journal/golden for one of each, which lock the format):

    {"sha256":"9c..","body":{"v":1,"nonce":"5f..","run_id":"8a..","epoch":1,"path":"/fetch@3fa2c1d09b#.0","name":"fetch",
     "ordinal":0,"generation":0,"number":4,"digest":"3fa2c1d09b..","turn":["",0],"inputs":{"url":"https://.."},
     "outcome":{"kind":"json","data":{"status":200}},"started_at":"2026-11-24T05:00:00Z", ...}}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kitaru_zenml.errors import CorruptRecord

FORMAT = 1


class Stored(BaseModel):
    """Base of the bodies: frozen, with the writer's nonce. Unknown fields of later versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants", ser_json_bytes="base64")

    v: int = FORMAT
    nonce: str
    run_id: str


# --- values --------------------------------------------------------------------------------------------------------------


class JsonValue(BaseModel):
    """A value inline, as the tagged JSON tree of `kitaru_zenml.codec`."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    kind: Literal["json"] = "json"
    data: Any


class BlobValue(BaseModel):
    """A value whose tagged JSON is in `blobs/<sha256>`, because it is larger than the inline limit."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["blob"] = "blob"
    sha256: str
    size: int


class MaterializedValue(BaseModel):
    """A value saved by its ZenML materializer in a folder of its own."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["materialized"] = "materialized"
    folder: str  # relative to the artifact store's root
    materializer: str  # import path, as ZenML's source
    data_type: str


class PickledValue(BaseModel):
    """A value pickled because the flow opted in; loading asks for the same opt-in."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["pickled"] = "pickled"
    sha256: str
    size: int
    data_type: str


Value = Annotated[JsonValue | BlobValue | MaterializedValue | PickledValue, Field(discriminator="kind")]


class Failure(BaseModel):
    """An exception as data. `type` is `module:qualified name`; `args` and `state` hold what of it is JSON-like."""

    model_config = ConfigDict(frozen=True)
    type: str
    message: str
    args: Any = None
    state: dict[str, Any] = {}
    traceback: str = ""


# --- steps ---------------------------------------------------------------------------------------------------------------


class Scope(BaseModel):
    """What identifies a step or a scope that encloses a record, also when the scope has no record itself."""

    model_config = ConfigDict(frozen=True)
    path: str
    name: str
    ordinal: int
    digest: str
    turn: tuple[str, int]
    key: str | None = None
    kind: str = "step"
    equal: int = 0  # the how-manieth of equal calls in its scope: what the idempotency key counts by

    @property
    def group(self) -> str:
        """What its rivals share: scope and name of a step told by its inputs, the whole path of a keyed one."""
        return self.path if self.key is not None else self.path.rsplit("@", 1)[0]


class Attempt(BaseModel):
    """A try of a step's body that failed and was retried."""

    model_config = ConfigDict(frozen=True)
    started_at: datetime
    ended_at: datetime
    failure: Failure


class Usage(BaseModel):
    """What a model call consumed. `cost` is in US dollars."""

    model_config = ConfigDict(frozen=True)
    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None


class StepRecord(Stored):
    """The outcome of a step: exactly one of `outcome` and `failure` is set."""

    epoch: int
    path: str
    name: str
    ordinal: int  # the how-manieth step of this name in its scope: `fetch#3` is name and ordinal
    key: str | None = None  # a keyed step, `refund[call_7]`
    equal: int = 0
    kind: str = "step"  # step, flow, or what an adapter says: model, tool, node, agent, ...
    generation: int = 0
    number: int  # place in the order of delivery
    began: int = -1  # the next number when the first attempt of the body began: what a fork cuts by; -1 if not known
    digest: str  # of the inputs, SHA-256
    turn: tuple[str, int]  # branch, and the how-manieth call of this name in it
    scopes: tuple[Scope, ...] = ()  # outermost first
    arguments: dict[str, str] = {}  # digest of each argument, shortened: what differs when inputs drift
    inputs: dict[str, Any] = {}  # references and remainders, see `kitaru_zenml.inputs`
    known: dict[str, str] = {}  # JSON pointer of a large input value -> its digest: what later records may refer to
    opaque: tuple[str, ...] = ()  # arguments that count by type name only
    drift: tuple[str, ...] = ()  # arguments that differed from an earlier record and were declared volatile or reused
    outcome: Value | None = None
    outcome_digest: str | None = None
    failure: Failure | None = None
    attempts: tuple[Attempt, ...] = ()
    after: tuple[str, ...] = ()  # keys of the records this one follows in its branch, or that an adapter links
    idempotency_key: str = ""
    at_most_once: bool = False
    usage: Usage | None = None
    metadata: dict[str, Any] = {}
    step_run: str | None = None  # an isolated step: the native ZenML step run that did it
    started_at: datetime
    ended_at: datetime

    @property
    def scope(self) -> Scope:
        """What identifies this step, as a scope for what is inside it."""
        return Scope(
            path=self.path, name=self.name, ordinal=self.ordinal, digest=self.digest, turn=self.turn, key=self.key, kind=self.kind,
            equal=self.equal,
        )  # fmt: skip

    @property
    def display(self) -> str:
        """The path for people, unique in the run: `audit#0/fetch#3`, `support#0/refund[call_7]`."""
        return display_path((*self.scopes, self.scope))

    @property
    def is_shown(self) -> bool:
        """Whether ZenML shows it as a step run: not the flow itself, nor an event that the flow took, of which there may be very many."""
        return self.path != "/" and self.kind != "event"

    @property
    def object_key(self) -> str:
        """The `<key>` of this record's objects."""
        return record_key(self.name, self.path, self.generation)


class StartedMarker(Stored):
    """An at-most-once step has begun; without a record its outcome is in doubt."""

    epoch: int
    scope: Scope  # of the step itself
    scopes: tuple[Scope, ...] = ()  # around it, outermost first
    generation: int
    started_at: datetime

    @property
    def display(self) -> str:
        """The step's path for people."""
        return display_path((*self.scopes, self.scope))


WaitKind = Literal["wait", "timer", "event", "join"]


class OpenWait(Stored):
    """What a call waits for, stored once before it begins to wait: question, deadline and runs are the same in every leg."""

    epoch: int
    kind: WaitKind
    scope: Scope  # of the waiting call itself
    scopes: tuple[Scope, ...] = ()  # around it, outermost first
    generation: int = 0
    question: str | None = None
    json_schema: dict[str, Any] | None = None  # of the answer; `None` takes no value, it only lets the run go on
    data_type: str | None = None  # `module:qualified name` of the schema, if it is a class that can be imported
    deadline: datetime | None = None
    event: str | None = None  # name of the awaited event
    runs: tuple[str, ...] = ()  # ids of the child runs that are joined
    metadata: dict[str, Any] = {}
    asked_at: datetime

    @property
    def key(self) -> str:
        """The `<key>` that its record will have, and its answers refer to."""
        return record_key(self.scope.name, self.scope.path, self.generation)

    @property
    def display(self) -> str:
        """The path for people, unique in the run: `approve#0`."""
        return display_path((*self.scopes, self.scope))


class Answer(Stored):
    """An answer to an open wait. `number` counts answers to one wait: one that does not fit its schema is refused, and the next counts."""

    type: Literal["answer"] = "answer"
    wait: str  # key of the `OpenWait`
    number: int = 0
    value: Any = None  # plain JSON, as the person gave it
    by: str = ""
    via: str = ""  # cli, client, zenml
    at: datetime


class RefusedAnswer(Stored):
    """Said by the run of an answer that its schema does not take, so that the wait stays open."""

    type: Literal["refused"] = "refused"
    wait: str
    number: int
    reason: str
    at: datetime


class SentEvent(Stored):
    """Something sent to a run by name. Events of a name are taken in the order of `sent_at`, then of their keys."""

    type: Literal["event"] = "event"
    name: str
    idempotency_key: str
    payload: Any = None  # plain JSON
    sent_at: int  # nanoseconds since the epoch, by the sender's clock
    by: str = ""


class CancelRequest(Stored):
    """Somebody wants the run to stop at its next boundary."""

    type: Literal["cancel"] = "cancel"
    reason: str = ""
    keep_children: bool = False
    by: str = ""
    at: datetime


InboxItem = Annotated[Answer | RefusedAnswer | SentEvent | CancelRequest, Field(discriminator="type")]
INBOX_ITEM: TypeAdapter[Answer | RefusedAnswer | SentEvent | CancelRequest] = TypeAdapter(InboxItem)


def display_path(scopes: Sequence[Scope]) -> str:
    """The path for people of the innermost of some scopes."""
    return "/".join(display_name(s.name, s.ordinal, s.key) for s in scopes)


def display_name(name: str, ordinal: int, key: str | None) -> str:
    """`refund[call_7]` for a keyed step, `fetch#3` for any other."""
    return f"{name}[{key}]" if key is not None else f"{name}#{ordinal}"


# --- the run, its leases, its events -------------------------------------------------------------------------------------


class RunInfo(Stored):
    """What the run executes, derived from the ZenML run so that any leg may create it."""

    flow: str
    source: str  # import path of the flow
    source_root: str = ""  # the folder it was imported from, for a resume on the same machine
    inputs: dict[str, Any] = {}
    code: str = ""  # digest of the source file of the flow when the run began
    artifact_store: str = ""
    parent: str | None = None  # id of the run whose step started this one
    kitaru_version: str = ""
    created_at: datetime


class Reused(NamedTuple):
    """A record that a fork reuses: the run whose record it is, and the record's hash."""

    run_id: str
    sha256: str


class Fork(Stored):
    """What a new run reuses of others. Flat: a fork of a fork names the run that holds a record, however far away."""

    origin: str  # the run it is a replay of
    reuse: Literal["before", "unchanged"] = "before"
    start: str | None = None  # the step it runs from, for people
    cut: int = 0  # records of the origin with a lower number finished before the cut began
    reused: dict[str, dict[str, str]] = {}  # run that holds the record -> key -> the record's hash
    overridden: dict[str, str] = {}  # key -> the step, for people
    inputs: dict[str, Any] = {}  # the flow's arguments that differ from the origin's, as given
    label: str | None = None
    by: str = ""
    at: datetime

    def each_reused(self) -> Iterator[tuple[str, Reused]]:
        """Key, holder and hash of each reused record."""
        for run_id, records in self.reused.items():
            for key, sha256 in records.items():
                yield key, Reused(run_id, sha256)

    @property
    def needs(self) -> tuple[str, ...]:
        """The runs that must not be deleted before this one."""
        return tuple(dict.fromkeys((self.origin, *self.reused)))


class ForkMarker(Stored):
    """In the journal of a run that a fork needs: which fork. Stored before the fork's own `fork.json`."""

    fork: str
    at: datetime


class Deletion(Stored):
    """The run is being deleted. The first object of a deletion and the last to go, so that a second attempt finds what is left."""

    at: datetime
    by: str = ""


class Holder(BaseModel):
    """A process, named so that another one can tell whether it is gone."""

    model_config = ConfigDict(frozen=True)
    host: str
    boot: str  # boot id and process namespace: pids compare only within it
    pid: int
    started: float  # of the process, seconds since the epoch

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease(Stored):
    """Epoch `epoch` of the run belongs to `holder`."""

    epoch: int
    holder: Holder
    purpose: str  # run, resume, settle
    lapse_seconds: float
    taken_at: datetime


class InFlight(BaseModel):
    """A step whose body is executing."""

    model_config = ConfigDict(frozen=True)
    path: str
    display: str
    kind: str = "step"
    started_at: datetime


class Beat(BaseModel):
    """Overwritten by the holder of an epoch alone: alive (`count` grows), or released."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    epoch: int
    count: int
    at: datetime
    released: bool = False
    in_flight: tuple[InFlight, ...] = ()


class Reopened(BaseModel):
    """A path whose next generation is open: its earlier record no longer answers."""

    model_config = ConfigDict(frozen=True)
    path: str
    generation: int


class RetryEvent(Stored):
    """A person resumes: failed steps are to run again; `reopened` names the generation that is open now."""

    type: Literal["retry"] = "retry"
    epoch: int
    at: datetime
    reopened: tuple[Reopened, ...]
    on_drift: Literal["raise", "reuse", "rerun"] | None = None  # what the leg that follows does when inputs drifted


class RetireEvent(Stored):
    """Records that no longer answer any call, because their inputs drifted and a person chose to run the call anew."""

    type: Literal["retire"] = "retire"
    epoch: int
    at: datetime
    reopened: tuple[Reopened, ...]
    reason: str


class LegClosedEvent(Stored):
    """A leg ended in order. `covers` maps each record not covered before to its hash; `root` chains on the previous root."""

    type: Literal["leg_closed"] = "leg_closed"
    epoch: int
    at: datetime
    status: Literal["completed", "failed", "paused", "stopped"]
    failure: Failure | None = None
    failed_paths: tuple[str, ...] = ()  # recorded failures on the chain of the exception that ended the run
    in_flight: tuple[InFlight, ...] = ()
    suspended_on: tuple[str, ...] = ()  # keys of the waits of a leg that paused
    inbox: int = 0  # objects of the inbox that each of them had looked at: more is news
    covers: dict[str, str]
    previous_root: str
    root: str


Event = Annotated[RetryEvent | RetireEvent | LegClosedEvent, Field(discriminator="type")]
EVENT: TypeAdapter[RetryEvent | RetireEvent | LegClosedEvent] = TypeAdapter(Event)


def chain_root(previous: str, covers: dict[str, str]) -> str:
    """The root over what a leg covers: a hash over the previous root and the sorted (key, hash) lines."""
    lines = "".join(f"{key} {covers[key]}\n" for key in sorted(covers))
    return hashlib.sha256(f"{previous}\n{lines}".encode()).hexdigest()


# --- names of objects ----------------------------------------------------------------------------------------------------


def run_folder(run_id: str) -> str:
    """The folder of a run's journal, relative to the artifact store's root."""
    return f"kitaru/{run_id}/"


def artifact_folder(run_id: str, key: str) -> str:
    """Where the ZenML artifact version of a record points; never holds the record, because ZenML deletes it with the version."""
    return f"kitaru/artifacts/{run_id}/{key}"


def record_key(name: str, path: str, generation: int) -> str:
    """Flat object key of a record: readable slug of the name and a digest of path and generation."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:40].strip(".-") or "step"
    return f"{slug}-{hashlib.sha256(f'{path}|{generation}'.encode()).hexdigest()[:20]}"


def step_name(run_id: str, key: str) -> str:
    """Object name of a step's record."""
    return f"kitaru/{run_id}/steps/{key}.json"


def started_name(run_id: str, key: str) -> str:
    """Object name of an at-most-once marker."""
    return f"kitaru/{run_id}/started/{key}.json"


def fork_name(run_id: str) -> str:
    """Object name of what a fork reuses."""
    return f"kitaru/{run_id}/fork.json"


def marker_folder(run_id: str) -> str:
    """Where the markers of the forks that need a run lie."""
    return f"kitaru/{run_id}/forks/"


def marker_name(run_id: str, fork: str) -> str:
    """Object name of the marker that a fork needs a run."""
    return f"{marker_folder(run_id)}{fork}.json"


def deletion_name(run_id: str) -> str:
    """Object name of the note that a run is being deleted."""
    return f"kitaru/{run_id}/deleting.json"


def wait_name(run_id: str, key: str) -> str:
    """Object name of an open wait."""
    return f"kitaru/{run_id}/waits/{key}.json"


def answer_name(run_id: str, wait: str, number: int) -> str:
    """Object name of the n-th answer to a wait: a register, so that two people cannot both answer."""
    return f"kitaru/{run_id}/inbox/answer-{wait}-{number}.json"


def refused_name(run_id: str, wait: str, number: int) -> str:
    """Object name of the refusal of an answer."""
    return f"kitaru/{run_id}/inbox/refused-{wait}-{number}.json"


def sent_event_name(run_id: str, name: str, idempotency_key: str) -> str:
    """Object name of a sent event: the same for the same idempotency key, so that it is sent once."""
    digest = hashlib.sha256(f"{name}|{idempotency_key}".encode()).hexdigest()[:32]
    return f"kitaru/{run_id}/inbox/event-{digest}.json"


def cancel_name(run_id: str) -> str:
    """Object name of the request to cancel the run."""
    return f"kitaru/{run_id}/inbox/cancel.json"


DUE_FOLDER = "kitaru/_due/"


def due_name(at: datetime, run_id: str) -> str:
    """Object name of a hint that somebody should look at a run at a time; a listing is in order of time."""
    return f"{DUE_FOLDER}{at.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}-{run_id}"


def event_name(run_id: str, number: int) -> str:
    """Object name of an event; zero-padded so that a listing is in order."""
    return f"kitaru/{run_id}/events/{number:08d}.json"


def lease_name(run_id: str, epoch: int) -> str:
    """Object name of the lease of an epoch."""
    return f"kitaru/{run_id}/lease/{epoch:06d}.json"


def beat_name(run_id: str, epoch: int) -> str:
    """Object name of the heartbeat of an epoch."""
    return f"kitaru/{run_id}/lease/{epoch:06d}.beat"


def blob_name(run_id: str, sha256: str) -> str:
    """Object name of a large value."""
    return f"kitaru/{run_id}/blobs/{sha256}"


# --- the envelope --------------------------------------------------------------------------------------------------------

_HEAD = b'{"sha256":"'
_MIDDLE = b'","body":'
_BODY_AT = len(_HEAD) + 64 + len(_MIDDLE)

S = TypeVar("S", bound=Stored)


def seal(body: Stored, splice: tuple[str, bytes] | None = None) -> bytes:
    """The bytes to store for a body.

    Args:
        body: The body.
        splice: A string that stands in the body for a large value, and the value's JSON: it is not written out a second time.
    """
    text = body.model_dump_json().encode()
    if splice is not None:
        head, _, tail = text.partition(b'"%s"' % splice[0].encode())
        text = b"".join((head, splice[1], tail))
    return _HEAD + hashlib.sha256(text).hexdigest().encode() + _MIDDLE + text + b"}"


def sealed_hash(data: bytes) -> str:
    """The hash that an object states about its own body."""
    return data[len(_HEAD) : len(_HEAD) + 64].decode("ascii", "replace")


def unsealed_body(data: bytes, name: str) -> bytes:
    """The body's bytes, checked against the envelope's hash.

    Raises:
        CorruptRecord: If the object is torn, edited or not an envelope.
    """
    if not data.startswith(_HEAD) or data[len(_HEAD) + 64 : _BODY_AT] != _MIDDLE or not data.endswith(b"}"):
        raise CorruptRecord(name, "it is truncated or not an object of this journal")
    body = data[_BODY_AT:-1]
    if hashlib.sha256(body).hexdigest() != sealed_hash(data):
        raise CorruptRecord(name, "its content does not match its own hash")
    return body


def unseal(model: type[S], data: bytes, name: str) -> S:
    """The body of an object, checked.

    Raises:
        CorruptRecord: If the hash does not fit or the body is not of this model.
    """
    body = unsealed_body(data, name)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise CorruptRecord(name, f"it is not a {model.__name__}: {error.errors()[0]['msg']}") from error


def unseal_inbox_item(data: bytes, name: str) -> Answer | RefusedAnswer | SentEvent | CancelRequest:
    """What came from outside, checked; see `unseal`."""
    body = unsealed_body(data, name)
    try:
        return INBOX_ITEM.validate_json(body)
    except ValidationError as error:
        raise CorruptRecord(name, f"it is not an item of the inbox: {error.errors()[0]['msg']}") from error


def unseal_event(data: bytes, name: str) -> RetryEvent | RetireEvent | LegClosedEvent:
    """An event, checked; see `unseal`."""
    body = unsealed_body(data, name)
    try:
        return EVENT.validate_json(body)
    except ValidationError as error:
        raise CorruptRecord(name, f"it is not an event: {error.errors()[0]['msg']}") from error
