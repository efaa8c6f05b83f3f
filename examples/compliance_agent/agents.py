"""The auditor, its reviewer, their tools, and the flow. The agents are ordinary Pydantic AI agents with one capability more."""

from __future__ import annotations

from typing import Any

from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import RequestInput
from pydantic_ai.tools import DeferredToolRequests

from examples.compliance_agent import packages, scripted
from examples.compliance_agent.records import PackageText, Report, Verdict
from kitaru_zenml import current_step, flow
from kitaru_zenml_pydantic_ai import Durability

POLICY = {
    "licence": "Every package names its licence and brings its text. Without either it needs a waiver.",
    "telemetry": "A package that sends data home is used only with a waiver.",
    "contact": "A package should say where problems are reported. That is noted, no more.",
}


def tell_somebody(ctx: RunContext[Any], requests: DeferredToolRequests, token: str) -> None:
    """Here a message would be posted; the question itself is in `kitaru waits` and in ZenML's dashboard."""


reviewer = Agent(
    name="reviewer",
    deps_type=str,
    output_type=Verdict,
    instructions="You are the reviewer. Look the policy up, then judge how severe the findings are.",
    capabilities=[Durability()],
)
auditor = Agent(
    name="auditor",
    deps_type=str,
    output_type=Report,
    instructions=(
        "You are the auditor. Read every package, have each one with findings reviewed, ask for a waiver for each severe verdict, "
        "and report on every package."
    ),
    capabilities=[RequestInput(tell_somebody), Durability(model_steps={"retries": 2, "timeout": 120})],
)


@reviewer.tool_plain
def policy(topic: str) -> str:
    """The policy on `licence`, `telemetry` or `contact`."""
    return POLICY.get(topic, "There is no such policy.")


@auditor.tool_plain
def read_package(name: str) -> PackageText:
    """What an installed package says of itself."""
    scripted.a_real_call(f"read {name}")
    return packages.read(name)


@auditor.tool
async def review(ctx: RunContext[str], name: str, findings: list[str]) -> Verdict:
    """Have the findings about a package judged."""
    prompt = f"{name}: " + "; ".join(findings)
    return (await reviewer.run(prompt, deps=ctx.deps, model=scripted.model_named(ctx.deps), usage=ctx.usage)).output


@auditor.tool_plain(requires_approval=True)
def waive(package: str, reason: str) -> str:
    """Register a waiver for a package. A person is asked first."""
    return f"waiver {current_step().idempotency_key[:8]} for {package}"


@flow(grace=2)
async def compliance(names: list[str], model: str = scripted.NAME) -> Report:
    """Check installed packages.

    Args:
        names: The packages.
        model: `scripted`, or a model as Pydantic AI names it, such as `openai:gpt-5-mini`.
    """
    result = await auditor.run("Check: " + " ".join(names), deps=model, model=scripted.model_named(model))
    return result.output
