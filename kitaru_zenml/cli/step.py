"""`kitaru step RUN STEP`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.panel import Panel
from rich.text import Text

from kitaru_zenml.cli.output import cli_command, console, seconds, styled

SHOWN = 4000  # characters of a value on a terminal


@cli_command("step")
@click.argument("run")
@click.argument("step")
def command(run: str, step: str, output: str) -> Any:
    """Show STEP of RUN: inputs, output or failure, attempts.

    STEP is the name shown by `kitaru show` (`fetch#3`, `audit#0/model#2`), its end if that is unambiguous, or the path.

    JSON: {step, path, kind, status, inputs, opaque, output, failure, attempts, usage, metadata, idempotency_key, leg, generation, number,
    started_at, seconds}.
    """
    from kitaru_zenml.codec import value_tree
    from kitaru_zenml.execution import input_trees
    from kitaru_zenml.resumption import find_step
    from kitaru_zenml.runs import find_run, open_journal

    found = find_run(run)
    journal = open_journal(found)
    record = find_step(journal.load(), str(found.id), step)
    view = {
        "step": record.display,
        "path": record.path,
        "kind": record.kind,
        "status": "failed" if record.failure else "finished",
        "inputs": input_trees(journal, record),
        "opaque": list(record.opaque),
        "output": None if record.outcome is None else value_tree(record.outcome, journal.blob),
        "failure": record.failure.model_dump() if record.failure else None,
        "attempts": [
            {"seconds": (a.ended_at - a.started_at).total_seconds(), "type": a.failure.type, "message": a.failure.message}
            for a in record.attempts
        ],
        "usage": record.usage.model_dump() if record.usage else None,
        "metadata": record.metadata,
        "idempotency_key": record.idempotency_key,
        "leg": record.epoch,
        "generation": record.generation,
        "number": record.number,
        "started_at": record.started_at,
        "seconds": (record.ended_at - record.started_at).total_seconds(),
    }
    if output == "text":
        _print(view)
    return view


def _print(view: dict[str, Any]) -> None:
    facts = f"{seconds(view['seconds'])}, leg {view['leg']}, {len(view['attempts']) + 1} attempt(s)"
    if view["usage"]:
        facts += f", {view['usage']['model']}: {view['usage']['input_tokens']} + {view['usage']['output_tokens']} tokens"
    console.print(f"[bold]{view['step'].replace('[', chr(92) + '[')}[/bold] {styled(view['status'])}  [dim]{facts}[/dim]")
    console.print(f"[dim]{view['path'].replace('[', chr(92) + '[')}[/dim]")
    for name, tree in view["inputs"].items():
        console.print(Panel(_shown(tree), title=f"input: {name}", title_align="left", border_style="dim"))
    for what in view["opaque"]:
        console.print(f"[dim]counts by its type only: {what}[/dim]")
    for number, attempt in enumerate(view["attempts"], 1):
        console.print(
            Text(f"attempt {number} failed after {seconds(attempt['seconds'])}: {attempt['type']}: {attempt['message']}")
        )
    if view["failure"]:
        console.print(
            Panel(Text(view["failure"]["traceback"] or view["failure"]["message"]), title="failure", border_style="red")
        )
    else:
        console.print(Panel(_shown(view["output"]), title="output", title_align="left", border_style="green"))
    if view["metadata"]:
        console.print(Panel(_shown(view["metadata"]), title="metadata", title_align="left", border_style="dim"))


def _shown(tree: Any) -> Text:
    text = tree if isinstance(tree, str) else json.dumps(tree, indent=2, ensure_ascii=False, default=str)
    return Text(text if len(text) <= SHOWN else f"{text[:SHOWN]}\n... {len(text):,} characters; all of it with --output json")
