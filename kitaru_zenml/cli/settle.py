"""`kitaru settle RUN STEP`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import cli_command, command_to_type, console


@cli_command("settle")
@click.argument("run")
@click.argument("step")
@click.option("--value", metavar="JSON", help="It took effect, and this is what it returned.")
@click.option("--retry", is_flag=True, help="It did not take effect: run it at the next resume.")
@click.option("--takeover", is_flag=True, help="Supersede an executor that is alive.")
def command(run: str, step: str, value: str | None, retry: bool, takeover: bool, output: str) -> Any:
    """Say what happened to an at-most-once STEP of RUN that was started and has no outcome.

    JSON: {run, step, settled}.
    """
    if retry == (value is not None):
        raise click.UsageError("Say one of --value JSON and --retry.")
    try:
        parsed = None if value is None else json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}. A string needs quotes: --value '\"text\"'.", param_hint="--value") from None
    from kitaru_zenml.resumption import settle
    from kitaru_zenml.runs import find_run

    run_id = str(find_run(run).id)
    settle(run_id, step, value=parsed, retry=retry, takeover=takeover)
    if output == "text":
        console.print(
            Text(f"Step {step} is settled: {'it runs again at the next resume' if retry else 'its outcome is stored'}.")
        )
        console.print(Text.assemble("Next: ", command_to_type(f"kitaru resume {run_id}")))
    return {"run": run_id, "step": step, "settled": "retry" if retry else "value"}
