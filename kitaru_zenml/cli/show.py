"""`kitaru show RUN`: the steps of a run as a tree."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from kitaru_zenml.cli.output import ago, cli_command, console, seconds, styled
from kitaru_zenml.journal.records import StepRecord, display_name

ENDED = ("completed", "failed", "stopped", "paused", "cancelled", "cached")


@cli_command("show")
@click.argument("run")
@click.option("--watch", is_flag=True, help="Follow the run until it ends.")
def command(run: str, watch: bool, output: str) -> Any:
    """Show the steps of RUN as a tree: status, which leg ran them, duration, tokens, and what to do next.

    JSON: {run, flow, status, legs, executing, totals, steps: [{step, path, kind, status, leg, kept, attempts, seconds, tokens, cost,
    model, started_at}], next}.
    """
    view = look(run)
    if output == "json":
        while watch and view["status"] not in ENDED:
            time.sleep(1)
            view = look(run)
        return view
    if not watch:
        console.print(render(view))
        return view
    with Live(render(view, tall=False), console=console, refresh_per_second=4) as live:
        while view["status"] not in ENDED and not _is_dead(view):
            time.sleep(0.7)
            view = look(view["run"])
            live.update(render(view, tall=False))
    return view


def _is_dead(view: dict[str, Any]) -> bool:
    return bool(view["status"] == "dead")


# --- what there is -------------------------------------------------------------------------------------------------------


def look(run: str) -> dict[str, Any]:
    """What `--output json` prints of a run."""
    from kitaru_zenml.journal.lease import is_gone
    from kitaru_zenml.resumption import in_doubt
    from kitaru_zenml.runs import find_run, open_journal

    found = find_run(run)
    journal = open_journal(found)
    snapshot = journal.load()
    leases = journal.leases()
    last = leases[-1] if leases else None
    beat = journal.beat(last.epoch) if last else None
    gone = last is not None and ((beat is not None and beat.released) or is_gone(last.holder))
    status = found.status.value
    if status in ("running", "initializing", "provisioning") and gone:
        status = "dead"
    leg = max((lease.epoch for lease in leases if lease.purpose != "settle"), default=0)
    steps = [_step(record, leg) for record in sorted(snapshot.current().values(), key=lambda r: r.number) if record.path != "/"]
    known = {step["path"] for step in steps}
    doubtful = {m.scope.path: m for m in in_doubt(snapshot)} if status not in ("running",) else {}
    for flight in beat.in_flight if beat is not None and not beat.released else ():
        if flight.path not in known and flight.path not in doubtful:
            cut = status not in ("running", "resuming")
            steps.append(_open(flight.display, flight.path, flight.kind, "cut off" if cut else "in flight", flight.started_at))
    steps += [_open(m.display, path, m.scope.kind, "in doubt", m.started_at) for path, m in doubtful.items()]
    opened = {s.path: (s, r.scopes[: i + 1]) for r in snapshot.records.values() for i, s in enumerate(r.scopes)}
    return {
        "run": str(found.id),
        "name": found.name,
        "flow": snapshot.info.flow if snapshot.info else "",
        "status": status,
        "created": found.created,
        "legs": [{"epoch": x.epoch, "purpose": x.purpose, "holder": str(x.holder), "taken_at": x.taken_at} for x in leases],
        "executing": None if last is None or gone or status in ENDED else str(last.holder),
        "totals": _totals(steps),
        "steps": steps,
        "open": {
            path: [display_name(s.name, s.ordinal, s.key) for s in chain]
            for path, (_, chain) in opened.items()
            if path not in known
        },
        "next": _next(str(found.id), status, steps),
    }


def _step(record: StepRecord, leg: int) -> dict[str, Any]:
    usage = record.usage
    return {
        "step": record.display,
        "path": record.path,
        "kind": record.kind,
        "status": "failed" if record.failure is not None else "finished",
        "leg": record.epoch,
        "kept": record.epoch < leg,
        "attempts": len(record.attempts) + 1,
        "generation": record.generation,
        "seconds": (record.ended_at - record.started_at).total_seconds(),
        "tokens": usage.input_tokens + usage.output_tokens if usage else 0,
        "cost": usage.cost if usage else None,
        "model": usage.model if usage else None,
        "started_at": record.started_at,
        "failure": f"{record.failure.type.rpartition(':')[2]}: {record.failure.message}" if record.failure else None,
    }


def _open(display: str, path: str, kind: str, status: str, started_at: Any) -> dict[str, Any]:
    return {
        "step": display, "path": path, "kind": kind, "status": status, "leg": None, "kept": False, "attempts": 1, "generation": 0,
        "seconds": None, "tokens": 0, "cost": None, "model": None, "started_at": started_at, "failure": None,
    }  # fmt: skip


def _totals(steps: list[dict[str, Any]]) -> dict[str, Any]:
    costs = [step["cost"] for step in steps if step["cost"] is not None]
    return {
        "finished": sum(s["status"] == "finished" for s in steps),
        "failed": sum(s["status"] == "failed" for s in steps),
        "in_flight": sum(s["status"] == "in flight" for s in steps),
        "kept_from_earlier_legs": sum(s["kept"] for s in steps),
        "tokens": sum(s["tokens"] for s in steps),
        "cost": sum(costs) if costs else None,
    }


def _next(run_id: str, status: str, steps: list[dict[str, Any]]) -> str:
    doubtful = next((s for s in steps if s["status"] == "in doubt"), None)
    if doubtful is not None:
        return f"kitaru settle {run_id} '{doubtful['step']}' --value JSON|--retry"
    if status in ("failed", "dead", "paused"):
        return f"kitaru resume {run_id}" + (f"   (why: kitaru failure {run_id})" if status == "failed" else "")
    return f"kitaru show {run_id} --watch" if status not in ENDED else f"kitaru verify {run_id}"


# --- how it looks --------------------------------------------------------------------------------------------------------

MARKS = {
    "finished": "[green]✓[/]",
    "failed": "[red]✗[/]",
    "in flight": "[cyan]●[/]",
    "cut off": "[yellow]○[/]",
    "in doubt": "[red]?[/]",
}
FOLD_FROM = 12  # finished siblings of one name


def render(view: dict[str, Any], tall: bool = True) -> Group:
    """A view for a person; not `tall` folds long runs of finished siblings."""
    totals = view["totals"]
    head = f"[bold]{view['flow']}[/bold] {styled(view['status'])}   run {view['run']}   started {ago(view['created'])}"
    facts = f"{totals['finished']} finished"
    for name in ("failed", "in_flight"):
        facts += f", {totals[name]} {name.replace('_', ' ')}" if totals[name] else ""
    if totals["kept_from_earlier_legs"]:
        facts += f", {totals['kept_from_earlier_legs']} of them kept from earlier legs"
    if totals["tokens"]:
        facts += f", {totals['tokens']:,} tokens" + (f", ${totals['cost']:.4f}" if totals["cost"] is not None else "")
    if view["executing"]:
        facts += f"; executed by {view['executing']}"
    tree = Tree(Text.from_markup(head), guide_style="dim")
    _grow(tree, view, fold=not tall)
    return Group(tree, Text.from_markup(f"[dim]{facts}[/dim]"), Text.from_markup(f"Next: [bold]{view['next']}[/bold]"))


def _grow(tree: Tree, view: dict[str, Any], fold: bool) -> None:
    nodes: dict[str, Tree] = {"": tree}
    children: dict[str, list[dict[str, Any]]] = {}
    for step in view["steps"]:
        children.setdefault(_parent(step["path"]), []).append(step)

    def node(path: str) -> Tree:
        if path not in nodes:  # a scope without a record: begun, not finished
            names = view["open"].get(path) or [path.rpartition("/")[2]]
            nodes[path] = node(_parent(path)).add(Text.from_markup(f"[yellow]○[/] {names[-1]} [dim]begun[/dim]"))
        return nodes[path]

    def grow(path: str) -> None:
        steps = sorted(children.pop(path, ()), key=lambda s: s["started_at"])
        folded = _folded(steps, children) if fold else {}
        for step in steps:
            name = _stem(step)
            if name in folded and step["status"] == "finished":
                continue
            nodes[step["path"]] = node(path).add(Text.from_markup(_line(step)))
            grow(step["path"])
        for name, count in folded.items():
            node(path).add(Text.from_markup(f"[green]✓[/] {name} [dim]{count} finished[/dim]"))

    grow("")
    while children:  # below scopes without a record
        grow(min(children, key=len))


def _folded(steps: list[dict[str, Any]], children: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for step in steps:
        if step["status"] == "finished" and not any(path.startswith(step["path"] + "/") for path in children):
            counts[_stem(step)] = counts.get(_stem(step), 0) + 1
    return {name: count for name, count in counts.items() if count >= FOLD_FROM}


def _stem(step: dict[str, Any]) -> str:
    return str(step["step"].rpartition("/")[2].partition("#")[0].partition("[")[0])


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _line(step: dict[str, Any]) -> str:
    name = step["step"].rpartition("/")[2].replace("[", "\\[")
    line = f"{MARKS[step['status']]} {name}"
    facts = [seconds(step["seconds"])] if step["seconds"] is not None else [step["status"]]
    if step["attempts"] > 1:
        facts.append(f"{step['attempts']} attempts")
    if step["kept"]:
        facts.append(f"kept from leg {step['leg']}")
    if step["tokens"]:
        facts.append(f"{step['tokens']} tokens")
    if step["failure"]:
        facts.append(step["failure"].splitlines()[0][:100].replace("[", "\\["))
    return f"{line} [dim]{' · '.join(facts)}[/dim]"
