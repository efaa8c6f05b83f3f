"""Forks on a real ZenML: what is reused, what runs, what ZenML shows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from zenml.client import Client

from kitaru_zenml import replay
from kitaru_zenml.errors import AmbiguousStep, InvalidInput, InvalidOverride, StepNotFound
from kitaru_zenml.journal.verify import verify
from kitaru_zenml.lineage.compare import compare
from kitaru_zenml.runs import find_run, open_journal
from tests import flows_of_forks as flows

RAN = flows.RAN


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    RAN.clear()


def started(flow: Any, *arguments: Any) -> str:
    run = flow.run(*arguments)
    RAN.clear()
    return str(run.id)


def steps_of(run_id: str) -> dict[str, Any]:
    return {s.name: s for s in Client().list_run_steps(pipeline_run_id=run_id, size=200, hydrate=True).items}


def assert_whole(run_id: str) -> None:
    journal = open_journal(find_run(run_id))
    found = verify(journal)
    assert found.ok, found.problems
    snapshot = journal.load()
    step_runs = Client().list_run_steps(pipeline_run_id=run_id, size=500, hydrate=True).items
    assert compare(snapshot.records, step_runs, snapshot.reused, snapshot.untaken) == []


@pytest.fixture(scope="module")
def origin() -> str:
    return str(flows.support.run(3).id)


def test_an_override_is_taken_and_what_follows_runs(origin: str) -> None:
    fork = flows.support.replay(origin, overrides={"judge#0": {"kind": "reject"}}, label="it was no refund")
    assert fork.result() == "did reject, signed by ann"
    assert RAN == ["act reject", "sign"]
    assert fork.leg is not None and (fork.leg.replayed, fork.leg.ran, fork.leg.vanished) == (4, 2, ())
    assert_whole(fork.id)
    assert find_run(origin).status.value == "completed"
    assert_whole(origin)


def test_zenml_shows_origin_cached_steps_and_a_manual_version(origin: str) -> None:
    fork = flows.support.replay(origin, overrides={"judge#0": flows.Verdict(kind="reject")}, label="why not")
    run = fork.run
    assert run.original_run is not None and str(run.original_run.id) == origin
    before, after = steps_of(origin), steps_of(fork.id)
    assert sorted(after) == sorted(before) == ["act#0", "judge#0", "read#0", "read#1", "read#2", "sign#0"]
    for name in ("read#0", "read#1", "read#2"):
        assert after[name].status.value == "cached"
        assert after[name].original_step_run_id == before[name].id
        assert after[name].outputs["output"][0].id == before[name].outputs["output"][0].id
    overridden, was = after["judge#0"].outputs["output"][0], before["judge#0"].outputs["output"][0]
    assert overridden.save_type.value == "manual" and overridden.artifact.id == was.artifact.id and overridden.id != was.id
    version = Client().get_artifact_version(overridden.id)
    said = version.run_metadata["override"]
    assert said["why"] == "why not" and said["by"] and said["at"] and said["of"] == origin
    assert version.load() == flows.Verdict(kind="reject")
    assert after["act#0"].status.value == "completed"
    assert [v.id for v in after["act#0"].inputs["verdict"]] == [overridden.id]


def test_a_fork_copies_no_bytes(tmp_path: Any) -> None:
    origin = started(flows.with_large, 1_000_000)
    fork = flows.with_large.replay(origin, from_="length#1")
    assert RAN == ["length"] and fork.result() == 1_000_001
    store = open_journal(find_run(origin)).store
    sizes = [len(store.get(name)) for name in store.list(f"kitaru/{fork.id}/")]
    sizes += [len(store.get(name)) for name in store.list(f"kitaru/artifacts/{fork.id}/")]
    assert sum(sizes) < 30_000
    assert_whole(fork.id)


def test_from_a_step_runs_it_and_what_follows(origin: str) -> None:
    fork = flows.support.replay(origin, from_="judge")
    assert RAN == ["judge", "act refund", "sign"] and fork.result() == "did refund, signed by ann"
    assert_whole(fork.id)


def test_inputs_alone_run_all_anew_or_only_what_changes(origin: str) -> None:
    assert flows.support.replay(origin, inputs={"name": "bob"}).result() == "did refund, signed by bob"
    assert len(RAN) == 6
    RAN.clear()
    fork = flows.support.replay(origin, inputs={"name": "bob"}, reuse="unchanged")
    assert fork.result() == "did refund, signed by bob" and RAN == ["sign"]
    assert sorted(steps_of(fork.id)) == ["act#0", "judge#0", "read#0", "read#1", "read#2", "sign#0"]
    assert_whole(fork.id)


def test_unchanged_reuses_later_steps_with_the_same_inputs(origin: str) -> None:
    fork = flows.support.replay(origin, overrides={"judge#0": {"kind": "reject"}}, reuse="unchanged")
    assert RAN == ["act reject"] and fork.result() == "did reject, signed by ann"
    statuses = {name: step.status.value for name, step in steps_of(fork.id).items()}
    assert statuses["sign#0"] == "cached" and statuses["act#0"] == "completed"
    assert_whole(fork.id)


def test_a_changed_call_keeps_the_number_of_the_one_it_replaces() -> None:
    origin = started(flows.mapped, ["a", "b", "c"])
    names = {s.display: s for s in open_journal(find_run(origin)).load().records.values()}
    fork = flows.mapped.replay(origin, inputs={"words": ["a", "x", "c"]}, reuse="unchanged")
    assert sorted(RAN) == ["look x", "merge"] and fork.result() == "a found; x found; c found"
    shown = steps_of(fork.id)
    assert sorted(shown) == ["look#0", "look#1", "look#2", "merge#0"]
    (changed,) = [name for name, step in shown.items() if name.startswith("look") and step.status.value == "completed"]
    assert names[changed].turn == ("~1", 0)
    assert_whole(fork.id)


def test_forks_of_forks_reach_the_run_that_holds_a_record(origin: str) -> None:
    first = flows.support.replay(origin, overrides={"judge#0": {"kind": "reject"}})
    RAN.clear()
    second = flows.support.replay(first.id, from_="sign#0", inputs={"name": "eve"})
    assert RAN == ["sign"] and second.result() == "did reject, signed by eve"
    fork = open_journal(second.run).fork()
    assert fork is not None and fork.origin == first.id
    assert {run: len(keys) for run, keys in fork.reused.items()} == {origin: 3, first.id: 2}
    after, before = steps_of(second.id), steps_of(origin)
    assert after["read#1"].original_step_run_id == before["read#1"].id
    assert after["judge#0"].original_step_run_id == steps_of(first.id)["judge#0"].id
    assert_whole(second.id)
    third = flows.support.replay(second.id, overrides={"act#0": "did nothing"})
    assert third.result() == "did nothing, signed by eve"
    assert_whole(third.id)


def test_an_override_inside_a_step_runs_that_step_again_around_it() -> None:
    origin = started(flows.nested, ["ants", "bees"])
    fork = flows.nested.replay(origin, overrides={"research#1/look#0": "nothing"})
    assert RAN == ["research bees", "look bees 1"]
    assert fork.result() == ["ants 0 found and ants 1 found", "nothing and bees 1 found"]
    statuses = Counter(step.status.value for step in steps_of(fork.id).values())
    assert statuses == {"cached": 3, "completed": 3}
    assert_whole(fork.id)


def test_unchanged_reuses_siblings_inside_the_step_around_an_override() -> None:
    origin = started(flows.nested, ["ants", "bees"])
    fork = flows.nested.replay(origin, overrides={"research#0/look#0": "nothing"}, reuse="unchanged")
    assert RAN == ["research ants"]
    assert fork.result() == ["nothing and ants 1 found", "bees 0 found and bees 1 found"]
    assert_whole(fork.id)


def test_concurrent_steps_are_cut_by_the_order_in_which_they_finished() -> None:
    origin = started(flows.together, ["a", "b", "c"])
    fork = flows.together.replay(origin, from_="merge#0")
    assert RAN == ["merge"] and fork.result() == "answer to a; answer to b; answer to c"
    assert_whole(fork.id)
    RAN.clear()
    fork = flows.together.replay(origin, overrides={"ask#1": "no answer"}, reuse="unchanged")
    assert RAN == ["merge"] and fork.result() == "answer to a; no answer; answer to c"
    assert_whole(fork.id)
    RAN.clear()
    fork = flows.together.replay(origin, overrides={"ask#1": "no answer"})  # they all began before any was finished
    assert sorted(RAN) == ["ask a", "ask c", "merge"]
    assert_whole(fork.id)


def test_a_keyed_step_with_other_inputs_runs_anew_under_its_key() -> None:
    origin = started(flows.with_tools, 1)
    fork = flows.with_tools.replay(origin, overrides={"judge#0": {"kind": "reject"}}, reuse="unchanged")
    assert RAN == ["refund {'kind': 'reject'}"]
    assert "('kind', 'reject')" in fork.result()
    statuses = {name: step.status.value for name, step in steps_of(fork.id).items()}
    assert statuses["refund[call_1]"] == "completed" and statuses["mail[call_2]"] == "cached"
    assert_whole(fork.id)


def test_an_overridden_step_is_taken_though_its_inputs_changed_too() -> None:
    origin = started(flows.with_tools, 1)
    fork = flows.with_tools.replay(origin, overrides={"judge#0": {"kind": "reject"}, "refund[call_1]": "no refund "})
    assert fork.result().startswith("no refund mail done")
    RAN.clear()
    fork = flows.support.replay(started(flows.support, 2), overrides={"judge#0": {"kind": "none"}, "act#0": "did what I say"})
    assert RAN == ["sign"] and fork.result() == "did what I say, signed by ann"
    assert_whole(fork.id)


def test_a_failed_run_goes_on_in_a_fork_with_the_failed_steps_outcome() -> None:
    with pytest.raises(ConnectionError) as failed:
        flows.breaking.run(1)
    run_id = failed.value.__notes__[0].split()[1]
    RAN.clear()
    assert flows.breaking.replay(run_id, overrides={"broken#0": 41}).result() == 42
    assert RAN == []
    with pytest.raises(ConnectionError) as failed:
        flows.breaking.replay(run_id, from_="broken#0")
    assert RAN == ["broken"]
    fork_id = failed.value.__notes__[0].split()[1]
    RAN.clear()
    with pytest.raises(ConnectionError):
        flows.breaking.resume(fork_id)
    assert RAN == ["broken"]
    assert_whole(fork_id)


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        ({"judge#0": {"score": 1}}, InvalidOverride, "kind: Field required"),
        ({"judge#0": 3}, InvalidOverride, "Verdict"),
        ({"act#0": 3}, InvalidOverride, "valid string"),
        ({"juge#0": "x"}, StepNotFound, "judge#0"),
        ({"read": "x"}, AmbiguousStep, "read#1"),
        ({"support#0": "x"}, StepNotFound, "support#0"),
    ],
)
def test_an_override_that_fits_nothing_is_refused_and_nothing_is_created(
    origin: str, overrides: dict[str, Any], error: type[Exception], said: str
) -> None:
    before = Client().list_pipeline_runs(size=1).total
    with pytest.raises(error, match=said):
        flows.support.replay(origin, overrides=overrides)
    assert Client().list_pipeline_runs(size=1).total == before and RAN == []


def test_inputs_that_the_flow_does_not_take_are_refused(origin: str) -> None:
    for inputs in ({"nme": "bob"}, {"pages": "many"}):
        with pytest.raises(InvalidInput, match="support"):
            flows.support.replay(origin, inputs=inputs)


def test_replay_from_a_program_finds_the_flow_by_the_run(origin: str) -> None:
    assert replay(origin[:12], from_="sign#0").result() == "did refund, signed by ann"
    assert RAN == ["sign"]
