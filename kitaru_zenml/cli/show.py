"""`kitaru show RUN`: the steps of a run as a tree."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from kitaru_zenml.cli.output import STYLES, ago, cli_command, command_to_type, console, seconds
from kitaru_zenml.errors import NoJournal
from kitaru_zenml.journal.records import Fork, StepRecord, display_name
from kitaru_zenml.progress import stem

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

    from kitaru_zenml.journal.journal import Journal

ENDED = ("completed", "failed", "stopped", "paused", "cancelled", "cached")
WAITING = ("wait", "timer", "event", "join")
NOT_BEGUN = ("initializing", "provisioning", "queued")
LOOK_EVERY = 0.7  # seconds
BEGIN_PATIENCE = 10.0  # seconds that --watch waits for the journal of a run that is starting


@cli_command("show")
@click.argument("run")
@click.option("--watch", is_flag=True, help="Follow the run until it ends.")
def command(run: str, watch: bool, output: str) -> Any:
    """Show the steps of RUN as a tree: status, which leg ran them, duration, tokens, and what to do next.

    JSON: {run, name, flow, status, created, legs: [{epoch, purpose, holder, taken_at}], executing, totals: {finished, failed, in_flight,
    kept_from_earlier_legs, reused, tokens, cost}, steps: [{step, path, kind, status, reused_from, override, leg, kept, attempts,
    generation, seconds, tokens, cost, model, started_at, failure}], open: {path: [names]}, replay_of, next}. `replay_of` is {run, start,
    reuse, label, by} of a fork; what it reuses counts neither tokens nor cost. A step's status is finished, failed, in flight, waiting, cut
    off (its process is gone) or in doubt. With --watch, the JSON is that of the end.
    """
    if not watch:
        view = look(run)
        if output == "text":
            console.print(render(view))
        return view
    return _watch(run, output)


def _watch(run: str, output: str) -> dict[str, Any]:
    view = _look_patiently(run)
    if output == "json":
        while not _is_over(view):
            time.sleep(LOOK_EVERY)
            view = look(view["run"])
        return view
    with Live(render(view, live=True), console=console, refresh_per_second=4, transient=True) as live:
        while not _is_over(view):
            time.sleep(LOOK_EVERY)
            view = look(view["run"])
            live.update(render(view, live=True))
    console.print(render(view))
    return view


def _look_patiently(run: str) -> dict[str, Any]:
    deadline = time.monotonic() + BEGIN_PATIENCE
    while True:
        try:
            return look(run)
        except NoJournal:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_EVERY)


def _is_over(view: dict[str, Any]) -> bool:
    return view["status"] in ENDED or view["status"] == "dead"


# --- what there is -------------------------------------------------------------------------------------------------------


def look(run: str) -> dict[str, Any]:
    """What `--output json` prints of a run."""
    from kitaru_zenml.artifact_store import open_store
    from kitaru_zenml.journal.journal import Journal
    from kitaru_zenml.runs import artifact_store_of, find_run

    found = find_run(run)
    journal = Journal(open_store(artifact_store_of(found)), str(found.id))
    if not journal.exists():
        if found.status.value in NOT_BEGUN:
            return _not_begun(found)
        raise NoJournal(str(found.id), journal.store.uri)
    return _begun(found, journal)


def _not_begun(found: PipelineRunResponse) -> dict[str, Any]:
    return {
        "run": str(found.id), "name": found.name, "flow": found.pipeline.name if found.pipeline else "", "status": found.status.value,
        "created": found.created, "legs": [], "executing": None, "totals": _totals([]), "steps": [], "open": {},
        "replay_of": None, "next": f"kitaru show {found.id} --watch",
    }  # fmt: skip


def _begun(found: PipelineRunResponse, journal: Journal) -> dict[str, Any]:
    from kitaru_zenml.journal.lease import is_gone
    from kitaru_zenml.resumption import in_doubt

    snapshot = journal.load()
    leases = journal.leases()
    executing = [lease for lease in leases if lease.purpose != "settle"]
    last = executing[-1] if executing else None
    beat = journal.beat(last.epoch) if last else None
    gone = last is not None and ((beat is not None and beat.released) or is_gone(last.holder))
    status = found.status.value
    if status in ("running", *NOT_BEGUN) and gone:
        status = "dead"
    idle = snapshot.untaken if snapshot.last_close is not None else snapshot.not_asked_for()
    steps = [
        _step(record, last.epoch if last else 0, record.object_key in snapshot.reused)
        for record in sorted(snapshot.current().values(), key=lambda r: r.number)
        if record.path != "/" and record.object_key not in idle
    ]
    known = {step["path"] for step in steps}
    doubtful = {m.scope.path: m for m in in_doubt(snapshot)} if status != "running" else {}
    for flight in beat.in_flight if beat is not None and not beat.released else ():
        if flight.path not in known and flight.path not in doubtful:
            cut = status not in ("running", "resuming")
            state = "cut off" if cut else "waiting" if flight.kind in WAITING else "in flight"
            steps.append(_open(flight.display, flight.path, flight.kind, state, flight.started_at))
    if status not in ("running", "resuming", "completed", "stopped"):
        steps = [step for step in steps if step["status"] != "cut off" or step["kind"] not in WAITING]
        steps += [_open(w.display, w.scope.path, w.kind, "waiting", w.asked_at) for w in snapshot.open_waits()]
    steps += [_open(m.display, path, m.scope.kind, "in doubt", m.started_at) for path, m in doubtful.items()]
    known = {step["path"] for step in steps}
    chains = [*(r.scopes for r in snapshot.records.values()), *(w.scopes for w in snapshot.open_waits())]
    opened = {scope.path: chain[: i + 1] for chain in chains for i, scope in enumerate(chain)}
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
            path: [display_name(s.name, s.ordinal, s.key) for s in chain] for path, chain in opened.items() if path not in known
        },
        "replay_of": None if snapshot.fork is None else _replay_of(snapshot.fork),
        "next": _next(str(found.id), status, steps),
    }


def _replay_of(fork: Fork) -> dict[str, Any]:
    return {"run": fork.origin, "start": fork.start, "reuse": fork.reuse, "label": fork.label, "by": fork.by}


def _step(record: StepRecord, leg: int, is_reused: bool) -> dict[str, Any]:
    usage, is_given = record.usage if not is_reused else None, is_reused or record.epoch == 0
    return {
        "step": record.display,
        "path": record.path,
        "kind": record.kind,
        "status": "failed" if record.failure is not None else "finished",
        "reused_from": record.run_id if is_reused else None,
        "override": record.metadata.get("override"),
        "leg": None if is_given else record.epoch,
        "kept": record.epoch < leg and not is_given,
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
        "step": display, "path": path, "kind": kind, "status": status, "reused_from": None, "override": None,
        "leg": None, "kept": False, "attempts": 1, "generation": 0,
        "seconds": None, "tokens": 0, "cost": None, "model": None, "started_at": started_at, "failure": None,
    }  # fmt: skip


def _totals(steps: list[dict[str, Any]]) -> dict[str, Any]:
    costs = [step["cost"] for step in steps if step["cost"] is not None]
    return {
        "finished": sum(s["status"] == "finished" for s in steps),
        "failed": sum(s["status"] == "failed" for s in steps),
        "in_flight": sum(s["status"] == "in flight" for s in steps),
        "kept_from_earlier_legs": sum(s["kept"] for s in steps),
        "reused": sum(s["reused_from"] is not None for s in steps),
        "tokens": sum(s["tokens"] for s in steps),
        "cost": sum(costs) if costs else None,
    }


def _next(run_id: str, status: str, steps: list[dict[str, Any]]) -> str:
    doubtful = next((s for s in steps if s["status"] == "in doubt"), None)
    if doubtful is not None:
        return f"kitaru settle {run_id} '{doubtful['step']}' --value JSON|--retry"
    if any(s["status"] == "waiting" and s["kind"] == "wait" for s in steps):
        return f"kitaru waits {run_id}"
    if status in ("failed", "dead", "paused"):
        return f"kitaru resume {run_id}"
    return f"kitaru show {run_id} --watch" if status not in ENDED else f"kitaru verify {run_id}"


# --- how it looks --------------------------------------------------------------------------------------------------------

MARKS = {"waiting": "◔", "finished": "✓", "failed": "✗", "in flight": "●", "cut off": "○", "in doubt": "?"}
FOLD_FROM = 12  # finished siblings of one name


def render(view: dict[str, Any], live: bool = False) -> Group:
    """A view for a person; while it is `live`, what finished takes little room: what it did inside, and many of a kind, are folded."""
    head = Text.assemble((view["flow"], "bold"), " ", (view["status"], STYLES.get(view["status"], "default")))
    head.append(f"  run {view['run']}  started {ago(view['created'])}", "dim")
    facts = Text(f"{_facts(view)}", "dim")
    if view["replay_of"]:
        head.append(f"\n{_origin(view['replay_of'])}", "dim")
    following = Text.assemble("Next: ", command_to_type(view["next"]))
    if view["status"] in ("failed", "dead"):
        following = Text.assemble("Why:  ", command_to_type(f"kitaru failure {view['run']}"), "\n", following)
    tree = Tree(head, guide_style="dim")
    if live:  # at the top, because what does not fit is cut off at the bottom
        tree.label = Text.assemble(head, "\n", facts)
        _Growing(tree, view, fold=True, is_low=view["totals"]["in_flight"] * 2 > console.height).grow()
        return Group(tree)
    _Growing(tree, view).grow()
    return Group(tree, facts, following)


def _origin(origin: dict[str, Any]) -> str:
    told = f"Replay of {origin['run']}"
    told += f" from {origin['start']}" if origin["start"] else ""
    told += ", reusing later steps with the same inputs" if origin["reuse"] == "unchanged" else ""
    return told + f", by {origin['by']}" + (f": {origin['label']}" if origin["label"] else "")


def _facts(view: dict[str, Any]) -> str:
    totals = view["totals"]
    facts = f"{totals['finished']} finished"
    for name in ("failed", "in_flight"):
        facts += f", {totals[name]} {name.replace('_', ' ')}" if totals[name] else ""
    if totals["kept_from_earlier_legs"]:
        facts += f", {totals['kept_from_earlier_legs']} of them kept from earlier legs"
    if totals["reused"]:
        facts += f", {totals['reused']} of them reused from the run this replays"
    if totals["tokens"]:
        facts += f", {totals['tokens']:,} tokens" + (f", ${totals['cost']:.4f}" if totals["cost"] is not None else "")
    if len(view["legs"]) > 1:
        facts += f"; {len(view['legs'])} legs"
    if view["executing"]:
        facts += f"; executed by {view['executing']}"
    return facts


class _Growing:
    """The tree of a view's steps, nested by scope, in the order in which they started.

    With `fold`, what finished is counted or left out; if the terminal `is_low`, too, a step and the one it waits for share a line.
    """

    def __init__(self, tree: Tree, view: dict[str, Any], *, fold: bool = False, is_low: bool = False) -> None:
        self._view, self._fold, self._is_low = view, fold, is_low
        self._nodes: dict[str, Tree] = {"": tree}
        self._children: dict[str, list[dict[str, Any]]] = {}
        for step in view["steps"]:
            self._children.setdefault(_parent(step["path"]), []).append(step)

    def grow(self) -> None:
        self._below("")
        while self._children:  # below scopes without a record
            self._below(min(self._children, key=len))

    def _node(self, path: str) -> Tree:
        if path not in self._nodes:  # a step that was begun and not finished, or a scope, which has no outcome of its own
            names = self._view["open"].get(path) or [path.rpartition("/")[2]]
            is_over = self._view["status"] == "completed"
            line = (
                Text.assemble(("▸ ", "dim"), names[-1])
                if is_over
                else Text.assemble(("○ ", "yellow"), names[-1], ("  begun", "dim"))
            )
            self._nodes[path] = self._node(_parent(path)).add(line)
        return self._nodes[path]

    def _below(self, path: str) -> None:
        steps = sorted(self._children.pop(path, ()), key=lambda s: s["started_at"])
        folded = self._folded(steps if self._fold else [s for s in steps if s["kind"] == "event"])
        for name, count in folded.items():
            self._node(path).add(Text.assemble(("✓ ", "green"), name, (f"  {count} finished", "dim")))
        for step in steps:
            is_done = step["status"] == "finished"
            if is_done and stem(_name(step)) in folded:
                self._forget(step["path"])
                continue
            if self._is_low and not is_done:
                step = self._innermost(step)
            self._nodes[step["path"]] = self._node(path).add(_line(step))
            if is_done and self._fold:
                self._forget(step["path"])
            else:
                self._below(step["path"])

    def _innermost(self, step: dict[str, Any]) -> dict[str, Any]:
        """The step that this one waits for, if that is one, under both names."""
        name = _name(step)
        while True:
            inside = [s for s in self._children.get(step["path"], ()) if s["status"] != "finished"]
            if len(inside) != 1:
                return {**step, "shown": name}
            for finished in self._children.pop(step["path"]):
                if finished is not inside[0]:
                    self._forget(finished["path"])
            step = inside[0]
            name = f"{name}/{_name(step)}"

    def _folded(self, steps: list[dict[str, Any]]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for step in steps:
            if step["status"] == "finished":
                counts[stem(_name(step))] = counts.get(stem(_name(step)), 0) + 1
        return {name: count for name, count in counts.items() if count >= FOLD_FROM}

    def _forget(self, path: str) -> None:
        for below in [p for p in self._children if p == path or p.startswith(path + "/")]:
            del self._children[below]


def _name(step: dict[str, Any]) -> str:
    return str(step["step"].rpartition("/")[2])


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _line(step: dict[str, Any]) -> Text:
    if step["seconds"] is not None:
        facts = [seconds(step["seconds"])]
    elif step["status"] in ("in flight", "waiting"):
        facts = [
            f"{'waits ' if step['status'] == 'waiting' else ''}for {seconds((datetime.now(UTC) - step['started_at']).total_seconds())}"
        ]
    else:
        facts = [f"{step['status']}, began {ago(step['started_at'])}"]
    if step["attempts"] > 1:
        facts.append(f"{step['attempts']} attempts")
    if step["generation"]:
        facts.append(f"tried again {step['generation']}x")
    if step["reused_from"]:
        facts = ["reused" + (f" from {step['reused_from'][:8]}" if step["reused_from"] else "")]
    if step["override"]:
        facts = [f"overridden by {step['override']['by']}" + (f": {why}" if (why := step["override"]["why"]) else "")]
    if step["kept"]:
        facts.append(f"kept from leg {step['leg']}")
    if step["tokens"]:
        facts.append(f"{step['tokens']:,} tokens" + (f", ${step['cost']:.4f}" if step["cost"] is not None else ""))
    mark, shown = (f"{MARKS[step['status']]} ", STYLES[step["status"]]), step.get("shown") or _name(step)
    line = Text.assemble(mark, shown, (f"  {' · '.join(facts)}", "dim"))
    if step["failure"]:
        line.append(f"  {step['failure'].partition(chr(10))[0][:100]}", "red")
    return line
