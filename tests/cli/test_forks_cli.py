"""`kitaru replay`, `diff` and `delete`, and what `show`, `step` and `verify` say of forks."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kitaru_zenml.cli.main import main
from kitaru_zenml.lineage.failure import load_failure
from kitaru_zenml.runs import find_run, open_journal
from tests import flows_of_forks as flows


def kitaru(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(main, list(arguments), **options)


def as_json(*arguments: str) -> Any:
    return json.loads(kitaru(*arguments, "--output", "json").stdout)


@pytest.fixture(scope="module")
def origin() -> str:
    return str(flows.support.run(2).id)


@pytest.fixture(scope="module")
def fork(origin: str) -> str:
    done = as_json("replay", origin, "--override", 'judge#0={"kind": "reject"}', "--label", "no [refund]")
    assert (done["status"], done["origin"], done["replayed"], done["ran"], done["vanished"]) == ("completed", origin, 3, 2, [])
    return str(done["run"])


def test_values_are_json_else_text_or_come_from_a_file(origin: str, tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text('{"kind": "else"}')
    done = as_json(
        "replay", origin, "--override", f"judge#0=@{tmp_path}/verdict.json", "--input", "name=bob", "--reuse", "unchanged"
    )
    assert open_journal(find_run(done["run"])).load().current()["/"].outcome.data == "did else, signed by bob"  # type: ignore[union-attr]
    said = kitaru("replay", origin, "--override", "act#0=did = nothing")
    assert said.exit_code == 0 and f"kitaru diff {origin}" in said.output
    for wrong in (["--override", "act#0"], ["--input", "name=@/no/such/file"]):
        assert kitaru("replay", origin, *wrong).exit_code == 2


def test_what_does_not_fit_is_said(origin: str) -> None:
    assert as_json("replay", origin, "--override", "judge#0=5")["error"] == "InvalidOverride"
    assert "Field required" in as_json("replay", origin, "--override", "judge#0={}")["message"]
    unknown = as_json("replay", origin, "--from", "juge#0")
    assert unknown["error"] == "StepNotFound" and unknown["near"][0] == "judge#0"
    assert as_json("replay", origin, "--from", "read")["candidates"] == ["read#0", "read#1"]
    assert as_json("replay", origin, "--input", "x=1")["error"] == "InvalidInput"


def test_show_and_step_say_what_a_fork_is_of(origin: str, fork: str) -> None:
    view = as_json("show", fork)
    assert view["replay_of"]["run"] == origin and view["replay_of"]["label"] == "no [refund]"
    marks = {s["step"]: (s["reused_from"], bool(s["override"])) for s in view["steps"]}
    assert marks["read#0"] == (origin, False) and marks["judge#0"] == (None, True) and marks["act#0"] == (None, False)
    assert view["totals"]["reused"] == 2 and view["totals"]["tokens"] == 0
    text = kitaru("show", fork).output
    assert f"Replay of {origin}" in text and "reused from" in text and "overridden by" in text and "no [refund]" in text
    assert as_json("show", origin)["replay_of"] is None
    step = kitaru("step", fork, "judge#0").output
    assert "Overridden by" in step and "no [refund]" in step and f"kitaru step {origin} 'judge#0'" in step
    assert as_json("step", fork, "read#1")["reused_from"] == origin
    assert as_json("step", fork, "read#1")["inputs"] == {"page": 1}
    assert f"reused from run {origin}" in kitaru("step", fork, "read#1").output


def test_diff_shows_what_changed_and_what_it_cost(origin: str, fork: str) -> None:
    view = as_json("diff", origin, fork)
    assert view["counts"] == {"reused": 2, "overridden": 1, "changed": 1, "same": 1}
    changed = {s["step"]: s for s in view["steps"]}
    assert changed["act#0"]["inputs_differ"] and changed["act#0"]["diff"][-2:] == ["-did refund", "+did reject"]
    assert (view["first"]["tokens"], view["second"]["tokens"], view["second"]["reused"]) == (15, 0, 2)
    text = kitaru("diff", origin, fork).output
    assert "-did refund" in text and "+did reject" in text and "overridden" in text and "read#0" not in text
    assert "read#0" in kitaru("diff", origin, fork, "--all").output
    assert as_json("diff", origin, origin)["counts"] == {"reused": 5}


def test_verify_recomputes_what_a_fork_reuses(origin: str, fork: str) -> None:
    assert as_json("verify", fork)["ok"], as_json("verify", fork)
    assert as_json("verify", fork)["records"] == 6
    store = open_journal(find_run(origin)).store
    record = next((Path(store.uri) / "kitaru" / origin / "steps").glob("read-*"))
    whole = record.read_bytes()
    record.write_bytes(whole.replace(b"page 0", b"page 9").replace(b"page 1", b"page 9"))
    try:
        assert not as_json("verify", fork)["ok"] and record.stem in kitaru("verify", fork).output
        assert as_json("show", fork)["error"] == "CorruptRecord"
    finally:
        record.write_bytes(whole)
    assert as_json("verify", fork)["ok"]


def test_a_failure_report_says_how_to_fork(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError) as failed:
        flows.breaking.run(1)
    run_id = failed.value.__notes__[0].split()[1]
    report = load_failure(open_journal(find_run(run_id)).store, run_id)
    assert report is not None
    (command,) = [c.command for c in report.commands if "--override" in c.command]
    done = as_json(*shlex.split(command.replace("VALUE", "41"))[1:])
    assert done["status"] == "completed" and done["ran"] == 0


def test_delete_asks_and_refuses(origin: str, fork: str) -> None:
    assert as_json("delete", origin, "--yes")["error"] == "RunHasForks"
    assert kitaru("delete", fork, "--output", "json").exit_code == 2
    assert kitaru("delete", fork, input="n\n").exit_code == 1
    assert kitaru("show", fork).exit_code == 0
    gone = kitaru("delete", fork, input="y\n")
    assert gone.exit_code == 0 and f"Run {fork} is deleted" in gone.output
    assert as_json("show", fork)["error"] == "RunNotFound"
    assert as_json("delete", fork, "--yes")["error"] == "RunNotFound"
