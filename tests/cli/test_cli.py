"""The command line, on a real ZenML."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kitaru_zenml.cli.main import main
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.lease import take_lease
from kitaru_zenml.runs import artifact_store_of, find_run, open_journal
from tests import flows_in_process as flows


def kitaru(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def as_json(*arguments: str) -> Any:
    return json.loads(kitaru(*arguments, "--output", "json").stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(flows.research.run(str(tmp_path_factory.mktemp("notes"))).id)


@pytest.fixture(scope="module")
def failed() -> str:
    with pytest.raises(ConnectionError):
        flows.failing.run()
    return str(as_json("runs", "--flow", "failing", "--limit", "1")[0]["id"])


def test_help_is_quick_and_imports_neither_zenml_nor_boto3() -> None:
    code = "import sys; sys.argv=['kitaru','--help']\nfrom kitaru_zenml.cli.main import main\ntry:\n main()\nexcept SystemExit: pass\n"
    code += "print('LOADED', [m for m in ('zenml', 'boto3', 'obstore') if m in sys.modules])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout and "resume" in done.stdout
    assert time.monotonic() - began < 1.5


def test_the_installed_command_answers() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("kitaru")), "--version"], capture_output=True, text=True, check=True
    )
    assert "0.1.0" in done.stdout


def test_runs_lists_kitaru_runs_with_filters(run: str, failed: str) -> None:
    listed = as_json("runs")
    assert {run, failed} <= {r["id"] for r in listed}
    assert [r["status"] for r in as_json("runs", "--status", "failed", "--flow", "failing")] == ["failed"]
    assert as_json("runs", "--flow", "nobody") == []
    assert run in {r["id"] for r in as_json("runs", "--since", "1")}
    assert "research" in kitaru("runs").output


def test_show_draws_the_tree_and_says_the_next_command(run: str, failed: str) -> None:
    text = kitaru("show", run).output
    assert "find#0" in text and "completed" in text and f"kitaru verify {run}" in text and "30 tokens" in text
    view = as_json("show", run)
    assert view["totals"]["tokens"] == 30 and view["totals"]["finished"] == 7
    broken = kitaru("show", failed).output
    assert "never#0" in broken and "2 attempts" in broken and f"kitaru resume {failed}" in broken


def test_watch_follows_a_run_to_its_end() -> None:
    handle = flows.slow_steps.submit(3, 0.4)
    deadline = time.monotonic() + 30
    while "error" in (view := as_json("show", handle.id)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert view["status"] == "running" and view["executing"]
    assert as_json("show", handle.id, "--watch")["status"] == "completed"


def test_step_shows_inputs_output_and_usage(run: str) -> None:
    view = as_json("step", run, "summarise#0")
    assert [f["value"]["score"] for f in view["inputs"]["findings"]] == [0.5, 0.5]
    assert view["output"].startswith("antsants")
    assert "model-x" in kitaru("step", run, "find#0").output
    assert "x" not in as_json("step", run, "find#0")["opaque"]


def test_failure_shows_why_and_the_way_on(failed: str, run: str) -> None:
    report = as_json("failure", failed)
    assert report["failing_step"]["display"] == "never#0" and report["ending"] == "raised"
    assert (
        "the model is down" in kitaru("failure", failed).output
        and f"kitaru resume {failed}" in kitaru("failure", failed).output
    )
    fine = kitaru("failure", run)
    assert fine.exit_code == 1 and "has no failure" in fine.output


def test_resume_goes_on_and_reports_what_was_replayed(failed: str) -> None:
    again = kitaru("resume", failed)
    assert again.exit_code == 1 and "ConnectionError" in again.output  # the model is still down
    done = as_json("resume", failed)
    assert done["error"] == "ConnectionError"


def test_verify_finds_nothing_in_a_whole_run_and_a_change_in_a_damaged_one(run: str) -> None:
    assert kitaru("verify", run).exit_code == 0
    journal = open_journal(find_run(run))
    record = sorted((Path(journal.store.uri) / "kitaru" / run / "steps").glob("find-*"))[0]
    whole = record.read_bytes()
    record.write_bytes(whole.replace(b"0.5", b"0.6"))
    try:
        result = kitaru("verify", run)
        assert result.exit_code == 1 and record.name.split(".")[0] in result.output
        assert not as_json("verify", run)["ok"]
        corrupt = kitaru("show", run)
        assert corrupt.exit_code == 1 and "corrupt" in corrupt.output and "backup" in corrupt.output
    finally:
        record.write_bytes(whole)
    assert as_json("verify", run)["ok"]


@pytest.mark.parametrize(
    "command", [["show"], ["step", "x#0"], ["resume"], ["failure"], ["verify"], ["settle", "x#0", "--retry"]]
)
def test_an_unknown_run_is_said_by_every_command(command: list[str]) -> None:
    result = kitaru(command[0], "nobody", *command[1:])
    assert result.exit_code == 1 and "There is no run `nobody`" in result.output and "kitaru runs" in result.output
    assert as_json(command[0], "nobody", *command[1:])["error"] == "RunNotFound"


def test_an_ambiguous_prefix_is_said(run: str, failed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [r["id"] for r in as_json("runs", "--limit", "100")]
    for _ in range(20):
        if prefixes := {i[0] for i in ids if sum(j[0] == i[0] for j in ids) > 1}:
            result = kitaru("show", prefixes.pop())
            assert result.exit_code == 1 and "more characters" in result.output
            return
        ids.append(str(flows.doubling.run(0).id))
    pytest.fail("no two of twenty ids share their first digit")


def test_an_unknown_step_names_near_ones(run: str) -> None:
    result = kitaru("step", run, "sumarise#0")
    assert result.exit_code == 1 and "summarise#0" in result.output
    assert as_json("step", run, "find")["error"] == "AmbiguousStep"


def test_a_zenml_run_without_a_journal_is_said() -> None:
    handle = flows.doubling.run(1)
    journal = open_journal(find_run(handle.id))
    shutil.rmtree(Path(journal.store.uri) / "kitaru" / handle.id)
    result = kitaru("show", handle.id)
    assert result.exit_code == 1 and "has no journal" in result.output


def test_a_finished_run_is_not_resumed(run: str) -> None:
    result = kitaru("resume", run)
    assert result.exit_code == 1 and "nothing to resume" in result.output


def test_a_leased_run_is_not_resumed(failed: str) -> None:
    found = find_run(failed)
    journal = Journal(open_journal(found).store, failed)
    lease, stop = take_lease(journal, purpose="run", lapse_seconds=60), threading.Event()

    def beat() -> None:
        while not stop.wait(0.2):
            lease.beat()

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        for command in (["resume", failed], ["settle", failed, "never#0", "--retry"]):
            result = as_json(*command)
            assert result["error"] == "RunIsLeased" and result["holder"].startswith("process"), result
    finally:
        stop.set()
        beating.join()
        lease.release()


def test_an_unreachable_store_is_said(failed: str) -> None:
    root = Path(str(artifact_store_of(find_run(failed)).path))
    away = root.rename(root.with_name("away"))
    try:
        for command in (["show", failed], ["resume", failed], ["verify", failed]):
            result = kitaru(*command)
            assert result.exit_code == 1 and "artifact store" in result.output, result.output
        doctor = kitaru("doctor")
        assert doctor.exit_code == 1 and "✗" in doctor.output and "→" in doctor.output
    finally:
        away.rename(root)
    assert kitaru("doctor").exit_code == 0 and as_json("doctor")["ok"]


def test_settle_needs_one_answer_and_valid_json(failed: str) -> None:
    assert kitaru("settle", failed, "x#0").exit_code == 2
    assert kitaru("settle", failed, "x#0", "--value", "1", "--retry").exit_code == 2
    result = kitaru("settle", failed, "x#0", "--value", "{nonsense")
    assert result.exit_code == 2 and "quotes" in result.output
    assert as_json("settle", failed, "x#0", "--value", "1")["error"] == "StepNotFound"
