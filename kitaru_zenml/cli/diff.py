"""`kitaru diff RUN1 RUN2`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import cli_command, command_to_type, console, seconds

if TYPE_CHECKING:
    from kitaru_zenml.difference import Difference, StepChange
    from kitaru_zenml.journal.records import StepRecord

MARKS = {
    "reused": ("= ", "dim"), "same": ("= ", "green"), "changed": ("~ ", "yellow"), "overridden": ("! ", "magenta"), "new": ("+ ", "green"),
    "gone": ("- ", "red"),
}  # fmt: skip
LINES = 30  # of a step's diff that are shown
WIDTH = 200  # characters of a line


@cli_command("diff")
@click.argument("run1")
@click.argument("run2")
@click.option("--all", "everything", is_flag=True, help="List also the steps that were reused or came to the same.")
def command(run1: str, run2: str, everything: bool, output: str) -> Any:
    """Compare RUN2 with RUN1, step by step: what was reused, overridden, changed, is new or gone; and what each run spent itself.

    A step that was asked with other inputs counts as changed also if its output is the same.

    JSON: {first, second: {run, steps, reused, seconds, tokens, cost}, counts, steps: [{step, change, inputs_differ, diff, first,
    second}]}; `first` and `second` of a step are {path, seconds, tokens, cost}.
    """
    from kitaru_zenml.codec import value_tree
    from kitaru_zenml.difference import difference
    from kitaru_zenml.runs import find_run, open_journal

    journals = [open_journal(find_run(run)) for run in (run1, run2)]
    snapshots = [journal.load() for journal in journals]

    def tree_of(record: StepRecord) -> Any:
        return None if record.outcome is None else value_tree(record.outcome, journals[0].of(record).blob)

    found = difference(snapshots[0], snapshots[1], tree_of)
    ids = [journal.run_id for journal in journals]
    if output == "text":
        _print(found, ids, everything)
    return {
        "first": {"run": ids[0], **dataclasses.asdict(found.first)},
        "second": {"run": ids[1], **dataclasses.asdict(found.second)},
        "counts": found.counts,
        "steps": [
            {
                "step": step.step,
                "change": step.change,
                "inputs_differ": step.inputs_differ,
                "diff": list(step.diff),
                "first": _facts(step.first),
                "second": _facts(step.second),
            }
            for step in found.steps
        ],
    }


def _facts(record: StepRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    usage = record.usage
    return {
        "path": record.path,
        "seconds": (record.ended_at - record.started_at).total_seconds(),
        "tokens": usage.input_tokens + usage.output_tokens if usage else 0,
        "cost": usage.cost if usage else None,
    }


def _print(found: Difference, ids: list[str], everything: bool) -> None:
    for step in found.steps:
        if everything or step.change not in ("reused", "same"):
            _print_step(step)
    told = ", ".join(f"{count} {change}" for change, count in sorted(found.counts.items()))
    console.print(Text(told or "neither run has a step", style="bold"))
    for run_id, totals in zip(ids, (found.first, found.second), strict=True):
        cost = f", ${totals.cost:.4f}" if totals.cost is not None else ""
        reused = f", {totals.reused} of them reused" if totals.reused else ""
        told = f"{run_id}: {totals.steps} steps{reused}; {seconds(totals.seconds) or '0 s'}, {totals.tokens:,} tokens{cost} of its own"
        console.print(Text(told, style="dim"))
    if not everything and any(step.change in ("reused", "same") for step in found.steps):
        console.print(Text.assemble("All steps: ", command_to_type(f"kitaru diff {ids[0]} {ids[1]} --all")))


def _print_step(step: StepChange) -> None:
    told = step.change + (", asked with other inputs" if step.inputs_differ else "")
    console.print(Text.assemble(MARKS[step.change], step.step, (f"  {told}", "dim")))
    for line in step.diff[2:][:LINES]:  # without its head, which names no file
        style = "green" if line.startswith("+") else "red" if line.startswith("-") else "dim"
        console.print(Text(f"    {line[:WIDTH]}", style=style))
    if len(step.diff) - 2 > LINES:
        console.print(Text(f"    ... {len(step.diff) - 2 - LINES} lines more with --output json", style="dim"))
