"""Values and exceptions as data, and back."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import math
import uuid
from collections import namedtuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator
from pydantic_core import from_json, to_json

from kitaru_zenml import codec
from kitaru_zenml.errors import KitaruError, NotDurableError, RecordedFailure, StepTimeout
from kitaru_zenml.journal.records import BlobValue, PickledValue


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Flag(enum.IntFlag):
    A = 1
    B = 2


class Inner(BaseModel):
    when: dt.datetime
    tags: set[str] = set()


class Outer(BaseModel):
    name: str
    inner: Inner | None = None
    colour: Colour = Colour.RED
    extra_bytes: bytes = b""
    names: tuple[str, ...] = ()

    @field_validator("name")
    @classmethod
    def _shout(cls, value: str) -> str:
        return value + "!"


class Loose(BaseModel, extra="allow"):
    a: int = 1


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None
    hidden: int = dataclasses.field(default=0, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    points: list[Point]


Pair = namedtuple("Pair", "left right")


def round_trip(value: Any) -> Any:
    encoded = codec.encode_value(value, step="s", inline_limit=10**6, folder=lambda: "f", materializers=None)
    stored = type(encoded.value).model_validate_json(encoded.value.model_dump_json())
    replayed = codec.decode_value(stored, blob=lambda sha: b"")
    assert type(encoded.decoded) is type(replayed)
    assert repr(encoded.decoded) == repr(replayed), "live and replayed differ"
    return replayed


VALUES = [
    None,
    True,
    0,
    -1,
    2**63,
    2**200,
    1.5,
    -0.0,
    math.inf,
    -math.inf,
    "",
    "ä\u2028",
    "name-\udcff",
    {"\udcff": 1},
    [],
    {},
    (),
    set(),
    frozenset({1}),
    b"\x00\xff",
    bytearray(b"ab"),
    [1, [2, (3, {"a": {4, 5}})]],
    {1: "int key", (1, 2): "tuple key", None: 3},
    {"$type": "a lie", "value": 1},
    dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC),
    dt.datetime(2026, 1, 2),
    dt.date(2026, 1, 2),
    dt.time(1, 2),
    dt.timedelta(days=-1, microseconds=5),
    uuid.UUID(int=7),
    decimal.Decimal("1.10"),
    1 + 2j,
    Colour.RED,
    Colour.BLUE,
    Flag.A | Flag.B,
    Pair(1, [2]),
    Point(1, Point(2)),
    Frozen([Point(1)]),
    Inner(when=dt.datetime(2026, 1, 1), tags={"b", "a"}),
    Loose(a=2, b=[1]),
    [Colour.RED, Inner(when=dt.datetime(2026, 1, 1))],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: repr(v)[:40])
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert round_trip(value) == value


def test_nan_comes_back_as_nan() -> None:
    assert math.isnan(round_trip(float("nan")))


def test_a_validator_does_not_change_a_value_again() -> None:
    value = Outer(name="x", extra_bytes=b"\xff", names=("a",))
    assert round_trip(value) == value and round_trip(value).name == "x!"
    assert round_trip(value).model_fields_set == value.model_fields_set


def test_a_field_added_later_gets_its_default() -> None:
    tree = codec.to_tree(Loose())
    del tree["value"]["a"]
    assert codec.from_tree(tree) == Loose()


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.dates() | st.uuids(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(json_like)
def test_any_nesting_comes_back(value: Any) -> None:
    assert round_trip(value) == value


@given(json_like)
def test_a_trees_leaves_are_what_json_gives_back(value: Any) -> None:
    tree = codec.to_tree(value)
    assert from_json(to_json(tree, inf_nan_mode="constants")) == tree


def test_a_class_nobody_can_import_is_refused() -> None:
    class Local(BaseModel):
        x: int

    with pytest.raises(NotDurableError, match="Local") as caught:
        round_trip(Local(x=1))
    assert caught.value.value == Local(x=1)


def test_a_large_value_goes_to_a_blob() -> None:
    encoded = codec.encode_value(["x" * 1000], step="s", inline_limit=100, folder=lambda: "f", materializers=None)
    assert isinstance(encoded.value, BlobValue) and encoded.blob is not None
    assert codec.decode_value(encoded.value, blob=lambda sha: encoded.blob[1]) == ["x" * 1000]


def test_pickle_is_said_in_the_record_and_asked_again() -> None:
    value = {"f": Exception}
    with pytest.raises(NotDurableError):
        round_trip(value)
    encoded = codec.encode_value(value, step="s", inline_limit=100, folder=lambda: "f", materializers=None, allow_pickle=True)
    assert isinstance(encoded.value, PickledValue)
    with pytest.raises(KitaruError, match="allow_pickle"):
        codec.decode_value(encoded.value, blob=lambda sha: encoded.blob[1])
    assert codec.decode_value(encoded.value, blob=lambda sha: encoded.blob[1], allow_pickle=True) == value


def test_a_stored_class_name_is_never_called_unless_it_is_of_its_kind() -> None:
    with pytest.raises(KitaruError, match="which it is not"):
        codec.from_tree({"$type": "dataclass", "class": "os:_wrap_close", "value": {}})


class Teapot(Exception):
    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"{code}: {hint}")
        self.code, self.hint = code, hint


@pytest.mark.parametrize(
    "error", [ValueError("a", 1), KeyError("k"), OSError(2, "No such file"), Teapot(418, hint="pour"), StepTimeout("s", 2.0)]
)
def test_an_exception_comes_back_with_type_message_and_attributes(error: Exception) -> None:
    back = codec.decode_failure(codec.encode_failure(error))
    assert type(back) is type(error) and str(back) == str(error) and back.args == error.args
    assert getattr(back, "hint", None) == getattr(error, "hint", None)


def test_an_exception_whose_class_is_not_imported_is_named() -> None:
    failure = codec.encode_failure(Teapot(1, hint="x")).model_copy(update={"type": "some.module:Gone"})
    back = codec.decode_failure(failure)
    assert isinstance(back, RecordedFailure) and back.type_name == "some.module:Gone" and str(back) == "some.module:Gone: 1: x"


def test_an_exception_from_an_exception_group_comes_back() -> None:
    group = ExceptionGroup("several", [ValueError("a")])
    assert "several" in str(codec.decode_failure(codec.encode_failure(group)))
