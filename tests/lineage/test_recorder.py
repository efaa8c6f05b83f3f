"""The recorder against a real ZenML: what it shows, and that each record is there once whatever was cut short."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.zen_stores.sql_zen_store import SqlZenStore

from kitaru_zenml.journal.records import Attempt, JsonValue, Scope, Usage, step_name
from kitaru_zenml.lineage.recorder import Recorder
from kitaru_zenml.lineage.registration import Places, Registration
from kitaru_zenml.lineage.translate import Place
from tests.lineage.conftest import EPOCH, Scene, boom, output_of


def naive(moment: Any) -> Any:
    return moment.replace(tzinfo=None)


def test_a_step_is_shown_with_its_times_parameters_and_metadata(scene: Scene, recorder: Recorder) -> None:
    usage = Usage(model="m", input_tokens=3, output_tokens=4, cost=0.1)
    key = scene.record("ask", kind="model", inputs={"city": "Ulm"}, usage=usage)
    drained = recorder.register_now([key])
    assert (drained.registered, drained.pending, drained.error) == (1, 0, None)
    [step] = scene.versions()
    assert step.name == "ask#0"
    assert step.status == ExecutionStatus.COMPLETED
    assert naive(step.start_time) == naive(EPOCH)
    assert naive(step.end_time) == naive(EPOCH + timedelta(milliseconds=500))
    assert step.config.parameters == {"city": "Ulm"}
    assert step.type == "llm_call"
    assert step.run_metadata["kitaru"] == {"usage": {"model": "m", "input_tokens": 3, "output_tokens": 4, "cost": 0.1}}
    mark = step.config.extra["kitaru"]
    assert (mark["path"], mark["key"], mark["number"], mark["kind"]) == ("/ask@abc#.0", key, 0, "model")
    assert len(mark["record"]) == 64
    page = output_of(step).visualize
    assert page is not None


def test_an_input_that_is_an_earlier_output_is_an_edge(scene: Scene, recorder: Recorder) -> None:
    first, second = scene.record(), scene.record()
    third = scene.record(
        "merge", inputs={"parts": [{"$outcome": first}, {"$outcome": second}], "one": {"$outcome": first}}, after=(second,)
    )
    for key in (first, second, third):
        recorder.add(key)
    assert recorder.drain(60).pending == 0
    steps = scene.steps()
    merge = steps["merge#2"]
    assert [version.id for version in merge.inputs["parts"]] == [
        steps["fetch#0"].outputs["output"][0].id,
        steps["fetch#1"].outputs["output"][0].id,
    ]
    assert merge.inputs["one"][0].id == steps["fetch#0"].outputs["output"][0].id
    assert set(merge.spec.upstream_steps) == {"fetch#0", "fetch#1"}
    assert set(merge.parent_step_ids) == {steps["fetch#0"].id, steps["fetch#1"].id}


def test_the_dashboards_graph_is_drawn_with_groups_failures_and_retries(scene: Scene, recorder: Recorder) -> None:
    scope = Scope(path="/agent@1#.0", name="agent", ordinal=0, digest="d", turn=("", 0))
    inner = scene.record("tool", kind="tool", key="call_1", scopes=(scope,), path="/agent@1#.0/tool[call_1]")
    agent = scene.record("agent", path="/agent@1#.0", ordinal=0, inputs={"x": {"$outcome": inner}})
    attempt = Attempt(started_at=EPOCH, ended_at=EPOCH + timedelta(seconds=1), failure=boom())
    failed = scene.record("pay", failure=boom(), attempts=(attempt,), inputs={"of": {"$outcome": agent}})
    recorder.register_now([inner, agent, failed])
    steps = scene.steps()
    group = steps["agent#0/tool[call_1]"].config.group
    assert group is not None
    assert group.name == "agent#0"
    assert steps["agent#0"].config.group is None
    zen: Any = Client().zen_store
    dag = zen.get_pipeline_run_dag(scene.run.id)
    names = {node.name for node in dag.nodes}
    assert {"agent#0/tool[call_1]", "agent#0", "pay#2"} <= names


def test_the_same_step_of_the_next_run_is_the_next_version_of_one_artifact(
    scene: Scene, another_run: Callable[[], Scene]
) -> None:
    second = another_run()
    versions = []
    for one, call in ((scene, "call_a1"), (second, "call_b2")):
        recorder = one.recorder()
        keys = [one.record("fetch"), one.record("refund", kind="tool", key=call), one.record("visit", key="paris")]
        recorder.register_now(keys)
        recorder.close()
        versions.append([output_of(step) for step in one.steps().values()])
    assert [v.name for v in versions[0]] == [v.name for v in versions[1]]
    assert [v.name.removeprefix(scene.flow) for v in versions[0]] == [
        "::fetch#0::output",
        "::refund#1::output",
        "::visit[paris]::output",
    ]
    assert [v.version for v in versions[0] + versions[1]] == ["1"] * 3 + ["2"] * 3


def test_retried_attempts_are_earlier_versions_of_the_step(scene: Scene, recorder: Recorder) -> None:
    attempts = tuple(
        Attempt(started_at=EPOCH + timedelta(seconds=n), ended_at=EPOCH + timedelta(seconds=n + 1), failure=boom(f"try {n}"))
        for n in range(2)
    )
    recorder.register_now([scene.record(attempts=attempts, ended_at=EPOCH + timedelta(seconds=5))])
    versions = scene.versions()
    assert [step.status for step in versions] == [ExecutionStatus.RETRIED, ExecutionStatus.RETRIED, ExecutionStatus.COMPLETED]
    assert [step.version for step in versions] == [1, 2, 3]
    assert versions[1].exception_info
    assert versions[1].exception_info.message == "try 1"
    assert naive(versions[2].start_time) == naive(EPOCH + timedelta(seconds=2))


def test_a_failed_step_keeps_its_exception_and_its_failure_as_an_artifact(scene: Scene, recorder: Recorder) -> None:
    recorder.register_now([scene.record(failure=boom())])
    [step] = scene.versions()
    assert step.status == ExecutionStatus.FAILED
    assert step.exception_info
    assert step.exception_info.source == "builtins.ValueError"
    assert output_of(step, "failure").load() == boom()


def test_a_later_generation_is_a_later_version_of_the_step(scene: Scene, recorder: Recorder) -> None:
    attempt = Attempt(started_at=EPOCH, ended_at=EPOCH, failure=boom())
    first = scene.record(path="/pay@1#.0", ordinal=0, failure=boom(), attempts=(attempt,))
    second = scene.record(path="/pay@1#.0", ordinal=0, failure=boom("again"), generation=1)
    third = scene.record(path="/pay@1#.0", ordinal=0, generation=2)
    recorder.register_now([first, second, third])
    versions = scene.versions()
    assert [(step.name, step.version, step.status.value) for step in versions] == [
        ("fetch#0", 1, "retried"),
        ("fetch#0", 2, "retried"),
        ("fetch#0", 3, "retried"),
        ("fetch#0", 4, "completed"),
    ]


def test_a_retired_success_keeps_its_name_and_the_new_call_gets_another(scene: Scene, recorder: Recorder) -> None:
    old = scene.record(path="/ask@1#.0", ordinal=0)
    new = scene.record(path="/ask@1#.0", ordinal=0, generation=1)
    recorder.register_now([old, new])
    assert [(name, step.status.value) for name, step in scene.steps().items()] == [
        ("fetch#0", "completed"),
        ("fetch#0~g1", "completed"),
    ]


def test_two_records_of_one_display_name_are_both_shown(scene: Scene, recorder: Recorder) -> None:
    keys = [scene.record(path=f"/fetch@{n}#.0", ordinal=0) for n in range(3)]
    assert recorder.register_now(keys).error is None
    assert len(scene.versions()) == len(scene.steps()) == 3


def test_long_names_are_shortened_and_stay_apart(scene: Scene, recorder: Recorder) -> None:
    scopes = tuple(Scope(path="/" + "x" * n, name="scope" * 18, ordinal=n, digest="d", turn=("", 0)) for n in range(5))
    recorder.register_now([scene.record(scopes=scopes), scene.record(scopes=scopes)])
    names = list(scene.steps())
    assert len(names) == 2
    assert all(len(name) <= 255 for name in names)


def test_reconcile_registers_what_is_missing_in_order_and_nothing_twice(scene: Scene) -> None:
    keys = [scene.record()]
    for _ in range(9):
        keys.append(scene.record(inputs={"previous": {"$outcome": keys[-1]}}))
    first = scene.recorder()
    first.register_now(keys[:4])
    first.close()
    for _ in range(2):
        again = scene.recorder()
        drained = again.reconcile(list(reversed(keys)))
        again.close()
        assert (drained.pending, drained.error) == (0, None)
    steps = scene.versions()
    assert [step.name for step in steps] == [f"fetch#{n}" for n in range(10)]
    assert steps[4].spec.upstream_steps == ["fetch#3"]


class Cut(BaseException):
    """Stands for a process that dies."""


@pytest.mark.parametrize("lost", ["request", "reply"])
@pytest.mark.parametrize("call", ["batch_create_artifact_versions", "create_run_step", "create_run_metadata"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_recorder_that_dies_at_any_call_leaves_nothing_twice(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, call: str, at: int, lost: str
) -> None:
    attempt = Attempt(started_at=EPOCH, ended_at=EPOCH, failure=boom())
    keys = [scene.record(usage=Usage()), scene.record(attempts=(attempt, attempt))]
    keys.append(scene.record(failure=boom(), path="/pay@1#.0", opaque=("client: x:Y",)))
    keys.append(scene.record(path="/pay@1#.0", generation=1, ordinal=2))
    registration = _registration(scene)
    _cut(monkeypatch, call, at, Cut(), lost)
    work, _ = registration.load(keys)
    try:
        while work:
            registration.register(work, 2)
    except Cut:
        pass
    monkeypatch.undo()

    again = scene.recorder()
    drained = again.reconcile(keys)
    again.close()
    assert (drained.pending, drained.error) == (0, None)
    _assert_all_there_once(scene)


@pytest.mark.parametrize("lost", ["request", "reply"])
@pytest.mark.parametrize("call", ["batch_create_artifact_versions", "create_run_step", "create_run_metadata"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_call_that_fails_is_repeated_without_a_trace(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, call: str, at: int, lost: str
) -> None:
    attempt = Attempt(started_at=EPOCH, ended_at=EPOCH, failure=boom())
    keys = [scene.record(usage=Usage()), scene.record(attempts=(attempt, attempt))]
    keys.append(scene.record(failure=boom(), path="/pay@1#.0", opaque=("client: x:Y",)))
    keys.append(scene.record(path="/pay@1#.0", generation=1, ordinal=2))
    _cut(monkeypatch, call, at, ConnectionError("gone"), lost)
    recorder = scene.recorder()
    drained = recorder.register_now(keys, 60)
    recorder.close()
    assert (drained.pending, drained.error) == (0, None)
    _assert_all_there_once(scene)


def _registration(scene: Scene) -> Registration:
    recorder = scene.recorder()
    return Registration(recorder._shape, scene.store, Client().zen_store)


def _cut(monkeypatch: pytest.MonkeyPatch, call: str, at: int, error: BaseException, lost: str) -> None:
    """Let the `at`-th call fail, before it did anything or after it did all."""
    real, count = getattr(SqlZenStore, call), iter(range(1_000_000))

    def failing(self: SqlZenStore, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name != "kitaru-recorder" and not isinstance(error, Cut):
            return real(self, *args, **kwargs)
        if next(count) != at:
            return real(self, *args, **kwargs)
        if lost == "reply":
            real(self, *args, **kwargs)
        raise error

    monkeypatch.setattr(SqlZenStore, call, failing)


def _assert_all_there_once(scene: Scene) -> None:
    found = [(step.name, step.version, step.status.value) for step in scene.versions()]
    assert sorted(found) == [
        ("fetch#0", 1, "completed"),
        ("fetch#1", 1, "retried"),
        ("fetch#1", 2, "retried"),
        ("fetch#1", 3, "completed"),
        ("fetch#2", 1, "retried"),
        ("fetch#2", 2, "completed"),
    ]
    ends = [step for step in scene.versions() if "attempt" not in step.config.extra["kitaru"]]
    assert [step.name for step in ends if "kitaru" in step.run_metadata] == ["fetch#0", "fetch#1", "fetch#2"]
    versions = [version for step in ends for outputs in step.outputs.values() for version in outputs]
    assert len({version.uri for version in versions}) == 4
    for version in versions:
        assert len(Client().list_artifact_versions(uri=version.uri).items) == 1


def test_while_zenml_is_down_adding_is_fast_and_nothing_is_lost(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    down = threading.Event()
    down.set()
    for call in ("batch_create_artifact_versions", "get_run"):
        real = getattr(SqlZenStore, call)

        def failing(self: SqlZenStore, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            if down.is_set():
                raise OperationalError("select", {}, Exception("no server"))
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(SqlZenStore, call, failing)
    recorder = scene.recorder()
    recorder.start()
    keys = [scene.record() for _ in range(20)]
    began = time.perf_counter()
    for key in keys:
        recorder.add(key)
    assert time.perf_counter() - began < 0.1
    drained = recorder.drain(1.0)
    assert (drained.registered, drained.pending) == (0, 20)
    assert "no server" in (drained.error or "")
    assert len(scene.said) == 1
    down.clear()
    drained = recorder.drain(30)
    recorder.close()
    assert (drained.registered, drained.pending, drained.error) == (20, 0, None)
    assert list(scene.steps()) == [f"fetch#{n}" for n in range(20)]


@pytest.mark.parametrize("status", [ExecutionStatus.FAILED, ExecutionStatus.STOPPING])
def test_steps_that_a_closed_run_refuses_stay_pending(scene: Scene, recorder: Recorder, status: ExecutionStatus) -> None:
    first, second = scene.record(), scene.record()
    recorder.register_now([first])
    scene.set_status(status)
    began = time.perf_counter()
    drained = recorder.register_now([second], 60)
    assert time.perf_counter() - began < 20
    assert drained.pending == 1
    assert drained.error
    if status == ExecutionStatus.FAILED:
        scene.set_status(ExecutionStatus.RESUMING)
        assert recorder.drain(30).pending == 0


def test_a_record_that_zenml_rejects_does_not_hold_up_the_others(
    scene: Scene, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [scene.record() for _ in range(6)]
    real_artifacts, real_step = SqlZenStore.batch_create_artifact_versions, SqlZenStore.create_run_step

    def artifacts(self: SqlZenStore, versions: Any) -> Any:
        if any("fetch#2" in version.artifact_name for version in versions):
            raise ValueError("no such thing")
        return real_artifacts(self, versions)

    def step(self: SqlZenStore, request: Any) -> Any:
        if request.name == "fetch#4":
            raise KeyError("nor this")
        return real_step(self, request)

    monkeypatch.setattr(SqlZenStore, "batch_create_artifact_versions", artifacts)
    monkeypatch.setattr(SqlZenStore, "create_run_step", step)
    drained = recorder.register_now(keys, 60)
    assert (drained.registered, drained.pending) == (4, 0)
    assert "2 given up" in (drained.error or "")
    assert list(scene.steps()) == ["fetch#0", "fetch#1", "fetch#3", "fetch#5"]
    assert len(scene.said) == 2


def test_a_lost_or_torn_record_is_reported_and_the_others_go_on(scene: Scene, recorder: Recorder) -> None:
    keys = [scene.record(), scene.record(), scene.record()]
    scene.store.overwrite(step_name(str(scene.run.id), keys[1]), b"torn")
    drained = recorder.register_now([keys[0], "gone-0123456789abcdef0123", keys[1], keys[2]], 60)
    assert (drained.registered, drained.pending) == (2, 0)
    assert any("gone-" in said for said in scene.said)
    assert any("corrupt" in said for said in scene.said)


def test_the_flows_own_record_is_no_step(scene: Scene, recorder: Recorder) -> None:
    root = scene.record("flow", path="/", kind="flow")
    assert recorder.register_now([root, scene.record()], 60).pending == 0
    assert list(scene.steps()) == ["fetch#1"]


def test_a_native_step_is_linked_and_not_made_again(scene: Scene, recorder: Recorder) -> None:
    recorder.register_now([scene.record()])
    native = scene.steps()["fetch#0"]
    heavy = scene.record("heavy", step_run=str(native.id))
    after = scene.record("use", inputs={"x": {"$outcome": heavy}})
    recorder.register_now([heavy, after])
    steps = scene.steps()
    assert list(steps) == ["fetch#0", "use#2"]
    assert steps["use#2"].inputs["x"][0].id == native.outputs["output"][0].id


def test_close_stops_at_once_while_zenml_is_down(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("down")

    monkeypatch.setattr(SqlZenStore, "batch_create_artifact_versions", failing)
    recorder = scene.recorder()
    recorder.start()
    recorder.add(scene.record())
    assert recorder.drain(0.2).pending == 1
    began = time.perf_counter()
    recorder.close()
    assert time.perf_counter() - began < 2
    assert recorder.drain(1).pending == 1


def test_a_small_value_of_any_tag_names_its_type(scene: Scene, recorder: Recorder) -> None:
    trees = [None, 1, "s", [1], {"$type": "tuple", "value": [1]}, {"$type": "datetime", "value": "2026-01-01T00:00:00"}]
    recorder.register_now([scene.record(outcome=JsonValue(data=tree)) for tree in trees])
    types = [output_of(step).data_type.attribute for step in scene.steps().values()]
    assert types == ["NoneType", "int", "str", "list", "tuple", "datetime"]
    assert output_of(scene.steps()["fetch#4"]).load() == (1,)


def test_places_are_small_and_exact() -> None:
    import tracemalloc
    from uuid import uuid4

    places = Places()
    tracemalloc.start()
    ids = [uuid4() for _ in range(2000)]
    before = tracemalloc.get_traced_memory()[0]
    for n, artifact in enumerate(ids):
        places.put(f"fetch-{n:020x}", Place(f"agent#0/fetch#{n}", artifact))
    per_step = (tracemalloc.get_traced_memory()[0] - before) / len(ids)
    tracemalloc.stop()
    assert per_step < 300
    assert places.get(f"fetch-{7:020x}") == Place("agent#0/fetch#7", ids[7])
    assert places.get("fetch-" + "f" * 20) is None
