"""A step's inputs: what they are compared by (a digest), and how they are kept in linear space (references).

Inputs are digested over their canonical JSON. An argument that has none, such as a client or `self`, counts by its type name. They
are stored as references to earlier outcomes and inputs plus the remainder inline, so that a chat of n turns stores O(n) bytes:

    {"$outcome": key}                       the outcome of that record
    {"$input": [key, pointer]}              a value inline in that record's inputs
    {"$list": [[key, pointer], [tail]]}     the list at that place, continued by the tail

A list of objects is digested as a chain over its items, so that a grown list finds the list it grew from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from kitaru_zenml.codec import Unencodable, to_tree, type_path

REFERENCE_FROM = 64  # bytes of JSON from which a value is referred to instead of repeated
_DEPTH = 3


@dataclass(frozen=True)
class Inputs:
    """The bound arguments of one call."""

    trees: dict[str, Any]
    arguments: dict[str, str]
    digest: str
    opaque: tuple[str, ...] = ()


def digest_inputs(arguments: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> Inputs:
    """Digest a call's arguments.

    Args:
        arguments: By name, with defaults applied.
        ignore: Names that do not count, because they are volatile (a timestamp, say).
    """
    opaque: list[str] = []
    trees, digests = {}, {}
    for name in arguments:
        seen = len(opaque)
        trees[name] = canonical(arguments[name], opaque)
        opaque[seen:] = [f"{name}: {what}" for what in opaque[seen:]]
        if name not in ignore:
            digests[name] = digest_tree(trees[name])[:16]
    whole = hashlib.sha256("".join(f"{name}={digests[name]};" for name in sorted(digests)).encode()).hexdigest()
    return Inputs(trees, digests, whole, tuple(opaque))


def canonical(value: Any, opaque: list[str]) -> Any:
    """The JSON tree of a value, in which parts without a JSON form are named by type and listed in `opaque`."""
    try:
        return to_tree(value)
    except (Unencodable, RecursionError):
        pass
    if type(value) is dict:
        return {str(k): canonical(v, opaque) for k, v in value.items()}
    if type(value) in (list, tuple):
        return [canonical(item, opaque) for item in value]
    name = type_path(value) if isinstance(value, type) else type_path(type(value))
    opaque.append(name)
    return {"$opaque": name}


def digest_tree(tree: Any) -> str:
    """SHA-256 of a tree, over its canonical JSON: the order of keys does not matter. What calls are told apart by."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- references ----------------------------------------------------------------------------------------------------------
# They are found by a digest of their own, over the JSON in the order in which the keys stand: a value that comes back in another
# order is stored again, and a large one costs a third of the time.


def reference_digest(tree: Any, text: bytes | None = None) -> str:
    """What references find a value by; `text` is its JSON if that is at hand."""
    if _is_chained(tree):
        return chain_digests(tree)[-1]
    return hashlib.sha256(_json(tree) if text is None else text).hexdigest()


def chain_digests(items: list[Any]) -> list[str]:
    """The digest of every prefix of a list of objects, shortest first."""
    so_far, digests = b"list", []
    for item in items:
        so_far = hashlib.sha256(so_far + hashlib.sha256(_json(item)).digest()).digest()
        digests.append(so_far.hex())
    return digests


def _is_chained(tree: Any) -> bool:
    return type(tree) is list and bool(tree) and type(tree[0]) in (dict, list)


def _json(tree: Any) -> bytes:
    return to_json(tree, inf_nan_mode="constants")


@dataclass
class References:
    """What a run has stored that later inputs may refer to: digests to places. Not thread-safe; the engine's lock guards it."""

    outcomes: dict[str, str] = field(default_factory=dict)  # digest -> record key
    places: dict[str, tuple[str, str]] = field(default_factory=dict)  # digest -> record key, pointer

    def learn(self, key: str, outcome_digest: str | None, known: Mapping[str, str]) -> None:
        """Remember what a stored record holds."""
        if outcome_digest:
            self.outcomes[outcome_digest] = key
        for pointer, digest in known.items():
            self.places.setdefault(digest, (key, pointer))

    def encode(self, trees: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The inputs to store, and the digests of what of them is inline, by pointer."""
        known: dict[str, str] = {}
        return {name: self._encode(tree, f"/{_escape(name)}", known, 0) for name, tree in trees.items()}, known

    def _encode(self, tree: Any, pointer: str, known: dict[str, str], depth: int) -> Any:
        if type(tree) is str:
            if len(tree) < REFERENCE_FROM:
                return tree
        elif type(tree) not in (dict, list):
            return tree
        if _is_chained(tree):
            return self._encode_list(tree, pointer, known, depth)
        text = _json(tree)
        if len(text) < REFERENCE_FROM:
            return tree
        digest = hashlib.sha256(text).hexdigest()
        if (reference := self._reference(digest)) is not None:
            return reference
        known[pointer] = digest
        if type(tree) is dict and depth < _DEPTH:
            return {k: self._encode(v, f"{pointer}/{_escape(k)}", known, depth + 1) for k, v in tree.items()}
        return tree

    def _encode_list(self, items: list[Any], pointer: str, known: dict[str, str], depth: int) -> Any:
        digests = chain_digests(items)
        if (reference := self._reference(digests[-1])) is not None:
            return reference
        known[pointer] = digests[-1]
        for length in range(len(items) - 1, 0, -1):
            base = self.places.get(digests[length - 1])
            if base is not None:
                tail = [self._encode(item, f"{pointer}/{i}", known, depth + 1) for i, item in enumerate(items[length:])]
                return {"$list": [list(base), tail]}
        return [self._encode(item, f"{pointer}/{i}", known, depth + 1) for i, item in enumerate(items)]

    def _reference(self, digest: str) -> dict[str, Any] | None:
        if digest in self.outcomes:
            return {"$outcome": self.outcomes[digest]}
        if digest in self.places:
            return {"$input": list(self.places[digest])}
        return None


def resolve_inputs(
    inputs: Mapping[str, Any], record_inputs: Callable[[str], Mapping[str, Any]], outcome: Callable[[str], Any]
) -> dict[str, Any]:
    """The whole trees of stored inputs, references followed.

    Args:
        inputs: As stored in a record.
        record_inputs: The stored inputs of another record.
        outcome: The outcome's tree of another record.
    """

    def follow(tree: Any) -> Any:
        if type(tree) is list:
            return [follow(item) for item in tree]
        if type(tree) is not dict:
            return tree
        if "$outcome" in tree:
            return outcome(tree["$outcome"])
        if "$input" in tree:
            return at(*tree["$input"])
        if "$list" in tree:
            tails: list[list[Any]] = []
            while type(tree) is dict and "$list" in tree:  # a chat's chain is as long as the chat: no recursion
                place, tail = tree["$list"]
                tails.append([follow(item) for item in tail])
                tree = _stored_at(record_inputs(place[0]), place[1])
            whole = list(follow(tree))
            for tail in reversed(tails):
                whole.extend(tail)
            return whole
        return {k: follow(v) for k, v in tree.items()}

    def at(key: str, pointer: str) -> Any:
        return follow(_stored_at(record_inputs(key), pointer))

    return {name: follow(tree) for name, tree in inputs.items()}


def references(inputs: Mapping[str, Any]) -> dict[str, list[str]]:
    """The records whose outcomes each argument holds: directly, or one level deep in a list or dict."""
    found: dict[str, list[str]] = {}
    for name, tree in inputs.items():
        keys = list(dict.fromkeys(_outcomes(tree, 0)))
        if keys:
            found[name] = keys
    return found


def _outcomes(tree: Any, depth: int) -> list[str]:
    if type(tree) is dict:
        if "$outcome" in tree:
            return [tree["$outcome"]]
        if "$list" in tree:
            tree = tree["$list"][1]
    if depth > 1 or type(tree) not in (dict, list):
        return []
    items = tree.values() if type(tree) is dict else tree
    return [key for item in items for key in _outcomes(item, depth + 1)]


def _stored_at(inputs: Any, pointer: str) -> Any:
    node = inputs
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if type(node) is dict and "$list" in node:
            node = node["$list"][1][int(part)]  # pointers into a continued list count within its tail
        else:
            node = node[int(part)] if type(node) is list else node[part]
    return node


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")
