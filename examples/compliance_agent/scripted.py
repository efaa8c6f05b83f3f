"""The scripted model: plays auditor and reviewer by rules, so that the example runs offline. It is no language model, and says so."""

from __future__ import annotations

import os
import time
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.function import AgentInfo, FunctionModel

from examples.compliance_agent.packages import findings
from examples.compliance_agent.records import PackageText, Verdict

NAME = "scripted"


def model_named(name: str) -> Model | str:
    """The model to run with: the scripted one, or a name that Pydantic AI knows."""
    return FunctionModel(_play, model_name=NAME) if name == NAME else name


def a_real_call(what: str) -> None:
    """Take as long as one might, COMPLIANCE_LATENCY seconds (0.3 by default), and note in the file COMPLIANCE_CALLS that it was made."""
    time.sleep(float(os.environ.get("COMPLIANCE_LATENCY", "0.3")))
    if path := os.environ.get("COMPLIANCE_CALLS"):
        with open(path, "a") as file:
            file.write(f"{what}\n")


def _play(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    a_real_call("model")
    instructions = info.instructions or ""
    said = _reviewer(messages) if "You are the reviewer" in instructions else _auditor(messages)
    calls = [ToolCallPart(tool, arguments, f"{tool}-{key}") for tool, key, arguments in said]
    return ModelResponse(parts=calls)


def _prompt(messages: list[ModelMessage]) -> str:
    return str(messages[0].parts[0].content)  # type: ignore[union-attr]


def _returns(messages: list[ModelMessage], tool: str) -> list[ToolReturnPart]:
    return [p for m in messages for p in m.parts if isinstance(p, ToolReturnPart) and p.tool_name == tool]


def _auditor(messages: list[ModelMessage]) -> list[tuple[str, str, dict[str, Any]]]:
    texts = [PackageText.model_validate(p.content) for p in _returns(messages, "read_package")]
    if not texts:
        return [("read_package", name, {"name": name}) for name in _prompt(messages).removeprefix("Check: ").split()]
    verdicts = [Verdict.model_validate(p.content) for p in _returns(messages, "review")]
    to_review = [(text.name, findings(text)) for text in texts if findings(text)]
    if to_review and not verdicts:
        return [("review", name, {"name": name, "findings": found}) for name, found in to_review]
    severe = [v for v in verdicts if v.severity == "severe"]
    waivers = {p.tool_call_id.removeprefix("waive-"): p for p in _returns(messages, "waive")}
    if severe and not waivers:
        return [("waive", v.package, {"package": v.package, "reason": v.because}) for v in severe]
    by_package = {v.package: v for v in verdicts}
    entries = []
    for text in texts:
        verdict, waiver = by_package.get(text.name), waivers.get(text.name)
        if waiver is not None:
            granted = str(waiver.content).startswith("waiver ")
            entries.append({"package": text.name, "state": "waived" if granted else "refused", "because": str(waiver.content)})
        elif verdict is not None and verdict.severity != "none":
            entries.append({"package": text.name, "state": "noted", "because": verdict.because})
        else:
            entries.append({"package": text.name, "state": "passed", "because": f"{text.licence}, with its text"})
    return [("final_result", "report", {"entries": entries, "summary": f"{len(entries)} packages checked by rules, no LLM"})]


def _reviewer(messages: list[ModelMessage]) -> list[tuple[str, str, dict[str, Any]]]:
    package, _, found = _prompt(messages).partition(": ")
    topic = "telemetry" if "sent home" in found else "licence" if "licence" in found else "contact"
    policies = _returns(messages, "policy")
    if not policies:
        return [("policy", topic, {"topic": topic})]
    severity = "severe" if "waiver" in str(policies[-1].content) else "minor"
    return [
        ("final_result", "verdict", {"package": package, "severity": severity, "because": f"{found}. {policies[-1].content}"})
    ]
