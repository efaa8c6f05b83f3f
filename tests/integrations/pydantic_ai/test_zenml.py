"""Agents on a real ZenML: what it shows of a run, and what forks do with an agent's steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai.exceptions import ModelHTTPError
from zenml.client import Client

from kitaru_zenml import resume
from kitaru_zenml.difference import difference
from kitaru_zenml.runs import find_run, open_journal
from tests.openai_server import OpenAIServer


@pytest.fixture(scope="module")
def flows(server: OpenAIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.integrations.pydantic_ai import flows

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRASH_EFFECTS", str(tmp_path_factory.mktemp("effects") / "effects"))
        yield flows


@pytest.fixture(scope="module")
def origin(flows: Any) -> str:
    return str(flows.clerk_flow.run().id)


def steps_of(run_id: str) -> dict[str, Any]:
    return {s.name: s for s in Client().list_run_steps(pipeline_run_id=run_id, size=200, hydrate=True).items}


def test_zenml_shows_the_steps_of_an_agent_with_their_facts_and_edges(origin: str) -> None:
    steps = steps_of(origin)
    assert sorted(steps) == ["clerk#0/model#0", "clerk#0/model#1", "clerk#0/tool:book[c1]"]
    first, last, tool = (steps[f"clerk#0/{name}"] for name in ("model#0", "model#1", "tool:book[c1]"))
    assert tool.spec.upstream_steps == [first.name] and last.spec.upstream_steps == [tool.name]
    said = first.run_metadata["kitaru"]
    assert said["usage"] == {"model": "gpt-test", "input_tokens": 20, "output_tokens": 6}
    assert said["metadata"]["finish_reason"] == "tool_call" and said["metadata"]["tool_calls"] == ["book"]
    assert last.config.group is not None and "clerk" in last.config.group.name
    version = Client().get_artifact_version(last.outputs["output"][0].id)
    assert version.visualizations
    page = _page(version)
    assert "assistant" in page and "booked: " in page and "→ book(" in page


def _page(version: Any) -> str:
    from zenml.artifacts.utils import load_artifact_visualization

    return str(load_artifact_visualization(version, 0).value)


@pytest.mark.parametrize(
    "response",
    [
        "not today",
        {"parts": [{"part_kind": "text", "content": "not today"}]},
        {"kind": "response", "parts": [{"part_kind": "text", "content": "not today"}], "usage": {"input_tokens": 3}},
    ],
    ids=["text", "parts", "response"],
)
def test_a_response_is_overridden_by_text_or_as_json(flows: Any, origin: str, server: OpenAIServer, response: Any) -> None:
    before = len(server.requests)
    fork = flows.clerk_flow.replay(origin, overrides={"model#1": response})
    assert fork.result() == "not today" and len(server.requests) == before
    assert steps_of(fork.id)["clerk#0/model#0"].status.value == "cached"


def test_a_response_is_overridden_by_a_tool_call(flows: Any, origin: str, server: OpenAIServer) -> None:
    before = len(server.requests)
    call = {"tool_name": "book", "args": {"amount": 77}}
    fork = flows.clerk_flow.replay(origin, overrides={"model#0": call})
    assert fork.result() == "booked: " and len(server.requests) - before == 1
    tools = [r for r in open_journal(find_run(fork.id)).load().records.values() if r.kind == "tool"]
    assert {r.inputs["amount"] for r in tools} >= {77}


def test_a_tools_result_is_overridden_by_a_plain_value(flows: Any, origin: str, server: OpenAIServer) -> None:
    before = len(server.requests)
    fork = flows.clerk_flow.replay(origin, overrides={"tool:book[c1]": "a receipt"})
    assert fork.result() == "booked: a receipt" and len(server.requests) - before == 1


def test_a_run_is_replayed_with_another_model_from_a_step(flows: Any, server: OpenAIServer) -> None:
    origin, before = flows.asking.run(), len(server.requests)
    fork = flows.asking.replay(origin.id, from_="model#1", inputs={"model": "other"})
    assert fork.result() == origin.result()
    assert [r["model"] for r in server.requests[before:]] == ["other"], "what was answered before the step is kept"


def test_two_runs_are_compared_as_conversations(flows: Any, origin: str) -> None:
    fork = flows.clerk_flow.replay(origin, overrides={"model#0": {"tool_name": "book", "args": {"amount": 9}}})
    snapshots = [open_journal(find_run(run)).load() for run in (origin, fork.id)]
    found = difference(*snapshots, lambda record: record.outcome.data if record.outcome else None)
    [asked] = [step for step in found.steps if step.step == "clerk#0/model#0"]
    assert asked.change == "overridden" and list(asked.diff[3:]) == ['-→ book({"amount": 5})', '+→ book({"amount": 9})']


def test_a_run_that_ended_by_a_failed_request_is_resumed_and_asks_only_that_again(
    flows: Any, server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = tmp_path / "down"
    monkeypatch.setenv("SERVER_DOWN", str(down))
    down.touch()
    before = len(server.requests)
    with pytest.raises(ModelHTTPError) as failed:
        flows.asking.run("down")
    assert failed.value.status_code == 503
    down.unlink()
    run = resume(Client().list_pipeline_runs(pipeline="asking", sort_by="desc:created", size=1).items[0].id)
    assert run.result() == "booked: " and len(server.requests) - before == 3
    [first] = [s for s in steps_of(run.id).values() if s.name == "clerk#0/model#0" and s.status.value == "completed"]
    assert first.version == 2 or first.run_metadata["kitaru"]
