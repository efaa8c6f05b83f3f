"""`kitaru send RUN EVENT [PAYLOAD]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import cli_command, command_to_type, console, given_value, value_of_file


@cli_command("send")
@click.argument("run")
@click.argument("event")
@click.argument("payload", required=False)
@click.option(
    "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Take the payload, JSON, from a file."
)
@click.option("--key", help="Idempotency key: sent again under the same key, the event still comes once.")
def command(run: str, event: str, payload: str | None, file: Path | None, key: str | None, output: str) -> Any:
    """Send EVENT to RUN; its flow gets it from `event(...)`. PAYLOAD is JSON, or a text as it is.

    JSON: {run, event, key, payload}.
    """
    if payload is not None and file is not None:
        raise click.UsageError("Give the payload once: PAYLOAD or --file.")
    from kitaru_zenml.client import send_event

    value = value_of_file(file) if file is not None else None if payload is None else given_value(payload)
    sent = send_event(run, event, value, idempotency_key=key)
    if output == "text":
        console.print(Text(f"Sent `{event}` to run {sent.run_id}, under the key {sent.idempotency_key}."))
        console.print(Text.assemble("Next: ", command_to_type(f"kitaru resume {sent.run_id}"), " if no worker runs"))
    return {"run": sent.run_id, "event": event, "key": sent.idempotency_key, "payload": sent.payload}
