"""`kitaru runs`."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import click
from rich.table import Table

from kitaru_zenml.cli.output import ago, cli_command, console, styled


@cli_command("runs")
@click.option("--flow", help="Only runs of this flow.")
@click.option("--status", help="Only runs with this status: running, completed, failed, paused, ...")
@click.option("--since", type=float, metavar="HOURS", help="Only runs created in the last so many hours.")
@click.option("--limit", default=20, show_default=True, help="At most so many, the newest first.")
def command(flow: str | None, status: str | None, since: float | None, limit: int, output: str) -> Any:
    """List the runs of kitaru flows, the newest first.

    JSON: a list of {id, name, flow, status, created, stack}.
    """
    from zenml.client import Client

    from kitaru_zenml.runs import flow_options

    filters: dict[str, Any] = {"sort_by": "desc:created", "hydrate": True, "size": min(max(limit * 2, 20), 200)}
    if flow:
        filters["pipeline"] = flow
    if status:
        filters["status"] = status
    if since is not None:
        filters["created"] = f"gt:{datetime.utcnow() - timedelta(hours=since):%Y-%m-%d %H:%M:%S}"
    found: list[dict[str, Any]] = []
    page = 1
    while len(found) < limit:
        batch = Client().list_pipeline_runs(page=page, **filters)
        for run in batch.items:
            if flow_options(run) is not None and len(found) < limit:
                found.append(
                    {
                        "id": str(run.id),
                        "name": run.name,
                        "flow": run.pipeline.name if run.pipeline else "",
                        "status": run.status.value,
                        "created": run.created,
                        "stack": run.stack.name if run.stack else "",
                    }
                )
        if page >= batch.total_pages:
            break
        page += 1
    if output == "text":
        _print(found)
    return found


def _print(found: list[dict[str, Any]]) -> None:
    if not found:
        console.print("No runs. Start one with `your_flow.run(...)`.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("run", "flow", "status", "created", "stack", "name"):
        table.add_column(column, no_wrap=column in ("run", "status"))
    for run in found:
        table.add_row(run["id"][:13], run["flow"], styled(run["status"]), ago(run["created"]), run["stack"], run["name"])
    console.print(table)
    console.print("\nLook at one with [bold]kitaru show RUN[/bold].")
