"""The stored format. The files in `golden/` are the format: a change that cannot read them, or writes others, is a new version."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from kitaru_zenml.errors import CorruptRecord
from kitaru_zenml.journal import records as r

GOLDEN = Path(__file__).parent / "golden"
AT = dt.datetime(2026, 11, 24, 5, 0, tzinfo=dt.UTC)
RUN = "8a1d1c1e-0000-4000-8000-000000000001"
SCOPE = r.Scope(path="/audit@0123456789#.0", name="audit", ordinal=0, digest="0123456789", turn=("", 0))
FAILURE = r.Failure(type="builtins:ValueError", message="no", args=["no"], state={}, traceback="Traceback ...")
STORED: dict[str, r.Stored] = {
    "run": r.RunInfo(
        nonce="n1", run_id=RUN, flow="audit", source="examples.audit.flow.audit", inputs={"package": "zenml"}, code="c0de",
        artifact_store="/store", kitaru_version="0.1.0", created_at=AT,
    ),
    "step": r.StepRecord(
        nonce="n2", run_id=RUN, epoch=1, path="/audit@0123456789#.0/fetch@3fa2c1d09b#~0.0", name="fetch", ordinal=3, equal=0, number=4,
        began=2, digest="3fa2c1d09b", turn=("~0", 0), scopes=(SCOPE,), arguments={"url": "ab"}, inputs={"url": {"$outcome": "plan-1"}},
        known={"/url": "d1"}, outcome=r.JsonValue(data={"status": 200}), outcome_digest="d2",
        attempts=(r.Attempt(started_at=AT, ended_at=AT, failure=FAILURE),), after=("plan-1",), idempotency_key="k",
        usage=r.Usage(model="m", input_tokens=1, output_tokens=2, cost=0.5), metadata={"a": 1}, started_at=AT, ended_at=AT,
    ),
    "failed": r.StepRecord(
        nonce="n3", run_id=RUN, epoch=2, path="/refund[call_7]", name="refund", ordinal=0, key="call_7", kind="tool", generation=1,
        number=5, digest="ff", turn=("", 0), failure=FAILURE, at_most_once=True, started_at=AT, ended_at=AT,
    ),
    "started": r.StartedMarker(nonce="n4", run_id=RUN, epoch=1, scope=SCOPE, generation=0, started_at=AT),
    "fork": r.Fork(
        nonce="n9", run_id=RUN, origin="8a1d1c1e-0000-4000-8000-000000000000", reuse="unchanged", start="audit#0/fetch#3", cut=4,
        reused={"8a1d1c1e-0000-4000-8000-000000000000": {"plan-1": "h"}}, overridden={"fetch-1": "audit#0/fetch#3"},
        inputs={"package": "zenml"}, label="why", by="ann", at=AT,
    ),
    "fork_marker": r.ForkMarker(nonce="n10", run_id=RUN, fork="8a1d1c1e-0000-4000-8000-000000000002", at=AT),
    "deletion": r.Deletion(nonce="n11", run_id=RUN, at=AT, by="ann"),
    "lease": r.Lease(
        nonce="n5", run_id=RUN, epoch=1, holder=r.Holder(host="h", boot="b", pid=1, started=1.5), purpose="run", lapse_seconds=30,
        taken_at=AT,
    ),
    "retry": r.RetryEvent(nonce="n6", run_id=RUN, epoch=2, at=AT, reopened=(r.Reopened(path="/x[1]", generation=1),), on_drift="reuse"),
    "retire": r.RetireEvent(nonce="n7", run_id=RUN, epoch=2, at=AT, reopened=(r.Reopened(path="/x[1]", generation=1),), reason="drift"),
    "leg_closed": r.LegClosedEvent(
        nonce="n8", run_id=RUN, epoch=1, at=AT, status="failed", failure=FAILURE, failed_paths=("/x[1]",),
        in_flight=(r.InFlight(path="/y[1]", display="y[1]", started_at=AT),), suspended_on=("approve-1",), inbox=2,
        covers={"x-1": "h"}, previous_root="", root="r",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_the_stored_format_is_the_golden_one(name: str) -> None:
    golden = (GOLDEN / f"{name}.json").read_bytes()
    assert r.seal(STORED[name]) == golden, f"the format of {name} changed: read old objects too, and give it a new version"


@pytest.mark.parametrize("name", STORED)
def test_the_golden_object_reads_as_it_was(name: str) -> None:
    data, body = (GOLDEN / f"{name}.json").read_bytes(), STORED[name]
    read = r.unseal_event(data, name) if name in ("retry", "retire", "leg_closed") else r.unseal(type(body), data, name)
    assert read == body


def test_a_record_from_before_it_said_when_its_step_began_is_read() -> None:
    old = r.unseal(r.StepRecord, (GOLDEN / "step_without_began.json").read_bytes(), "x")
    assert old.began == -1 and old.number == 4


def test_an_unknown_field_of_a_later_version_is_ignored() -> None:
    text = STORED["lease"].model_dump_json()[:-1].encode() + b',"new":1}'
    import hashlib

    data = b'{"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'","body":' + text + b"}"
    assert r.unseal(r.Lease, data, "x") == STORED["lease"]


@pytest.mark.parametrize("cut", [0, 1, 10, 70, 90, -1])
def test_a_torn_object_is_named(cut: int) -> None:
    with pytest.raises(CorruptRecord, match=r"steps/x\.json"):
        r.unseal(r.StepRecord, r.seal(STORED["step"])[:cut], "kitaru/run/steps/x.json")


def test_any_flipped_byte_shows() -> None:
    data = r.seal(STORED["step"])
    for at in range(0, len(data), 7):
        with pytest.raises(CorruptRecord):
            r.unseal(r.StepRecord, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "x")


def test_a_large_value_is_spliced_in_as_if_it_had_been_written_out() -> None:
    whole = STORED["step"]
    assert isinstance(whole, r.StepRecord)
    marked = whole.model_copy(update={"outcome": r.JsonValue(data="5eed")})
    assert r.seal(marked, ("5eed", b'{"status":200}')) == r.seal(whole)


def test_a_record_key_is_flat_and_short_whatever_the_name() -> None:
    key = r.record_key("tool:refund/ö " * 30, "/a[b]", 0)
    assert "/" not in key and len(key) < 70 and key != r.record_key("tool:refund/ö " * 30, "/a[b]", 1)


def test_the_root_depends_on_every_record_and_on_the_root_before() -> None:
    root = r.chain_root("", {"a": "1", "b": "2"})
    assert root == r.chain_root("", {"b": "2", "a": "1"})
    assert (
        len(
            {
                root,
                r.chain_root("x", {"a": "1", "b": "2"}),
                r.chain_root("", {"a": "1", "b": "3"}),
                r.chain_root("", {"a": "1"}),
            }
        )
        == 4
    )
