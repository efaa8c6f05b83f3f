"""`kitaru waits`, `answer`, `send` and `cancel`: what they do, and what they say to what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kitaru_zenml import RunHandle
from kitaru_zenml.cli.main import main
from kitaru_zenml.cli.waits import shape
from tests import flows_waiting as flows


def kitaru(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def as_json(*arguments: str, exit_code: int = 0) -> Any:
    done = kitaru(*arguments, "--output", "json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "effects"
    path.touch()
    monkeypatch.setenv("EFFECTS", str(path))
    return path


def test_a_question_is_listed_and_its_answer_continues_the_run(tmp_path: Path) -> None:
    run = flows.asking.run(4).id
    [listed] = as_json("waits", run)
    assert (listed["wait"], listed["question"], listed["flow"], listed["metadata"]) == (
        "approve#0",
        "Spend 5?",
        "asking",
        {"amount": 5},
    )
    said = kitaru("waits").output
    assert run[:13] in said and "Spend 5?" in said and "ok: boolean" in said and "Next: kitaru answer" in said
    assert f"Next: kitaru waits {run}" in kitaru("show", run).output
    wrong = as_json("answer", run, '{"ok": true, "limit": 7}', exit_code=1)
    assert wrong["error"] == "InvalidAnswer" and "must be even" in wrong["message"]
    assert [q["wait"] for q in as_json("waits", run)] == ["approve#0"]
    (tmp_path / "answer.json").write_text('{"ok": true}')
    done = as_json("answer", run, "approve", "--file", str(tmp_path / "answer.json"), "--by", "ann")
    assert (done["wait"], done["by"], done["status"], done["value"]) == ("approve#0", "ann", "completed", {"ok": True})
    assert as_json("answer", run, "approve", '{"ok": true}')["by"] == "ann"  # the same again
    other = as_json("answer", run, "approve", '{"ok": false}', exit_code=1)
    assert other["error"] == "AlreadyAnswered" and other["by"] == "ann"
    assert as_json("waits", run) == []


def test_what_is_wrong_with_an_answer_is_said_and_the_question_stays(tmp_path: Path) -> None:
    run = flows.asking_in_branches.run(2).id
    several = as_json("answer", run, "yes", exit_code=1)
    assert several["error"] == "NoSuchWait" and len(several["open_waits"]) == 2
    assert as_json("answer", run, "nothing", "yes", exit_code=1)["error"] == "NoSuchWait"
    assert as_json("answer", "no-such-run", "yes", exit_code=1)["error"] == "RunNotFound"
    (tmp_path / "broken.json").write_text("{")
    for usage in (
        ["answer", run, "approve", "yes", "--file", str(tmp_path / "broken.json")],
        ["answer", run, "refund#0/approve", "--file", str(tmp_path / "broken.json")],
        ["answer", run, "a", "b", "c"],
        ["answer", run, "approve", "--interactive"],
    ):
        assert kitaru(*usage).exit_code == 2, usage
    assert "cannot be read as JSON" in kitaru("answer", run, "refund#0/approve", "--file", str(tmp_path / "broken.json")).output
    assert len(as_json("waits", run)) == 2
    left = as_json("answer", run, "refund#1/approve", "no", "--no-resume")
    assert left["status"] == "" and RunHandle(run).status == "paused"
    assert as_json("answer", run, "refund#0/approve", "yes")["status"] == "completed"


def test_a_text_that_looks_like_json_is_a_text_where_a_text_is_asked(effects: Path) -> None:
    run = flows.asking_with_timeout.run(600, False).id
    assert as_json("answer", run, "42")["value"] == "42"
    assert RunHandle(run).result() == "42"


def test_a_gate_is_answered_by_its_name_or_without_any() -> None:
    run = flows.gate.run().id
    assert as_json("answer", run, "go", "1", exit_code=1)["error"] == "InvalidAnswer"
    assert as_json("answer", run, "go")["status"] == "completed"
    assert as_json("answer", flows.gate.run().id)["status"] == "completed"


def test_an_abort_ends_the_run_with_its_hook(effects: Path) -> None:
    run = flows.undoable.run(3).id
    assert as_json("answer", run, "approve", "--abort")["status"] == "stopped"
    assert effects.read_text().splitlines()[-1].startswith("undo 3 ")


def test_events_are_sent_once_under_a_key(tmp_path: Path) -> None:
    run = flows.listening.run(2).id
    first = as_json("send", run, "orders", '{"id": 1}', "--key", "k")
    assert (first["key"], first["payload"]) == ("k", {"id": 1})
    assert as_json("send", run, "orders", "other", "--key", "k")["payload"] == {"id": 1}
    assert as_json("send", run, "no name!", exit_code=1)["error"] == "InvalidStepName"
    (tmp_path / "order.json").write_text('"two"')
    assert kitaru("send", run, "orders", "x", "--file", str(tmp_path / "order.json")).exit_code == 2
    as_json("send", run, "orders", "--file", str(tmp_path / "order.json"))
    assert as_json("resume", run)["status"] == "completed"
    assert RunHandle(run).result() == [{"id": 1}, "two"]
    assert as_json("send", run, "orders", "late", exit_code=1)["error"] == "RunFinished"


def test_a_run_is_cancelled_once() -> None:
    run = flows.undoable.run(1).id
    assert as_json("cancel", run, "--reason", "enough") == {"run": run, "status": "stopped"}
    assert as_json("cancel", run, exit_code=1)["error"] == "RunFinished"
    assert as_json("cancel", "no-such-run", exit_code=1)["error"] == "RunNotFound"
    assert as_json("answer", run, "approve", "x", exit_code=1)["error"] in ("RunFinished", "InvalidAnswer")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (None, "none, it only lets the run go on"),
        ({"enum": ["yes", "no"]}, "yes | no"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer or null"),
        ({"type": "object", "properties": {"a": {"type": "string"}, "b": {}}, "required": ["a"]}, "{a: string, b?: JSON}"),
    ],
)
def test_the_shape_of_an_answer_in_words(schema: dict[str, Any] | None, words: str) -> None:
    assert shape(schema) == words
