"""The agent: a planner splits a question into topics, a run of its own researches each, and one report joins what they found.

The model is asked through its batch endpoint, which answers in its own time. Nothing stays in memory for that: each topic's run
sleeps by a durable timer and suspends, the planner suspends until all have ended, and whoever is there then continues them.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from examples.research_fanout import library, model
from examples.research_fanout.library import Entry, Passage
from examples.research_fanout.model import Batch
from kitaru_zenml import checkpoint, current_step, flow, gather_runs, sleep


class UnparsableAnswer(Exception):
    """The model did not answer with what it was asked for."""


class Point(BaseModel):
    """Something that a module offers, and where that is said."""

    name: str
    says: str
    source: str


class Finding(BaseModel):
    """What a module has to say to the question."""

    summary: str
    points: list[Point]


# --- one topic -----------------------------------------------------------------------------------------------------------


@checkpoint
def read_module(module: str) -> list[Passage]:
    """What the module's sources document."""
    return library.read_module(module)


@checkpoint
def order_answer(question: str, module: str, passages: list[Passage]) -> Batch:
    """Hand the question to the model's batch endpoint."""
    return model.order(question, module, passages)


@checkpoint
def fetch_answer(batch: Batch) -> str:
    """What the model answered."""
    answer = model.fetch(batch)
    current_step().log_usage(model.NAME, model.tokens(batch.prompt), model.tokens(answer))
    return answer


@checkpoint
def parse_answer(answer: str) -> Finding:
    """Take the model at its word. What it said is kept as the step's input, whatever comes of it."""
    try:
        return Finding.model_validate_json(answer)
    except ValidationError as error:
        raise UnparsableAnswer(f"not a finding: {answer[:80]!r}") from error


@flow(grace=0)
def research_topic(question: str, module: str) -> Finding:
    """Research one module; a child run of `research`."""
    batch = order_answer(question, module, read_module(module))
    sleep(batch.seconds, name="batch")
    return parse_answer(fetch_answer(batch))


# --- the planner ---------------------------------------------------------------------------------------------------------


@checkpoint
def survey() -> list[Entry]:
    """What there is to read."""
    return library.catalogue()


@checkpoint
def plan(question: str, entries: list[Entry]) -> list[str]:
    """Ask the model which modules to research."""
    return model.plan(question, entries)


@checkpoint(at_most_once=True)
def write_report(file: str, question: str, findings: dict[str, Finding]) -> str:
    """Write the report; it refuses to replace one."""
    lines = [f"# {question}", "", f"Model: {model.NAME}"]
    for module, finding in findings.items():
        lines += ["", f"## {module}", "", finding.summary, ""]
        lines += [f"- `{point.name}` ({point.source}): {point.says}" for point in finding.points]
    with Path(file).open("x") as report:
        report.write("\n".join(lines) + "\n")
    return file


@flow(grace=0, max_children=4)
def research(question: str, report: str) -> str:
    """Answer a question about the standard library.

    Args:
        question: In words.
        report: File to write, which must not exist.

    Returns:
        The report's path.
    """
    modules = plan(question, survey())
    runs = [research_topic.submit(question, module) for module in modules]
    findings = gather_runs(runs)
    return write_report(report, question, dict(zip(modules, findings, strict=True)))
