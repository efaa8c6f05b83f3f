"""`kitaru cancel RUN`."""

from __future__ import annotations

from typing import Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import Exit, cli_command, command_to_type, console, styled


@cli_command("cancel")
@click.argument("run")
@click.option("--reason", default="", help="Why, for the record and the flow's `on_cancel`.")
@click.option("--keep-children", is_flag=True, help="Leave its child runs alone.")
@click.option("--timeout", type=float, default=60, show_default=True, help="Seconds to wait until it has stopped.")
def command(run: str, reason: str, keep_children: bool, timeout: float, output: str) -> Any:
    """Stop RUN at its next boundary, running or suspended; its child runs follow. Finished steps keep their results.

    JSON: {run, status}.
    """
    from kitaru_zenml.client import cancel
    from kitaru_zenml.runs import find_run

    run_id = str(find_run(run).id)
    status = cancel(run_id, reason, keep_children=keep_children, timeout=timeout)
    if output == "text":
        console.print(f"Run {run_id} is {styled(status)}.")
        if status != "stopped":
            console.print("It was asked to stop and does so at its next boundary.")
        console.print(Text.assemble("Next: ", command_to_type(f"kitaru show {run_id}")))
    return Exit({"run": run_id, "status": status}, 0 if status == "stopped" else 1)
