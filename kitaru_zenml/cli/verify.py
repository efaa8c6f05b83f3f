"""`kitaru verify RUN`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import Exit, cli_command, command_to_type, console

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

    from kitaru_zenml.journal.journal import Journal


@cli_command("verify")
@click.argument("run")
def command(run: str, output: str) -> Any:
    """Recompute every hash and root of RUN's journal, and compare it with ZenML's step runs. Exit code 1 on any difference.

    While the run goes on, ZenML may be behind: what it lacks then is said, and is no difference.

    JSON: {run_id, records, covered, legs, root, problems, notes, differences, status, ok}.
    """
    from kitaru_zenml.journal.verify import verify
    from kitaru_zenml.runs import find_run, open_journal

    found = find_run(run)
    journal = open_journal(found)
    noted: Any = found.run_metadata.get("kitaru")
    result = verify(journal, noted.get("root") if isinstance(noted, dict) else None)
    differences = _differences(found, journal)
    pending = not found.status.is_finished
    ok = result.ok and (pending or not differences)
    view = {**dataclasses.asdict(result), "differences": differences, "status": found.status.value, "ok": ok}
    if output == "text":
        _print(view, pending)
    return Exit(view, 0 if ok else 1)


def _differences(found: PipelineRunResponse, journal: Journal) -> list[str]:
    """Where ZenML tells another story than the records that can be read."""
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    from kitaru_zenml.errors import JournalGap
    from kitaru_zenml.lineage.compare import compare

    damaged: list[Exception] = []
    try:
        snapshot = journal.load(on_corrupt=damaged.append)
    except JournalGap:
        return []
    if damaged:  # step runs of records that cannot be read would look like ZenML's inventions
        return []
    steps = depaginate(Client().list_run_steps, pipeline_run_id=found.id, hydrate=True)
    return compare(snapshot.records, steps, snapshot.reused, {*snapshot.untaken, *snapshot.overridden})


def _print(view: dict[str, Any], pending: bool) -> None:
    legs = f"{view['legs']} leg{'s' * (view['legs'] != 1)}"
    console.print(f"Run {view['run_id']}: {view['records']} records of {legs}, {view['covered']} covered by closed legs")
    for problem in view["problems"]:
        console.print(Text.assemble(("✗ ", "red"), problem))
    for difference in view["differences"]:
        mark = ("… ", "yellow") if pending else ("✗ ", "red")
        console.print(Text.assemble(mark, f"ZenML: {difference}"))
    for note in view["notes"]:
        console.print(Text(f"  {note}", style="dim"))
    if view["ok"]:
        console.print(Text.assemble(("✓ ", "green"), f"nothing was changed or lost; root {view['root'][:16] or '(none yet)'}"))
    elif view["problems"]:
        console.print("The journal is not what was stored. Restore the named objects from a backup or an older object version.")
    else:
        console.print("The journal is whole; ZenML's picture of it is not.")
    if view["ok"] or view["problems"] or view["status"] == "completed":
        return
    console.print(Text.assemble("Lineage is completed by ", command_to_type(f"kitaru resume {view['run_id']}"), "."))
