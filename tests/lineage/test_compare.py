"""What `kitaru verify` says when the journal and ZenML disagree."""

from __future__ import annotations

from typing import Any

from kitaru_zenml.journal.records import Attempt
from kitaru_zenml.lineage.compare import compare
from kitaru_zenml.lineage.recorder import Recorder
from tests.lineage.conftest import EPOCH, Scene, boom
from tests.lineage.test_failure import records_of


def run_with_all_kinds(scene: Scene, recorder: Recorder) -> list[str]:
    attempt = Attempt(started_at=EPOCH, ended_at=EPOCH, failure=boom())
    keys = [
        scene.record("flow", path="/", kind="flow"),
        scene.record(),
        scene.record(attempts=(attempt,)),
        scene.record(path="/pay@1#.0", failure=boom()),
        scene.record(path="/pay@1#.0", generation=1, ordinal=3),
    ]
    assert recorder.register_now(keys, 60).error is None
    return keys


def test_a_recorded_run_and_its_journal_agree(scene: Scene, recorder: Recorder) -> None:
    keys = run_with_all_kinds(scene, recorder)
    assert compare(records_of(scene, keys), scene.versions()) == []


def test_each_way_to_differ_is_said(scene: Scene, recorder: Recorder) -> None:
    keys = run_with_all_kinds(scene, recorder)
    records = records_of(scene, keys)
    versions = scene.versions()

    def said(of: Any = records, versions: Any = versions) -> list[str]:
        return compare(of, versions)

    unknown = scene.record("new")
    assert said({**records, **records_of(scene, [unknown])}) == ["`new#5` is in the journal and not in ZenML."]
    assert said({key: record for key, record in records.items() if key != keys[1]}) == [
        "`fetch#1` version 1 is in ZenML and not in the journal."
    ]
    assert said(versions=[*versions, versions[0]])[0].startswith("`fetch#1` is in ZenML 2 times")
    attempts = [step for step in versions if "attempt" not in step.config.extra["kitaru"]]
    assert said(versions=attempts) == ["`fetch#2` was retried 1 times, of which ZenML has 0."]
    native = records[keys[1]].model_copy(update={"step_run": "00000000-0000-0000-0000-000000000000"})
    assert "which ZenML does not have" in said({**records, keys[1]: native})[0]
    elsewhere = records[keys[1]].model_copy(update={"run_id": "another"})
    assert "points at" in said({**records, keys[1]: elsewhere})[0]


def test_another_status_and_a_lost_artifact_are_said(scene: Scene, recorder: Recorder) -> None:
    keys = run_with_all_kinds(scene, recorder)
    records = records_of(scene, keys)
    records[keys[1]] = records[keys[1]].model_copy(update={"outcome": None, "failure": boom()})
    assert compare(records, scene.versions()) == [
        "`fetch#1` failed by the journal, and is completed in ZenML.",
        "`fetch#1` has no artifact version of its failure in ZenML.",
    ]
