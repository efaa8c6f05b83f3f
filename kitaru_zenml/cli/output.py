"""What every command shares: its options, errors as messages and exit codes, and how values and times look.

Exit codes: 0 fine, 1 an error or a difference found, 2 wrong usage (click's). With `--output json` a command prints its result, or
`{"error": type, "message": ..., and what the error knows}`, to stdout and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from kitaru_zenml.errors import KitaruError
from kitaru_zenml.progress import words

WIDE = 240  # columns where there is no terminal: a file or a pipe loses nothing at its edge
_width = None if (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ else WIDE
console = Console(highlight=False, soft_wrap=True, width=_width)
STYLES = {
    "completed": "green", "finished": "green", "ok": "green", "running": "cyan", "in flight": "cyan", "resuming": "cyan", "failed": "red",
    "problem": "red", "in doubt": "red", "paused": "yellow", "dead": "yellow", "retried": "yellow", "stopped": "yellow",
    "waiting": "yellow", "cut off": "yellow",
}  # fmt: skip
SHOWN = 4000  # characters of a value on a terminal
OUR_FRAMES = re.compile(r'  File "[^"]*[/\\](kitaru_zenml|asyncio)[/\\][^"]*", line \d+, in .*\n(?:    .*\n)*')


def cli_command(name: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with `--output` and `--debug`.

    Its function returns what `--output json` prints, or an `Exit` with it, and renders it only if `output` is `text`.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def run(output: str, debug: bool, **arguments: Any) -> None:
            _quieten_zenml()
            code = 0
            try:
                # What a flow or ZenML's log prints must not get into the JSON.
                with contextlib.redirect_stdout(_Aside()) if output == "json" else contextlib.nullcontext():
                    result = function(output=output, **arguments)
                if isinstance(result, Exit):
                    code, result = result.code, result.result
            except click.ClickException:
                raise
            except Exception as error:
                _fail(error, output)
                if debug or os.environ.get("KITARU_DEBUG"):
                    raise
                sys.exit(1)
            if output == "json":
                click.echo(json.dumps(result, indent=2, default=_plain))
            sys.exit(code)

        formats = click.Choice(["text", "json"])
        with_output = click.option("--output", "-o", type=formats, default="text", help="How to print the result.")
        with_debug = click.option("--debug", is_flag=True, help="Print the traceback of an error.")
        made: click.Command = click.command(name, **settings)(with_output(with_debug(run)))  # type: ignore[no-untyped-call, unused-ignore]
        return made

    return decorate


@dataclass(frozen=True)
class Exit:
    """A command's result together with an exit code of its own."""

    result: Any
    code: int


def _fail(error: Exception, output: str) -> None:
    message = str(error) if isinstance(error, KitaruError) else _said(error)
    if output == "json":
        facts = _attributes(error) if isinstance(error, KitaruError) else {}
        click.echo(json.dumps({"error": type(error).__name__, "message": message, **facts}, default=_plain))
        return
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    stderr.print(Text.assemble(("Error:", "red"), " ", message))
    for note in getattr(error, "__notes__", ()):
        stderr.print(Text(note))


def _said(error: Exception) -> str:
    from kitaru_zenml.leg import is_unreachable

    if is_unreachable(error) and not getattr(error, "__notes__", ()):  # a flow's own error has a note that names its run
        return f"ZenML cannot be reached: {error}. Check the connection with `zenml status`; the journal of a run is safe meanwhile."
    return f"{type(error).__name__}: {error}"


def _attributes(error: KitaruError) -> dict[str, Any]:
    return {name: value for name, value in vars(error).items() if not name.startswith("_") and name != "value"}


def _plain(value: Any) -> Any:
    if isinstance(value, dt.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=dt.UTC)).isoformat()  # ZenML's times are UTC without saying so
    return str(value)


def _quieten_zenml() -> None:
    os.environ.setdefault("ZENML_LOGGING_VERBOSITY", "ERROR")
    os.environ.setdefault("ZENML_ENABLE_RICH_TRACEBACK", "false")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("ZENML_LOGGING_COLORS_DISABLED", "true")


class _Aside(io.TextIOBase):
    """Stands for stdout and writes to stderr, past the wrapper that ZenML puts around either: it stores each line once."""

    def write(self, text: str) -> int:
        stream: Any = sys.stderr
        return int(type(stream).write(stream, text))

    def flush(self) -> None:
        sys.stderr.flush()


# --- what a person gives ---------------------------------------------------------------------------------------------------


def given_value(text: str) -> Any:
    """A value as typed: JSON if it is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def value_of_file(path: Path) -> Any:
    """The JSON of a file.

    Raises:
        click.BadParameter: If it holds none.
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise click.BadParameter(f"`{path}` cannot be read as JSON: {error}") from None


# --- how things look -----------------------------------------------------------------------------------------------------
# Whatever comes from a run (names, keys, messages) may hold square brackets, which rich would take for markup: it goes in as `Text`, or
# escaped.


def styled(status: str) -> str:
    """A status in its colour, as markup."""
    return f"[{STYLES.get(status, 'default')}]{escape(status)}[/]"


def command_to_type(command: str) -> Text:
    """A command that the reader may type next."""
    return Text(command, style="bold")


def section(title: str, body: str, style: str = "dim") -> None:
    """Print a titled block, indented and unframed, so that it can be copied."""
    console.print(Text(title, style=style))
    console.print(Text("\n".join(f"  {line}" for line in body.splitlines()) or "  "))


def value(tree: Any) -> str:
    """A value for a person: text as it is, all else as JSON, the end left out if it is long."""
    text = tree if isinstance(tree, str) else json.dumps(tree, indent=2, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}\n... {len(text):,} characters; all of it with --output json"


def traceback_of(failure: Any) -> str:
    """The traceback of a stored failure, without the frames of the machinery around the user's code."""
    text = OUR_FRAMES.sub("", (failure.traceback or "").strip() + "\n").strip()
    return text or f"{failure.type.rpartition(':')[2]}: {failure.message}"


def seconds(duration: float | None) -> str:
    """A duration for a person."""
    return "" if duration is None else words(duration)


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
