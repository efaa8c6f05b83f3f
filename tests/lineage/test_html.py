"""The pages: everything escaped, nothing from elsewhere, chats as chats, large values cut."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest

from kitaru_zenml.codec import to_tree
from kitaru_zenml.journal.records import Attempt, Failure, JsonValue, StepRecord, Usage
from kitaru_zenml.lineage import html

EPOCH = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
EVIL = "<script>alert('x')</script>\"&"


def record(**fields: Any) -> StepRecord:
    values: dict[str, Any] = {
        "nonce": "n", "run_id": "r", "epoch": 1, "path": "/ask@1#.0", "name": "ask", "ordinal": 0, "number": 0, "digest": "d",
        "turn": ("", 0), "started_at": EPOCH, "ended_at": EPOCH + timedelta(seconds=2), "outcome": JsonValue(data=1),
    }  # fmt: skip
    return StepRecord(**{**values, **fields})


def view(record: StepRecord, output: Any = 1) -> str:
    return html.step_view(record, output, {"fetch-0": "fetch#0"}.get)


class Checker(HTMLParser):
    """Fails on scripts, on anything fetched, and on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "img", "iframe", "link", "object"}
        assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onload"}
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> str:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "http" not in page
    assert "prefers-color-scheme:dark" in page
    return page


def test_everything_from_a_run_is_escaped() -> None:
    failure = Failure(type=EVIL, message=EVIL, traceback=EVIL)
    attempt = Attempt(started_at=EPOCH, ended_at=EPOCH, failure=failure)
    one = record(
        name=EVIL, key=EVIL, kind=EVIL, inputs={EVIL: EVIL, "m": [{"role": "user", "content": EVIL}]}, metadata={EVIL: EVIL},
        attempts=(attempt,), usage=Usage(model=EVIL), drift=(EVIL,),
    )  # fmt: skip
    assert "<script" not in check(view(one, {EVIL: EVIL}))
    assert "<script" not in check(view(record(outcome=None, failure=failure, inputs={"a": EVIL})))


def test_the_head_says_status_duration_attempts_tokens_and_cost() -> None:
    failure = Failure(type="builtins:OSError", message="no line", traceback="Traceback: no line")
    attempt = Attempt(started_at=EPOCH, ended_at=EPOCH, failure=failure)
    page = check(view(record(attempts=(attempt,), usage=Usage(model="m1", input_tokens=1200, output_tokens=30, cost=0.0123))))
    for fact in ("ask#0", "completed", "2 s", "2 attempts", "m1", "1,200 + 30 tokens", "$0.0123", "Attempt 1 failed"):
        assert fact in page


def test_a_failure_is_shown_with_its_traceback() -> None:
    failure = Failure(type="builtins:OSError", message="no line", traceback="Traceback (most recent call last): x")
    page = check(view(record(outcome=None, failure=failure)))
    assert "builtins.OSError" in page
    assert "most recent call last" in page


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}],
        [{"type": "system", "content": "be kind"}, {"type": "human", "content": [{"type": "text", "text": "hello there"}]}],
        [{"kind": "request", "parts": [{"part_kind": "user-prompt", "content": "hello there"}]}],
        {"messages": [{"role": "user", "blocks": [{"block_type": "text", "text": "hello there"}]}]},
    ],
)
def test_what_looks_like_a_chat_is_shown_as_one(messages: Any) -> None:
    page = check(view(record(inputs={"messages": to_tree(messages)}), {"role": "assistant", "content": "hi"}))
    assert '<div class="turn user"><b>user</b><pre>hello there</pre>' in page
    assert '<div class="turn assistant"><b>assistant</b><pre>hi</pre>' in page


def test_a_models_plain_prompt_and_answer_are_a_chat() -> None:
    page = check(view(record(kind="model", inputs={"prompt": "why?"}), "because"))
    assert "<pre>why?</pre>" in page
    assert '<div class="turn assistant"><b>assistant</b><pre>because</pre>' in page


def test_a_tool_call_in_an_answer_is_shown() -> None:
    answer = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "refund", "arguments": '{"id": 7}'}}]}
    page = check(view(record(kind="model", inputs={"prompt": "x"}), answer))
    assert "→ refund({&quot;id&quot;: 7})" in page


def test_references_are_named_not_followed() -> None:
    messages = {"$list": [["fetch-0", "/messages"], [{"role": "user", "content": "next"}]]}
    page = check(view(record(inputs={"messages": messages, "of": {"$outcome": "fetch-0"}})))
    assert "as `messages` of fetch#0" in page
    assert "output of fetch#0" in page


def test_large_values_are_cut_with_their_size_said() -> None:
    page = check(view(record(inputs={"text": "a" * 500_000}), html.NotAtHand(10_000_000)))
    assert len(page) < 50_000
    assert "480,000 of 500,000 characters left out" in page
    assert "10,000,000 bytes" in page
    many = [{"role": "user", "content": f"message {n}"} for n in range(500)]
    page = check(view(record(inputs={"messages": many})))
    assert "earlier messages left out" in page
    assert "message 499" in page


def test_ordinary_data_is_no_chat() -> None:
    inputs = {"rows": [{"type": "a", "value": 1}], "x": {"role": "admin"}}
    page = check(view(record(inputs=inputs), [{"role": "owner", "text": "t"}]))
    assert 'class="turn' not in page
