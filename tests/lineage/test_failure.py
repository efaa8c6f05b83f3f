"""The failure artifact: built from the journal, registered once an epoch, readable by ZenML and without it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from zenml.client import Client
from zenml.enums import ExecutionStatus

from kitaru_zenml.journal.records import Failure, InFlight, Scope, StepRecord, lease_name, record_key, step_name, unseal
from kitaru_zenml.lineage.failure import FailureReport, build_report, load_failure, register_failure, report_view
from tests.lineage.conftest import EPOCH, Scene, boom
from tests.lineage.test_html import check


def records_of(scene: Scene, keys: list[str]) -> dict[str, StepRecord]:
    names = [step_name(str(scene.run.id), key) for key in keys]
    return {key: unseal(StepRecord, scene.store.get(name), name) for key, name in zip(keys, names, strict=True)}


def report_of(scene: Scene, records: dict[str, StepRecord], **fields: Any) -> FailureReport:
    values: dict[str, Any] = {"run_id": str(scene.run.id), "flow": scene.flow, "epoch": 1, "at": EPOCH, "ending": "raised"}
    return build_report(records=records, **{**values, **fields})


def register(scene: Scene, report: FailureReport) -> Any:
    component = Client().active_stack.artifact_store
    return register_failure(
        report, run=scene.run, store=scene.store, artifact_store_id=component.id, artifact_store_root=component.path
    )


def test_a_report_names_the_innermost_failing_step_and_how_to_go_on(scene: Scene) -> None:
    agent = Scope(path="/agent@1#.0", name="agent", ordinal=0, digest="d", turn=("", 0))
    keys = [scene.record() for _ in range(12)]
    inputs = {"amount": 3, "of": {"$outcome": keys[0]}}
    keys.append(scene.record("pay", path="/agent@1#.0/pay@2#.0", scopes=(agent,), ordinal=0, failure=boom(), inputs=inputs))
    keys.append(scene.record("agent", path="/agent@1#.0", ordinal=0, failure=boom("outer")))
    keys.append(scene.record("caught", failure=boom("caught")))
    in_flight = [InFlight(path="/slow@1#.0", display="slow#0", started_at=EPOCH)]
    report = report_of(
        scene, records_of(scene, keys), failure=boom("outer"), in_flight=in_flight,
        failed_paths={"/agent@1#.0", "/agent@1#.0/pay@2#.0"},
    )  # fmt: skip
    assert report.failing_step is not None
    assert report.failing_step.display == "agent#0/pay#0"
    assert report.failing_step.inputs == {"amount": 3, "of": "↑ output of fetch#0"}
    assert [step.display for step in report.last_finished] == [f"fetch#{n}" for n in range(11, 1, -1)]
    assert report.counts == {"finished": 12, "failed": 3, "in_flight": 1, "retried": 0}
    run = str(scene.run.id)
    assert [c.command for c in report.commands] == [
        f"kitaru resume {run}",
        f"kitaru show {run}",
        f"kitaru step {run} 'agent#0/pay#0'",
        f"kitaru replay {run} --from 'agent#0/pay#0'",
        f"kitaru replay {run} --override 'agent#0/pay#0=VALUE'",
    ]
    page = check(report_view(report))
    assert "slow#0" in page
    assert "agent#0/pay#0" in page


def test_a_failure_that_a_later_generation_made_good_is_not_the_failing_step(scene: Scene) -> None:
    first = scene.record(path="/pay@1#.0", failure=boom())
    second = scene.record(path="/pay@1#.0", generation=1, ordinal=0)
    report = report_of(scene, records_of(scene, [first, second]), ending="found dead", failed_paths={"/pay@1#.0"})
    assert report.failing_step is None
    assert report.counts["finished"] == 1
    assert "found dead" in check(report_view(report))


def test_inputs_that_cannot_be_read_do_not_prevent_the_report(scene: Scene) -> None:
    def lost(record: StepRecord) -> dict[str, Any]:
        raise KeyError("blob")

    key = scene.record(path="/pay@1#.0", failure=boom())
    report = report_of(scene, records_of(scene, [key]), failed_paths={"/pay@1#.0"}, inputs_of=lost)
    assert report.failing_step is not None
    assert "KeyError" in report.failing_step.inputs["(unreadable)"]


def test_a_large_input_is_named_by_its_size(scene: Scene) -> None:
    key = scene.record(path="/pay@1#.0", failure=boom(), inputs={"text": "x" * 200_000})
    report = report_of(scene, records_of(scene, [key]), failed_paths={"/pay@1#.0"})
    assert report.failing_step is not None
    assert "200,002 characters" in report.failing_step.inputs["text"]


def test_a_report_is_a_versioned_artifact_once_an_epoch(scene: Scene) -> None:
    key = scene.record(path="/pay@1#.0", failure=boom())
    report = report_of(scene, records_of(scene, [key]), failure=boom(), failed_paths={"/pay@1#.0"})
    scene.set_status(ExecutionStatus.FAILED)
    first = register(scene, report)
    assert register(scene, report.model_copy(update={"at": EPOCH + timedelta(hours=1)})) == first
    second = register(scene, report.model_copy(update={"epoch": 2}))

    version = Client().get_artifact_version(first)
    assert version.name == f"{scene.flow}.failure"
    assert version.version == "1"
    assert version.load() == report
    assert version.visualizations
    assert Client().get_artifact_version(second).version == "2"
    noted = Client().get_pipeline_run(scene.run.id).run_metadata["kitaru_failure"]
    assert noted == {"artifact_version": str(second), "epoch": 2}


def test_the_newest_report_is_found_without_zenml(scene: Scene) -> None:
    run = str(scene.run.id)
    assert load_failure(scene.store, run) is None
    for epoch in (1, 2, 3):
        scene.store.create(lease_name(run, epoch), b"{}")
    for epoch in (1, 2):
        register(scene, report_of(scene, {}, epoch=epoch, failure=Failure(type="a:B", message=f"{epoch}")))
    found = load_failure(scene.store, run)
    assert found is not None
    assert found.epoch == 2
    assert datetime.now(UTC) > found.at
    assert record_key("x", "/", 0)
