"""What every command shares: the output option, errors as messages and exit codes, and the words for times and sizes.

Exit codes: 0 fine, 1 an error or a difference found, 2 wrong usage (click's).
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console

from kitaru_zenml.errors import KitaruError

console = Console(highlight=False, soft_wrap=True)
STYLES = {
    "completed": "green", "finished": "green", "ok": "green", "running": "cyan", "in flight": "cyan", "resuming": "cyan", "failed": "red",
    "problem": "red", "in doubt": "red", "paused": "yellow", "dead": "yellow", "retried": "yellow", "stopped": "yellow",
}  # fmt: skip


def cli_command(name: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with `--output`; its function returns what `--output json` prints, and renders only if `output` is `text`."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def run(output: str, **arguments: Any) -> None:
            _quieten_zenml()
            code = 0
            try:
                result = function(output=output, **arguments)
                if isinstance(result, Exit):
                    code, result = result.code, result.result
            except KitaruError as error:
                _fail(error, output, str(error), _attributes(error))
            except click.ClickException:
                raise
            except Exception as error:
                _fail(error, output, _said(error), {})
            if output == "json":
                click.echo(json.dumps(result, indent=2, default=_plain))
            sys.exit(code)

        option = click.option(
            "--output", "-o", type=click.Choice(["text", "json"]), default="text", help="How to print the result."
        )
        made: click.Command = click.command(name, **settings)(option(run))  # type: ignore[no-untyped-call, unused-ignore]
        return made

    return decorate


@dataclass(frozen=True)
class Exit:
    """A command's result together with an exit code of its own."""

    result: Any
    code: int


def _fail(error: Exception, output: str, message: str, attributes: dict[str, Any]) -> None:
    if output == "json":
        click.echo(json.dumps({"error": type(error).__name__, "message": message, **attributes}, default=_plain))
    else:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]Error:[/red] {_escaped(message)}")
        for note in getattr(error, "__notes__", ()):
            Console(stderr=True, highlight=False, soft_wrap=True).print(_escaped(note))
    if os.environ.get("KITARU_DEBUG"):
        raise error
    sys.exit(1)


def _said(error: Exception) -> str:
    from kitaru_zenml.leg import is_unreachable

    if is_unreachable(error) and not getattr(error, "__notes__", ()):  # a flow's own error has a note that names its run
        return f"ZenML cannot be reached: {error}. Check the connection with `zenml status`; the journal of a run is safe meanwhile."
    return f"{type(error).__name__}: {error}"


def _attributes(error: KitaruError) -> dict[str, Any]:
    return {name: value for name, value in vars(error).items() if not name.startswith("_") and name != "value"}


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _plain(value: Any) -> Any:
    if isinstance(value, dt.datetime):
        return value.isoformat()
    return str(value)


def _quieten_zenml() -> None:
    os.environ.setdefault("ZENML_LOGGING_VERBOSITY", "ERROR")
    os.environ.setdefault("ZENML_ENABLE_RICH_TRACEBACK", "false")


# --- words ---------------------------------------------------------------------------------------------------------------


def styled(status: str) -> str:
    """A status in its colour."""
    return f"[{STYLES.get(status, 'default')}]{status}[/]"


def seconds(value: float | None) -> str:
    """A duration for a person."""
    if value is None:
        return ""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return str(dt.timedelta(seconds=round(value)))


def ago(at: dt.datetime | None) -> str:
    """How long ago, for a person."""
    if at is None:
        return ""
    at = at if at.tzinfo else at.replace(tzinfo=dt.UTC)
    passed = (dt.datetime.now(dt.UTC) - at).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed // size:.0f} {unit} ago"
    return f"{max(passed, 0):.0f} s ago"
