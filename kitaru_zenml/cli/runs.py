"""`kitaru runs`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from kitaru_zenml.cli.output import STYLES, ago, cli_command, command_to_type, console

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

PAGE = 50


@cli_command("runs")
@click.option("--flow", help="Only runs of this flow.")
@click.option("--status", help="Only runs with this status: running, dead, completed, failed, paused, ...")
@click.option("--since", type=click.FloatRange(min=0), metavar="HOURS", help="Only runs created in the last so many hours.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many, the newest first.")
def command(flow: str | None, status: str | None, since: float | None, limit: int, output: str) -> Any:
    """List the runs of kitaru flows, the newest first.

    A run that ZenML takes for running, though its process is gone, is `dead`: resume it.

    JSON: a list of {id, name, flow, status, created, stack}.
    """
    from zenml.client import Client
    from zenml.enums import ExecutionStatus

    from kitaru_zenml.runs import flow_options

    filters: dict[str, Any] = {"sort_by": "desc:created", "hydrate": True, "size": PAGE}
    if flow:
        filters["pipeline"] = flow
    if status:
        wanted = "running" if status == "dead" else status
        known = sorted(s.value for s in ExecutionStatus)
        if wanted not in known:
            raise click.BadParameter(f"`{status}` is not one of dead, {', '.join(known)}.", param_hint="--status")
        filters["status"] = wanted
    if since is not None:
        filters["created"] = f"gt:{datetime.now(UTC) - timedelta(hours=since):%Y-%m-%d %H:%M:%S}"
    found: list[dict[str, Any]] = []
    page, pages = 1, 1
    while len(found) < limit and page <= pages:
        batch = Client().list_pipeline_runs(page=page, **filters)
        page, pages = page + 1, batch.total_pages
        for run in batch.items:
            if len(found) == limit:
                break
            if flow_options(run) is None:
                continue
            view = _view(run)
            if status is None or view["status"] == status:
                found.append(view)
    if output == "text":
        _print(found, filtered=bool(flow or status or since))
    return found


def _view(run: PipelineRunResponse) -> dict[str, Any]:
    return {
        "id": str(run.id),
        "name": run.name,
        "flow": run.pipeline.name if run.pipeline else "",
        "status": "dead" if run.status.value == "running" and _is_dead(run) else run.status.value,
        "created": run.created,
        "stack": run.stack.name if run.stack else "",
    }


def _is_dead(run: PipelineRunResponse) -> bool:
    from kitaru_zenml.errors import KitaruError
    from kitaru_zenml.leg import found_dead
    from kitaru_zenml.runs import open_journal

    try:
        return found_dead(run, open_journal(run)) is not None
    except KitaruError:  # a list does not fail over the store of one run; `kitaru show` says what is wrong
        return False


def _print(found: list[dict[str, Any]], filtered: bool) -> None:
    if not found:
        console.print("No runs like that." if filtered else "No runs. Start one with `your_flow.run(...)`.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    rows = [[run["id"][:13], run["flow"], run["status"], ago(run["created"]), run["stack"], run["name"]] for run in found]
    for number, column in enumerate(("run", "flow", "status", "created", "stack", "name")):
        # What does not fit is taken from the name.
        wide = max(len(row[number]) for row in rows) if column != "name" else 4
        table.add_column(column, no_wrap=True, min_width=max(wide, len(column)))
    for row in rows:
        table.add_row(*(Text(text, style=STYLES.get(text, "default") if n == 2 else "") for n, text in enumerate(row)))
    console.print(table)
    dead = next((run for run in found if run["status"] == "dead"), None)
    advice = f"kitaru resume {dead['id'][:13]}" if dead else f"kitaru show {found[0]['id'][:13]}"
    console.print(Text.assemble("\nNext: ", command_to_type(advice)))
