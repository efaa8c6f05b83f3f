"""What the dashboard shows of a step: one self-contained HTML page, without scripts, readable in light and dark.

Everything that comes from a run is escaped, and long values are cut with their size said: the page shows a step, the journal
holds it. Inputs are shown as they are stored, with references named instead of followed, so that a page costs what its own
record costs.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from kitaru_zenml.journal.records import Failure, StepRecord

TEXT_LIMIT = 20_000  # characters of one value
TURN_LIMIT = 8_000  # characters of one chat message
TURNS = 60  # of a chat, the last ones

NameOf = Callable[[str], str | None]


@dataclass(frozen=True)
class NotAtHand:
    """A value too large to be read for a page; `size` in bytes."""

    size: int


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str
    text: str


def step_view(record: StepRecord, output: Any, name_of: NameOf) -> str:
    """The page of a step.

    Args:
        record: The step's record.
        output: The JSON tree of its outcome, or `NotAtHand`.
        name_of: The step run name of another record's key, if it has one.
    """
    parts = [_header(record)]
    if record.failure is not None:
        parts.append(failure_part(record.failure))
    turns = chat_turns(record, output, name_of)
    if turns:
        parts.append(_chat(turns))
    parts.append(_section("Inputs", _inputs(record, name_of), is_open=not turns))
    if record.failure is None:
        parts.append(_section("Output", value_part(output), is_open=not turns))
    for number, attempt in enumerate(record.attempts, 1):
        parts.append(_section(f"Attempt {number} failed", failure_part(attempt.failure), is_open=False))
    if record.metadata:
        parts.append(_section("Metadata", value_part(record.metadata), is_open=False))
    return page(record.display, "".join(parts))


def page(title: str, body: str) -> str:
    """A whole page around escaped HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="color-scheme" content="light dark"><style>{_STYLE}</style></head><body>{body}</body></html>'
    )


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of a name and escaped HTML."""
    return "<table>" + "".join(f"<tr><th>{escape(name)}</th><td>{cell}</td></tr>" for name, cell in rows) + "</table>"


def pre(text: str, limit: int = TEXT_LIMIT) -> str:
    """Preformatted text, cut in the middle at `limit` characters."""
    if len(text) <= limit:
        return f"<pre>{escape(text)}</pre>"
    half = limit // 2
    gap = f'<p class="note">… {len(text) - 2 * half:,} of {len(text):,} characters left out …</p>'
    return f"<pre>{escape(text[:half])}</pre>{gap}<pre>{escape(text[-half:])}</pre>"


def duration(span: timedelta) -> str:
    """`0.42 s`, `3 min 5 s`."""
    seconds = max(span.total_seconds(), 0.0)
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --- parts of a page -----------------------------------------------------------------------------------------------------


def _header(record: StepRecord) -> str:
    failed = record.failure is not None
    facts = [
        f'<span class="status {"failed" if failed else "done"}">{"failed" if failed else "completed"}</span>',
        escape(record.kind),
        escape(duration(record.ended_at - record.started_at)),
    ]
    if record.attempts:
        facts.append(f"{len(record.attempts) + 1} attempts")
    if (usage := record.usage) is not None:
        if usage.model:
            facts.append(escape(usage.model))
        facts.append(f"{usage.input_tokens:,} + {usage.output_tokens:,} tokens")
        if usage.cost is not None:
            facts.append(f"${usage.cost:,.4f}")
    if record.drift:
        facts.append("inputs drifted: " + escape(", ".join(record.drift)))
    return f'<h1>{escape(record.display)}</h1><p class="facts">{" · ".join(facts)}</p>'


def _section(title: str, body: str, *, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{body}</details>"


def _inputs(record: StepRecord, name_of: NameOf) -> str:
    if not record.inputs:
        return '<p class="note">none</p>'
    return table([(name, value_part(named(tree, name_of))) for name, tree in record.inputs.items()])


def value_part(tree: Any) -> str:
    """A JSON tree, indented."""
    if isinstance(tree, NotAtHand):
        return f'<p class="note">{tree.size:,} bytes, too large to show here: load the artifact version.</p>'
    if isinstance(tree, str):
        return pre(tree)
    return pre(json.dumps(plain(tree), indent=2, ensure_ascii=False, default=str))


def failure_part(failure: Failure) -> str:
    """An exception with its traceback."""
    head = f'<p class="failure"><b>{escape(failure.type.replace(":", "."))}</b>: {escape(failure.message[:TURN_LIMIT])}</p>'
    return head + (pre(failure.traceback) if failure.traceback else "")


def plain(tree: Any) -> Any:
    """A tagged JSON tree with its tags taken off, for people."""
    if type(tree) is list:
        return [plain(item) for item in tree]
    if type(tree) is not dict:
        return tree
    if "$type" not in tree:
        return {name: plain(value) for name, value in tree.items()}
    if tree["$type"] == "dict":
        return {str(plain(key)): plain(value) for key, value in tree["value"]}
    return plain(tree.get("value"))


def named(tree: Any, name_of: NameOf) -> Any:
    """Stored inputs in which references are named for people."""
    if type(tree) is list:
        return [named(item, name_of) for item in tree]
    if type(tree) is not dict:
        return tree
    if "$outcome" in tree:
        return f"↑ output of {_name(tree['$outcome'], name_of)}"
    if "$input" in tree:
        key, pointer = tree["$input"]
        return _same_as(key, pointer, name_of)
    if "$list" in tree:
        (key, pointer), tail = tree["$list"]
        return [_same_as(key, pointer, name_of), *(named(item, name_of) for item in tail)]
    return {name: named(value, name_of) for name, value in tree.items()}


def _same_as(key: str, pointer: str, name_of: NameOf) -> str:
    return f"↑ as `{pointer.lstrip('/')}` of {_name(key, name_of)}"


def _name(key: str, name_of: NameOf) -> str:
    return name_of(key) or key.rpartition("-")[0] or key


# --- chats ---------------------------------------------------------------------------------------------------------------

_ROLES = {
    "human": "user",
    "request": "user",
    "ai": "assistant",
    "response": "assistant",
    "model": "assistant",
    "developer": "system",
}
_TEXT_KEYS = ("content", "text", "parts", "blocks", "message", "value")


def chat_turns(record: StepRecord, output: Any, name_of: NameOf) -> list[Turn]:
    """The exchange of a step as messages; empty if it has none."""
    turns: list[Turn] = []
    for tree in record.inputs.values():
        turns += _turns(named(tree, name_of))
    answer = [] if isinstance(output, NotAtHand) else _turns(plain(output))
    if record.kind != "model" and not turns and not answer:
        return []
    if not answer and record.kind == "model" and output is not None and record.failure is None:
        answer = [Turn("assistant", _text(output) if not isinstance(output, NotAtHand) else f"{output.size:,} bytes")]
    if not turns and record.kind == "model":
        turns = [Turn("user", _text(named(tree, name_of))) for tree in record.inputs.values()]
    return turns + answer


def spoken(tree: Any) -> str:
    """What a model said, as text: its words, and its tool calls as `→ tool(arguments)`."""
    return _text(tree)


def _turns(tree: Any) -> list[Turn]:
    tree = plain(tree)
    if isinstance(tree, Mapping):
        if (role := _role(tree)) is not None:
            return [Turn(role, _text(tree))]
        messages = tree.get("messages")
        return _turns(messages) if isinstance(messages, list) else []
    if not isinstance(tree, list) or not tree:
        return []
    turns: list[Turn] = []
    for item in tree:
        if isinstance(item, str) and item.startswith("↑"):
            turns.append(Turn("note", item))
        elif isinstance(item, Mapping) and (role := _role(item)) is not None:
            turns.append(Turn(role, _text(item)))
        else:
            return []
    return turns if any(turn.role != "note" for turn in turns) else []


def _role(message: Mapping[str, Any]) -> str | None:
    """The role of what looks like a chat message of one of the usual frameworks."""
    if not any(key in message for key in _TEXT_KEYS):
        return None
    for key in ("role", "type", "kind"):
        role = message.get(key)
        if isinstance(role, str) and (role := _ROLES.get(role, role)) in ("user", "assistant", "system", "tool"):
            return role
    return None


def _text(tree: Any) -> str:
    tree = plain(tree)
    if isinstance(tree, str):
        return tree
    if isinstance(tree, list):
        return "\n".join(_text(item) for item in tree)
    if isinstance(tree, Mapping):
        texts = [_text(tree[key]) for key in _TEXT_KEYS if tree.get(key) not in (None, "", [])][:1]
        calls = tree.get("tool_calls") or ([tree] if "tool_name" in tree and "args" in tree else [])
        if isinstance(calls, list):
            texts += [_call(call) for call in calls if isinstance(call, Mapping)]
        if texts:
            return "\n".join(texts)
    return json.dumps(tree, ensure_ascii=False, default=str)


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    inner = function if isinstance(function, Mapping) else call
    name = inner.get("name") or inner.get("tool_name") or "tool"
    arguments = inner.get("arguments", inner.get("args", {}))
    return f"→ {name}({arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)})"


def _chat(turns: Sequence[Turn]) -> str:
    shown = turns[-TURNS:]
    left_out = len(turns) - len(shown)
    parts = [f'<p class="note">… {left_out} earlier messages left out …</p>'] if left_out else []
    for turn in shown:
        if turn.role == "note":
            parts.append(f'<p class="note">{escape(turn.text)}</p>')
        else:
            parts.append(f'<div class="turn {escape(turn.role)}"><b>{escape(turn.role)}</b>{pre(turn.text, TURN_LIMIT)}</div>')
    return f'<div class="chat">{"".join(parts)}</div>'


_STYLE = """
:root{color-scheme:light dark;--fg:#1c1e21;--bg:#fff;--soft:#f3f4f6;--line:#d9dce1;--dim:#646a73;--ok:#137a3f;--bad:#b3261e;
--user:#e3edfd;--assistant:#f3f4f6;--system:#fdf3d8;--tool:#e5f4ea}
@media(prefers-color-scheme:dark){:root{--fg:#e6e7ea;--bg:#17181b;--soft:#222428;--line:#3a3d43;--dim:#9aa0a8;--ok:#5fd08f;
--bad:#ff8a80;--user:#1d2f4d;--assistant:#25272c;--system:#3a3218;--tool:#1c3526}}
body{font:14px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);margin:0;padding:16px;max-width:960px}
h1{font-size:17px;margin:0;overflow-wrap:anywhere}h2{font-size:15px;margin:18px 0 6px}
.facts,.note{color:var(--dim);margin:4px 0 12px}.status{font-weight:600}.done{color:var(--ok)}.failed,.failure{color:var(--bad)}
details{border-top:1px solid var(--line);padding:8px 0}summary{cursor:pointer;font-weight:600}
pre{background:var(--soft);padding:8px 10px;border-radius:6px;margin:6px 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.45 ui-monospace,monospace}
table{border-collapse:collapse;width:100%}th{text-align:left;vertical-align:top;padding:8px 12px 8px 0;font-weight:500;
color:var(--dim);white-space:nowrap}td{width:100%}
.turn{margin:8px 0;padding:8px 12px;border-radius:10px;background:var(--assistant);max-width:85%}
.turn b{font-size:12px;color:var(--dim)}.turn pre{background:none;padding:0;margin:2px 0;font:inherit}
.user{background:var(--user);margin-left:auto}.system{background:var(--system)}.tool{background:var(--tool)}
"""
