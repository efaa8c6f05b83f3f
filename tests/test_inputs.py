"""Inputs: what calls are told apart by, and how they are kept in linear space."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kitaru_zenml.inputs import References, digest_inputs, reference_digest, references, resolve_inputs


def test_the_order_of_keys_does_not_tell_calls_apart() -> None:
    assert digest_inputs({"a": {"x": 1, "y": 2}}).digest == digest_inputs({"a": {"y": 2, "x": 1}}).digest


def test_equal_looking_values_of_other_types_are_told_apart() -> None:
    values: list[Any] = [1, "1", 1.5, "1.5", True, None, [1], (1,), {"a": 1}, [], {}, b"1"]
    digests = [digest_inputs({"a": v}).digest for v in values]
    assert len(set(digests)) == len(values)


def test_an_ignored_argument_does_not_count() -> None:
    assert digest_inputs({"a": 1, "now": 2}, ("now",)).digest == digest_inputs({"a": 1, "now": 3}, ("now",)).digest


def test_an_argument_without_a_json_form_counts_by_its_type_and_is_named() -> None:
    class Client:
        pass

    first, second = digest_inputs({"client": Client(), "x": 1}), digest_inputs({"client": Client(), "x": 1})
    assert first.digest == second.digest and first.opaque[0].startswith("client: ")
    assert digest_inputs({"client": object(), "x": 1}).digest != first.digest


def chat(turns: int) -> list[dict[str, str]]:
    return [{"role": "user" if n % 2 else "assistant", "content": f"message {n} " * 40} for n in range(turns)]


class Stored:
    """A run's records as far as inputs go."""

    def __init__(self) -> None:
        self.references, self.inputs, self.outcomes = References(), {}, {}

    def call(self, key: str, trees: dict[str, Any], outcome: Any = None) -> None:
        inputs, known = self.references.encode(trees)
        self.inputs[key], self.outcomes[key] = inputs, outcome
        self.references.learn(key, reference_digest(outcome) if outcome is not None else None, known)

    def resolved(self, key: str) -> dict[str, Any]:
        return resolve_inputs(self.inputs[key], self.inputs.__getitem__, self.outcomes.__getitem__)


def test_a_chat_stores_each_message_once() -> None:
    run, messages = Stored(), chat(200)
    for turn in range(1, 201):
        run.call(f"model-{turn}", {"messages": messages[:turn], "model": "m"})
    stored = sum(len(json.dumps(inputs)) for inputs in run.inputs.values())
    assert stored < 3 * len(json.dumps(messages))
    assert run.resolved("model-200")["messages"] == messages


def test_a_chat_that_carries_answers_refers_to_them() -> None:
    run, messages = Stored(), []
    for turn in range(50):
        messages = [*messages, {"role": "user", "content": f"question {turn} " * 20}]
        answer = {"role": "assistant", "content": f"answer {turn} " * 20}
        run.call(f"model-{turn}", {"messages": messages}, answer)
        messages = [*messages, answer]
    run.call("last", {"messages": messages})
    assert run.resolved("last")["messages"] == messages
    assert len(json.dumps(run.inputs["last"])) < 400
    assert references(run.inputs["last"]) == {"messages": ["model-49"]}


def test_an_outcome_in_a_list_or_dict_is_an_edge_one_level_deep() -> None:
    run = Stored()
    for name in "ab":
        run.call(name, {}, {"text": name * 100})
    run.call("join", {"parts": [{"text": "a" * 100}, {"text": "b" * 100}], "by_name": {"x": {"text": "a" * 100}}})
    assert references(run.inputs["join"]) == {"parts": ["a", "b"], "by_name": ["a"]}
    assert run.resolved("join")["by_name"] == {"x": {"text": "a" * 100}}


trees = st.recursive(
    st.none() | st.integers() | st.text(min_size=0, max_size=100),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.tuples(trees, trees), min_size=1, max_size=6))
def test_whatever_was_asked_can_be_shown_again(calls: list[tuple[Any, Any]]) -> None:
    run = Stored()
    for n, (asked, got) in enumerate(calls):
        run.call(str(n), {"a": asked, "all": [c[0] for c in calls[: n + 1]]}, got)
    for n, (asked, _) in enumerate(calls):
        assert run.resolved(str(n)) == {"a": asked, "all": [c[0] for c in calls[: n + 1]]}
