"""Forks of random flows at random cuts, with crashes: nothing swapped, nothing reused that should not be, nothing run twice.

A leaf returns its inputs and a random number: a reused outcome is recognized, and so is one that came from another call.
"""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitaru_zenml.journal.journal import Journal, Snapshot, new_nonce
from kitaru_zenml.journal.records import Fork, JsonValue, StepRecord, fork_name, seal, step_name
from kitaru_zenml.selection import Reuse, select
from tests.simulation import Crash, MemoryStore, run_leg
from tests.test_identity_property import SHAPES, flow, latencies, run_to_the_end

AT = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)


def fork(
    objects: dict[str, bytes], origin: str, run_id: str, start: StepRecord | None, given: StepRecord | None, reuse: Reuse
) -> None:
    """What `kitaru_zenml.forks` stores, without ZenML."""
    snapshot = Journal(MemoryStore(objects), origin).load()
    idle = snapshot.not_asked_for()
    records = {r.object_key: r for r in snapshot.current().values() if r.object_key not in idle}
    selection = select(records, start, [given] if given else [], reuse)
    held: dict[str, dict[str, str]] = {}
    for key in selection.keys:
        of = snapshot.reused.get(key)
        held.setdefault(of.run_id if of else origin, {})[key] = of.sha256 if of else snapshot.hashes[key]
    overridden = {}
    if given is not None:
        overridden = {given.object_key: given.display}
        body = given.model_copy(update={"run_id": run_id, "epoch": 0, "inputs": {}, "known": {}, "metadata": {"override": {}}})
        objects[step_name(run_id, given.object_key)] = seal(body)
    manifest = Fork(
        nonce=new_nonce(),
        run_id=run_id,
        origin=origin,
        reuse=reuse,
        cut=selection.cut,
        reused=held,
        overridden=overridden,
        at=AT,
    )
    objects[fork_name(run_id)] = seal(manifest)


def run_fork(
    objects: dict[str, bytes], run_id: str, parameters: dict[str, Any], crashes: list[int], seed: int
) -> tuple[Any, Snapshot]:
    """Run a fork, crash, resume; checks that none of its own records was made twice."""
    for leg, crash_after in enumerate([*crashes, None]):
        latencies.seed(seed + leg)
        before = {n.rsplit("/", 1)[1].removesuffix(".json") for n in objects if n.startswith(f"kitaru/{run_id}/steps/")}
        store = MemoryStore(objects, crash_after=crash_after, seed=seed + leg)
        try:
            ended, execution = run_leg(store, flow, parameters, run_id=run_id)
        except Crash:
            continue
        assert ended.error is None, ended.error
        overridden = Journal(store, run_id).load().overridden.keys()
        assert not (before - overridden) & execution.engine.covers.keys(), "a finished step ran again"
        return ended.value, Journal(store, run_id).load()
    raise AssertionError("unreachable")


def pick(objects: dict[str, bytes], run_id: str, at: float) -> StepRecord:
    records = sorted(Journal(MemoryStore(objects), run_id).load().current().values(), key=lambda r: r.number)
    records = [r for r in records if r.path != "/"]
    return records[int(at * len(records))]


shapes = st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=2)
places = st.floats(0, 0.999)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes=shapes, at=places, again=places, crashes=st.lists(st.integers(0, 20), max_size=3), seed=st.integers(0, 10**6))
def test_a_fork_from_a_step_asks_for_all_that_was_finished_before(
    shapes: list[str], at: float, again: float, crashes: list[int], seed: int
) -> None:
    parameters = {"shapes": shapes}
    _, objects = run_to_the_end(flow, parameters, [], seed)
    origin, run_id = "run", "fork"
    for cut in (at, again):  # and a fork of the fork
        fork(objects, origin, run_id, pick(objects, origin, cut), None, "before")
        _, snapshot = run_fork(objects, run_id, parameters, crashes, seed + 7)
        assert snapshot.fork is not None
        assert not snapshot.untaken, [snapshot.records[key].display for key in snapshot.untaken]
        displays = [r.display for r in snapshot.current().values()]
        assert len(displays) == len(set(displays))
        origin, run_id = run_id, run_id + "s"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes=shapes, at=places, crashes=st.lists(st.integers(0, 20), max_size=3), seed=st.integers(0, 10**6))
def test_an_override_is_seen_downstream_and_what_does_not_depend_on_it_is_reused(
    shapes: list[str], at: float, crashes: list[int], seed: int
) -> None:
    parameters = {"shapes": shapes}
    was, objects = run_to_the_end(flow, parameters, [], seed)
    given = pick(objects, "run", at)
    tree = given.outcome.data if isinstance(given.outcome, JsonValue) else None
    other = JsonValue(data=[tree[0], 10**13])  # in the place of its random number
    fork(objects, "run", "fork", None, given.model_copy(update={"outcome": other, "outcome_digest": None}), "unchanged")
    result, snapshot = run_fork(objects, "fork", parameters, crashes, seed + 7)
    assert result != was and str(10**13) in str(result)
    own = [r for key, r in snapshot.records.items() if key not in snapshot.reused and r.path != "/"]
    assert {r.path for r in own} >= {given.path}


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes=shapes, seed=st.integers(0, 10**6))
def test_unchanged_without_a_change_runs_nothing(shapes: list[str], seed: int) -> None:
    parameters = {"shapes": shapes}
    was, objects = run_to_the_end(flow, parameters, [], seed)
    fork(objects, "run", "fork", None, None, "unchanged")
    result, snapshot = run_fork(objects, "fork", parameters, [], random.Random(seed).randrange(10**6))
    assert result == was and not snapshot.untaken
    assert [r.path for key, r in snapshot.records.items() if key not in snapshot.reused] == ["/"]
