"""`kitaru step RUN STEP`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import cli_command, command_to_type, console, seconds, section, styled, traceback_of, value
from kitaru_zenml.journal.records import Failure, StepRecord

if TYPE_CHECKING:
    from kitaru_zenml.journal.journal import Journal, Snapshot


@cli_command("step")
@click.argument("run")
@click.argument("step")
def command(run: str, step: str, output: str) -> Any:
    """Show STEP of RUN: inputs, output or failure, attempts.

    STEP is the name shown by `kitaru show` (`fetch#3`, `audit#0/model#2`), its end if that is unambiguous, or the path.

    JSON: {step, path, kind, status, inputs, opaque, output, failure, attempts: [{seconds, type, message}], earlier: [{generation, leg,
    status, failure}], usage, metadata, reused_from, override, idempotency_key, leg, generation, number, started_at,
    seconds}. A step that is in flight or in doubt has no inputs and no output yet.
    """
    from kitaru_zenml.errors import StepNotFound
    from kitaru_zenml.resumption import find_step
    from kitaru_zenml.runs import find_run, open_journal

    found = find_run(run)
    journal = open_journal(found)
    snapshot = journal.load()
    try:
        record = find_step(snapshot, str(found.id), step)
    except StepNotFound:
        view = _open(journal, snapshot, step)
        if view is None:
            raise
    else:
        view = _recorded(journal, snapshot, record)
    if output == "text":
        _print(view, str(found.id))
    return view


def _recorded(journal: Journal, snapshot: Snapshot, record: StepRecord) -> dict[str, Any]:
    from kitaru_zenml.codec import value_tree
    from kitaru_zenml.execution import input_trees

    earlier = [r for r in snapshot.records.values() if r.path == record.path and r.generation < record.generation]
    return {
        "step": record.display,
        "path": record.path,
        "kind": record.kind,
        "status": _status(record),
        "inputs": input_trees(journal, record),
        "opaque": list(record.opaque),
        "output": None if record.outcome is None else value_tree(record.outcome, journal.blob),
        "failure": record.failure.model_dump() if record.failure else None,
        "attempts": [
            {"seconds": (a.ended_at - a.started_at).total_seconds(), "type": a.failure.type, "message": a.failure.message}
            for a in record.attempts
        ],
        "earlier": [
            {
                "generation": r.generation,
                "leg": r.epoch,
                "status": _status(r),
                "failure": f"{r.failure.type.rpartition(':')[2]}: {r.failure.message}" if r.failure else None,
            }
            for r in sorted(earlier, key=lambda r: r.generation)
        ],
        "usage": record.usage.model_dump() if record.usage else None,
        "metadata": {name: value for name, value in record.metadata.items() if name != "override"},
        "reused_from": record.run_id if record.run_id != journal.run_id else None,
        "override": record.metadata.get("override"),
        "idempotency_key": record.idempotency_key,
        "leg": record.epoch,
        "generation": record.generation,
        "number": record.number,
        "started_at": record.started_at,
        "seconds": (record.ended_at - record.started_at).total_seconds(),
    }


def _status(record: StepRecord) -> str:
    return "failed" if record.failure else "finished"


def _open(journal: Journal, snapshot: Snapshot, step: str) -> dict[str, Any] | None:
    """A step without an outcome that has begun."""
    from kitaru_zenml.resumption import in_doubt

    leases = journal.leases()
    beat = journal.beat(leases[-1].epoch) if leases else None
    flights = beat.in_flight if beat is not None and not beat.released else ()
    open_steps = [(m.display, m.scope.path, m.scope.kind, "in doubt", m.started_at) for m in in_doubt(snapshot)]
    open_steps += [(f.display, f.path, f.kind, "in flight", f.started_at) for f in flights]
    for display, path, kind, status, started_at in open_steps:
        if step in (display, path):
            return {
                "step": display, "path": path, "kind": kind, "status": status, "inputs": {}, "opaque": [], "output": None, "failure": None,
                "attempts": [], "earlier": [], "usage": None, "metadata": {}, "reused_from": None,
                "override": None, "idempotency_key": None, "leg": leases[-1].epoch,
                "generation": 0, "number": None, "started_at": started_at, "seconds": None,
            }  # fmt: skip
    return None


def _print(view: dict[str, Any], run_id: str) -> None:
    facts = [f"leg {view['leg']}" if not view["reused_from"] else f"reused from run {view['reused_from']}, leg {view['leg']}"]
    if view["override"]:
        facts = ["overridden"]
    elif view["seconds"] is not None:
        facts.insert(0, seconds(view["seconds"]))
    if view["attempts"]:
        facts.append(f"{len(view['attempts']) + 1} attempts")
    if view["usage"]:
        usage = view["usage"]
        facts.append(f"{usage['model'] or 'model'}: {usage['input_tokens']:,} + {usage['output_tokens']:,} tokens")
        if usage["cost"] is not None:
            facts.append(f"${usage['cost']:.4f}")
    head = Text.assemble(
        (view["step"], "bold"), "  ", Text.from_markup(styled(view["status"])), (f"  {', '.join(facts)}", "dim")
    )
    console.print(head)
    console.print(Text(view["path"], style="dim"))
    if said := view["override"]:
        why = f": {said['why']}" if said["why"] else ""
        console.print(Text(f"Overridden by {said['by']} at {said['at']}{why}. What it returned:", style="yellow"))
        console.print(command_to_type(f"  kitaru step {said['of']} '{view['step']}'"))
    for past in view["earlier"]:
        console.print(Text(f"tried before in leg {past['leg']}: {past['failure'] or past['status']}", style="yellow"))
    for name, tree in view["inputs"].items():
        section(f"input {name}", value(tree))
    for what in view["opaque"]:
        console.print(Text(f"{what}: it has no JSON form, so the call is told by its type only", style="dim"))
    for number, attempt in enumerate(view["attempts"], 1):
        told = f"attempt {number} failed after {seconds(attempt['seconds'])}: {attempt['type'].rpartition(':')[2]}: {attempt['message']}"
        console.print(Text(told, style="yellow"))
    if view["failure"]:
        section("failure", traceback_of(Failure.model_validate(view["failure"])), "red")
    elif view["status"] == "finished":
        section("output", value(view["output"]), "green")
    elif view["status"] == "in doubt":
        console.print("It runs at most once, was started and has no outcome. Find out what happened, then:")
        console.print(command_to_type(f"  kitaru settle {run_id} '{view['step']}' --value JSON|--retry"))
    if view["metadata"]:
        section("metadata", value(view["metadata"]))
