"""`kitaru waits [RUN]`."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from kitaru_zenml.cli.output import ago, cli_command, command_to_type, console, seconds

if TYPE_CHECKING:
    from kitaru_zenml.client import Question

_SCALARS = ("string", "integer", "number", "boolean", "array", "null")


@cli_command("waits")
@click.argument("run", required=False)
def command(run: str | None, output: str) -> Any:
    """List the questions that runs wait for, of all runs or of RUN, the oldest first.

    JSON: a list of {run_id, flow, wait, question, json_schema, metadata, asked_at, deadline, refused}.
    """
    from kitaru_zenml.client import waits

    found = waits(run)
    if output == "text":
        _print(found)
    return [dataclasses.asdict(question) for question in found]


def _print(found: list[Question]) -> None:
    if not found:
        console.print("Nothing waits for an answer.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("run", "flow", "wait"):
        table.add_column(column, no_wrap=True)
    for column in ("question", "answer", "asked"):
        table.add_column(column)
    for question in found:
        asked = ago(question.asked_at)
        if question.deadline is not None:
            asked += f", times out in {seconds(max(0.0, (question.deadline - datetime.now(UTC)).total_seconds()))}"
        table.add_row(
            *map(
                Text,
                (
                    question.run_id[:13],
                    question.flow,
                    question.wait,
                    question.question or "",
                    shape(question.json_schema),
                    asked,
                ),
            )
        )
        if question.refused:
            table.add_row("", "", "", Text(f"the last answer did not fit: {question.refused}", style="yellow"))
    console.print(table)
    first = found[0]
    value = "" if first.json_schema is None else " VALUE"
    console.print(Text.assemble("\nNext: ", command_to_type(f"kitaru answer {first.run_id[:13]} '{first.wait}'{value}")))


def shape(schema: dict[str, Any] | None) -> str:
    """What an answer looks like, in a few words."""
    if schema is None:
        return "none, it only lets the run go on"
    if "enum" in schema:
        return " | ".join(str(choice) for choice in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(shape(choice) for choice in schema["anyOf"])
    if schema.get("type") == "object" and "properties" in schema:
        required = schema.get("required", ())
        fields = (f"{name}{'' if name in required else '?'}: {shape(of)}" for name, of in schema["properties"].items())
        return "{" + ", ".join(fields) + "}"
    if schema.get("type") in _SCALARS:
        return str(schema["type"])
    return "JSON" if "$ref" not in schema else str(schema["$ref"].rpartition("/")[2])
