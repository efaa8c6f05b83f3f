"""`kitaru answer RUN [WAIT] [VALUE]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import cli_command, command_to_type, console, given_value, styled, value_of_file
from kitaru_zenml.cli.waits import shape

if TYPE_CHECKING:
    from kitaru_zenml.client import Question
    from kitaru_zenml.journal.records import Answer


@cli_command("answer")
@click.argument("run")
@click.argument("words", nargs=-1, metavar="[WAIT] [VALUE]")
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Take the value, JSON, from a file.")
@click.option("--interactive", is_flag=True, help="Be asked, field by field.")
@click.option("--abort", is_flag=True, help="Do not answer: cancel the run.")
@click.option("--by", help="Who answers; ZenML's user by default.")
@click.option("--no-resume", is_flag=True, help="Leave it to a worker to continue the run.")
def command(
    run: str,
    words: tuple[str, ...],
    file: Path | None,
    interactive: bool,
    abort: bool,
    by: str | None,
    no_resume: bool,
    output: str,
) -> Any:
    """Answer a question of RUN, and continue the run.

    WAIT is its name in the run (`kitaru waits` lists them); it may be left out if only one is open. VALUE is JSON, or a text as it is; a
    wait without a schema takes none. A value that does not fit is refused, and the wait stays open. A wait has one answer: an equal second
    one is fine, another is refused.

    JSON: {run, wait, value, by, at, status}: `status` is the run's, then.
    """
    from kitaru_zenml import client

    questions = client.waits(run)
    name, text = _name_and_value(run, words, questions, has_value=file is not None or interactive or abort)
    if abort:
        question = _the_question(run, name, questions)
        status = client.cancel(question.run_id, f"`{question.wait}` was aborted")
        if output == "text":
            console.print(f"Run {question.run_id} is {styled(status)}.")
        return {"run": question.run_id, "wait": question.wait, "value": None, "by": by, "at": None, "status": status}
    if interactive:
        if not sys.stdin.isatty():
            raise click.UsageError("--interactive needs a terminal. Give the value, or --file.")
        question = _the_question(run, name, questions)
        given = client.answer(question.run_id, _ask(question), wait=question.wait, by=by, via="cli")
    elif file is not None:
        given = client.answer(run, value_of_file(file), wait=name, by=by, via="cli")
    else:
        given = _answer_with(run, name, text, by)
    status = "" if no_resume else client.go_on(given)
    asked = next((q.wait for q in questions if q.key == given.wait), name or given.wait)
    view = {"run": given.run_id, "wait": asked, "value": given.value, "by": given.by, "at": given.at, "status": status}
    if output == "text":
        _print(view, given)
    return view


def _name_and_value(
    run: str, words: tuple[str, ...], questions: list[Question], *, has_value: bool
) -> tuple[str | None, str | None]:
    from kitaru_zenml.client import is_named

    if len(words) > 2:
        raise click.UsageError("Give one WAIT and one VALUE; a VALUE with spaces needs quotes.")
    if len(words) == 2:
        if has_value:
            raise click.UsageError("Give the value once: VALUE, --file, --interactive or --abort.")
        return words[0], words[1]
    if not words:
        return None, None
    word = words[0]
    is_name = any(is_named(q.wait, word) and q.json_schema is None for q in questions)
    return (word, None) if has_value or is_name else (None, word)


def _the_question(run: str, name: str | None, questions: list[Question]) -> Question:
    from kitaru_zenml.client import is_named
    from kitaru_zenml.errors import NoSuchWait

    fits = [q for q in questions if name is None or is_named(q.wait, name)]
    if len(fits) == 1:
        return fits[0]
    raise NoSuchWait(questions[0].run_id if questions else run, name, [q.wait for q in questions])


def _answer_with(run: str, name: str | None, text: str | None, by: str | None) -> Answer:
    """The value is JSON if it parses and fits, else the text itself."""
    from kitaru_zenml import client
    from kitaru_zenml.errors import InvalidAnswer

    if text is None:
        return client.answer(run, None, wait=name, by=by, via="cli")
    value = given_value(text)
    try:
        return client.answer(run, value, wait=name, by=by, via="cli")
    except InvalidAnswer as refused:
        if value == text:
            raise
        try:
            return client.answer(run, text, wait=name, by=by, via="cli")  # a text such as `123`
        except InvalidAnswer:
            raise refused from None


def _ask(question: Question) -> Any:
    console.print(Text(question.question or question.wait, style="bold"))
    for fact, value in question.metadata.items():
        console.print(Text(f"  {fact}: {value}", style="dim"))
    schema = question.json_schema
    if schema is None:
        click.confirm("Let the run go on?", abort=True, default=True)
        return None
    if schema.get("type") != "object" or "properties" not in schema:
        return _field("answer", schema, required=True)
    required = schema.get("required", ())
    fields = {name: _field(name, of, required=name in required) for name, of in schema["properties"].items()}
    return {name: value for name, value in fields.items() if value is not _LEFT_OUT}


_LEFT_OUT = object()


def _field(name: str, schema: dict[str, Any], *, required: bool) -> Any:
    label = schema.get("description") or name
    kind = schema.get("type")
    default = None if required else schema.get("default", "")
    if kind == "boolean":
        return click.confirm(label, default=default if isinstance(default, bool) else None)
    types: dict[Any, Any] = {"integer": int, "number": float}
    choice = click.Choice([str(c) for c in schema["enum"]]) if "enum" in schema else types.get(kind, str)
    given = click.prompt(f"{label} ({shape(schema)})", type=choice, default=default)
    if given == "" and not required:
        return _LEFT_OUT
    return given if kind == "string" or not isinstance(given, str) else given_value(given)


def _print(view: dict[str, Any], given: Answer) -> None:
    console.print(Text(f"Answered, by {given.by} at {given.at:%Y-%m-%d %H:%M:%S} UTC."))
    if view["status"]:
        console.print(f"Run {view['run']} is {styled(view['status'])}.")
    next_command = "kitaru worker" if not view["status"] else f"kitaru show {view['run']}"
    console.print(Text.assemble("Next: ", command_to_type(next_command)))
