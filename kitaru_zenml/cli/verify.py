"""`kitaru verify RUN`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from kitaru_zenml.cli.output import Exit, cli_command, console


@cli_command("verify")
@click.argument("run")
def command(run: str, output: str) -> Any:
    """Recompute every hash and root of RUN's journal, and compare it with ZenML's step runs. Exit code 1 on any difference.

    JSON: {run_id, records, covered, legs, root, problems, notes, differences, ok}.
    """
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    from kitaru_zenml.journal.verify import verify
    from kitaru_zenml.lineage.compare import compare
    from kitaru_zenml.runs import find_run, open_journal

    found = find_run(run)
    journal = open_journal(found)
    noted: Any = found.run_metadata.get("kitaru")
    result = verify(journal, noted.get("root") if isinstance(noted, dict) else None)
    differences: list[str] = []
    if not any("corrupt" in problem for problem in result.problems):
        steps = depaginate(Client().list_run_steps, pipeline_run_id=found.id, hydrate=True)
        differences = compare(journal.load().records, steps)
    pending = not found.status.is_finished
    ok = result.ok and (pending or not differences)
    view = {**dataclasses.asdict(result), "differences": differences, "status": found.status.value, "ok": ok}
    if output == "text":
        _print(view, pending)
    return Exit(view, 0 if ok else 1)


def _print(view: dict[str, Any], pending: bool) -> None:
    console.print(
        f"Run {view['run_id']}: {view['records']} records, {view['covered']} covered by closed legs, {view['legs']} legs"
    )
    for problem in view["problems"]:
        console.print(f"[red]✗[/red] {problem}", markup=True)
    for difference in view["differences"]:
        console.print(
            f"[{'yellow' if pending else 'red'}]{'…' if pending else '✗'}[/] ZenML: {difference.replace('[', chr(92) + '[')}"
        )
    for note in view["notes"]:
        console.print(f"[dim]  {note.replace('[', chr(92) + '[')}[/dim]")
    if view["ok"]:
        console.print(f"[green]✓[/green] nothing was changed or lost; root {view['root'][:16] or '(none yet)'}")
    else:
        console.print("The journal, or ZenML's picture of it, is not what was stored. Restore the named objects from a backup; "
                      f"lineage alone is completed by [bold]kitaru resume {view['run_id']}[/bold].")  # fmt: skip
