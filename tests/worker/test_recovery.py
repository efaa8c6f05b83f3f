"""What a worker continues on its own: answers, times, events, cancels, crashes."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunUpdate

from kitaru_zenml import client
from kitaru_zenml.conditions import pending
from kitaru_zenml.journal.due import leave_hint
from kitaru_zenml.journal.inbox import put_answer
from kitaru_zenml.journal.journal import new_nonce
from kitaru_zenml.journal.records import DUE_FOLDER, Answer, LegClosedEvent
from kitaru_zenml.journal.verify import verify
from kitaru_zenml.resumption import resume, settle
from kitaru_zenml.runs import find_run
from tests.worker import flows
from tests.worker.harness import ROOT, Worker, effects, epochs, journal, run_to_death, status, until


def test_an_answer_by_the_client_continues_the_run(worker: Worker, name: str) -> None:
    run = flows.asking.run(name).id
    assert status(run) == "paused"
    client.answer(run, "yes")
    worker.until_status(run, "completed")
    assert effects(name) == ["before", "after yes"] and epochs(run) == 2
    assert worker.said(f"run {run} continued: approve#0 was answered")


def test_an_answer_given_in_zenml_continues_the_run(worker: Worker, name: str) -> None:
    run = flows.asking_twice.run(name).id
    for wait, answer in (("first", "a"), ("second", "b")):
        condition = until(lambda wait=wait: (c := pending(run)) is not None and c.name == f"{wait}#0" and c)
        until(lambda: status(run) == "paused")
        Client().resolve_run_wait_condition(condition.id, result=answer)
    worker.until_status(run, "completed")
    assert effects(name) == ["got a"]


def test_a_timer_continues_the_run_when_it_is_due(worker: Worker, name: str) -> None:
    run = flows.sleeping.run(name, 1.5).id
    assert status(run) == "paused"
    worker.until_status(run, "completed")
    assert effects(name) == ["before", "after"] and worker.said(f"run {run} continued: sleep#0 is due")


def test_events_continue_the_run_each_once(worker: Worker, name: str) -> None:
    run = flows.listening.run(name, 3).id
    for order in ("a", "b", "c"):
        client.send_event(run, "orders", order, idempotency_key=order)
        client.send_event(run, "orders", order, idempotency_key=order)
        worker.until(lambda order=order: f"order {order}" in effects(name))
    worker.until_status(run, "completed")
    assert effects(name) == ["order a", "order b", "order c"]


def test_an_event_of_another_name_does_not_make_it_loop(worker: Worker, name: str) -> None:
    run = flows.listening.run(name, 1).id
    client.send_event(run, "other", 1)
    worker.until(lambda: len(journal(run).load().events) == 2 and status(run) == "paused")
    client.send_event(run, "orders", 2)
    worker.until_status(run, "completed")
    assert epochs(run) == 3


def test_a_parent_goes_on_when_its_child_has_ended(worker: Worker, name: str) -> None:
    run = flows.parenting.run(name).id
    assert status(run) == "paused"
    (join,) = journal(run).open_waits()
    client.answer(join.runs[0], "yes")
    worker.until_status(join.runs[0], "completed")
    worker.until_status(run, "completed")
    assert effects(name) == ["joined"] and effects(f"{name}.child") == ["before", "after yes"]


def test_a_suspended_run_is_cancelled(worker: Worker, name: str) -> None:
    run = flows.cancellable.run(name).id
    client.request_cancel(run, "no need")
    worker.until_status(run, "stopped")
    assert effects(name) == ["before", "undone no need"]


def test_a_killed_run_is_recovered(worker: Worker, name: str) -> None:
    run = run_to_death("killed", name, 4, 2)
    worker.until_status(run, "completed")
    assert effects(name) == [f"step {i}" for i in range(4)]
    assert verify(journal(run)).ok


def test_a_run_that_kills_every_process_is_given_up_with_its_failure_artifact(worker: Worker, name: str) -> None:
    run = run_to_death("deadly", name)
    worker.until(lambda: (c := journal(run).load().last_close) is not None and c.status == "failed")
    worker.until_status(run, "failed")
    assert effects(name) == ["before", "dies", "dies", "dies", "dies"], "the first leg made progress; three more did not"
    close = journal(run).load().last_close
    assert close is not None and close.status == "failed" and close.failure is not None
    assert "died 3 times in a row" in close.failure.message
    assert verify(journal(run)).ok
    shown = subprocess.run(
        [sys.executable, "-m", "kitaru_zenml.cli.main", "failure", run], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    assert "found dead" in shown, shown
    versions = Client().list_artifact_versions(artifact="deadly.failure")
    assert versions.total >= 1


def test_a_run_that_gets_on_between_kills_is_not_given_up(worker: Worker, name: str) -> None:
    run = run_to_death("stumbling", name, 4)
    worker.until_status(run, "completed", seconds=60)
    assert effects(name) == [f"step {i}" for i in range(4)]


def test_a_failure_of_the_flow_itself_is_not_tried_again(worker: Worker, name: str) -> None:
    run = flows.raising.run(name).id
    client.answer(run)
    worker.until_status(run, "failed")
    worker.until(lambda: worker.said(f"run {run} left alone: it is failed"))
    assert epochs(run) == 2
    close = journal(run).load().last_close
    assert close is not None and close.failure is not None and "own failure" in close.failure.message


def test_a_run_whose_flow_cannot_be_imported_fails_with_the_reason(worker: Worker, tmp_path: Path, name: str) -> None:
    module = tmp_path / f"gone_{name}.py"
    module.write_text(
        "from kitaru_zenml import flow, wait\n@flow(grace=0)\ndef gone() -> None:\n    wait('approve')\n"
        "if __name__ == '__main__':\n    print('RUN', gone.run().id)\n"
    )
    done = subprocess.run([sys.executable, str(module)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    run = done.stdout.rpartition("RUN ")[2].split()[0]
    module.unlink()
    client.answer(run)
    worker.until_status(run, "failed")
    worker.until(lambda: (c := journal(run).load().last_close) is not None and c.status == "failed")
    close = journal(run).load().last_close
    assert close is not None and close.failure is not None and f"gone_{name}" in close.failure.message
    assert Client().list_artifact_versions(artifact="gone.failure").total == 1
    assert epochs(run) == 3, "the suspended leg, the one that could not begin, the one that said so"


def test_a_run_with_a_step_in_doubt_waits_for_a_person(worker: Worker, name: str) -> None:
    run = run_to_death("paying", name)
    worker.until(lambda: (c := journal(run).load().last_close) is not None and c.status == "failed")
    worker.until_status(run, "failed")
    close = journal(run).load().last_close
    assert close is not None and close.failure is not None and "kitaru settle" in close.failure.message
    settle(run, "pay#0", value="paid by hand")
    assert resume(run).result() == "paid by hand"


def test_hints_that_were_lost_are_found_by_the_sweep(worker: Worker, name: str) -> None:
    run = flows.asking.run(name).id
    store = journal(run).store
    client.answer(run, "no")
    store.delete(n for n in store.list(DUE_FOLDER) if n.endswith(run))
    worker.until_status(run, "completed")
    assert effects(name) == ["before", "after no"]


def test_a_run_that_zenmls_server_resumes_is_left_to_it(worker: Worker, name: str) -> None:
    run = flows.asking.run(name).id
    Client().zen_store.update_run(find_run(run).id, PipelineRunUpdate(status=ExecutionStatus.RESUMING))  # as the server does
    put_answer(journal(run), an_answer(run, "yes"))  # past ZenML, which would pause the run on this local store
    leave_hint(journal(run).store, run, datetime.now(UTC))
    worker.until(lambda: worker.said(f"run {run} looked at again .* it is being started elsewhere"))
    assert effects(name) == ["before"] and epochs(run) == 1
    Client().zen_store.update_run(
        find_run(run).id, PipelineRunUpdate(status=ExecutionStatus.PAUSED, status_reason="Waiting for manual resume.")
    )
    worker.until_status(run, "completed")
    assert effects(name) == ["before", "after yes"] and epochs(run) == 2


def an_answer(run: str, value: str) -> Answer:
    wait = journal(run).open_waits()[0]
    return Answer(nonce=new_nonce(), run_id=run, wait=wait.key, value=value, by="me", via="test", at=datetime.now(UTC))


def test_a_finished_run_leaves_no_hints(worker: Worker, name: str) -> None:
    run = flows.asking.run(name).id
    client.answer(run, "yes")
    worker.until_status(run, "completed")
    store = journal(run).store
    worker.until(lambda: not [n for n in store.list(DUE_FOLDER) if n.endswith(run)])


def test_the_limit_of_flows_holds(worker: Worker, name: str) -> None:
    runs = [flows.training.run(f"{name}.{i}", 0.5).id for i in range(3)]
    for run in runs:
        client.answer(run)
    for run in runs:
        worker.until_status(run, "completed")
    lines = [line.split("|") for line in flows.effects().read_text().splitlines() if line.startswith(f"{name}.")]
    assert [what for _, what, *_ in lines] == ["in", "out"] * 3


def test_the_limit_of_steps_holds_over_processes(worker: Worker, name: str) -> None:
    runs = [flows.calling.run(f"{name}.{i}", 3, 0.4).id for i in range(2)]
    for run in runs:
        client.answer(run)
    for run in runs:
        worker.until_status(run, "completed")
    inside = most = 0
    for line in flows.effects().read_text().splitlines():
        if line.startswith(f"{name}."):
            inside += 1 if "|in " in line else -1
            most = max(most, inside)
    assert most == 2


def test_health_and_metrics_are_served(worker: Worker) -> None:
    said = worker.said(r"health and metrics on port (\d+)")
    assert said is not None
    base = f"http://127.0.0.1:{said.group(1)}"
    health = json.load(urllib.request.urlopen(f"{base}/healthz"))
    assert health["status"] == "ok"
    text = urllib.request.urlopen(f"{base}/metrics").read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values = dict(line.rsplit(" ", 1) for line in lines)
    assert float(values["kitaru_worker_started_total"]) >= 1 and 'kitaru_worker_limit_size{limit="gpu"}' in values
    assert float(values['kitaru_worker_ended_total{how="completed"}']) >= 1
    assert all(len(line.rsplit(" ", 1)) == 2 for line in lines)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{base}/nothing")


def test_what_a_leg_suspended_on_is_in_its_close(worker: Worker, name: str) -> None:
    run = flows.asking.run(name).id
    closes = [e for e in journal(run).load().events if isinstance(e, LegClosedEvent)]
    assert [len(c.suspended_on) for c in closes] == [1] and closes[0].inbox == 0
    client.answer(run, "yes")
    worker.until_status(run, "completed")
