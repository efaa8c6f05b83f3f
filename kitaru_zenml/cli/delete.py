"""`kitaru delete RUN`."""

from __future__ import annotations

from typing import Any

import click

from kitaru_zenml.cli.output import cli_command, console


@cli_command("delete")
@click.argument("run")
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(run: str, yes: bool, output: str) -> Any:
    """Delete RUN for good: its journal, its artifacts and its ZenML run. Refused while a fork needs it or somebody executes it.

    If it was cut short, the same command with the run's whole id finishes it.

    JSON: {run, deleted}.
    """
    if not yes:
        if output == "json":
            raise click.UsageError("Say --yes: with --output json nobody is asked.")
        click.confirm(f"Delete run {run} for good?", abort=True)
    from kitaru_zenml.deletion import delete

    run_id = delete(run)
    if output == "text":
        console.print(f"Run {run_id} is deleted.")
    return {"run": run_id, "deleted": True}
