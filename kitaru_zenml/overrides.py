"""An outcome that a person gives instead of a step's own: validated against what the step returns, before anything is created."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from kitaru_zenml.checkpoints import Checkpoint
from kitaru_zenml.codec import find_class, value_tree
from kitaru_zenml.errors import InvalidOverride
from kitaru_zenml.journal.records import BlobValue, JsonValue, MaterializedValue, PickledValue, StepRecord

ANY = (Any, None, object)
PLAIN = (dict, list, str, int, float, bool)
OF_ADAPTERS = ("model", "tool")


def validated(run_id: str, record: StepRecord, value: Any, function: Callable[..., Any], blob: Callable[[str], bytes]) -> Any:
    """The value as the step would have returned it: a dict for a model becomes the model.

    Args:
        run_id: The origin.
        record: The step's record there.
        value: What the person gave.
        function: The flow's own function, in whose module the step is looked for.
        blob: Fetches a blob of the origin.

    Raises:
        InvalidOverride: If it does not fit.
    """
    declared = return_type(record.name, function) if record.kind == "step" else Any
    if declared in ANY:
        declared = recorded_type(record, blob)
    if record.kind in OF_ADAPTERS and declared in PLAIN:
        return value  # a response told as text, another result: the adapter reads more than one form, and a tool may return any
    if declared in ANY:
        return value
    try:
        return _adapter(declared).validate_python(value)
    except ValidationError as error:
        reasons = "; ".join(_reason(one) for one in error.errors(include_url=False))
        raise InvalidOverride(run_id, record.display, _name(declared), f"{reasons}.") from error
    except PydanticUserError:  # a type that Pydantic cannot describe in any way
        return value


def return_type(name: str, function: Callable[..., Any]) -> Any:
    """The declared return type of the step of this name that a flow's module knows; `Any` if none is found or they differ."""
    found = {id(step.returns): step.returns for step in _checkpoints(function) if step.name == name}
    return next(iter(found.values())) if len(found) == 1 else Any


def _checkpoints(function: Callable[..., Any]) -> Iterator[Checkpoint[Any, Any]]:
    """Steps by name in the flow's module, its classes, the modules it imports, and the modules of the steps found."""
    seen: set[int] = set()
    todo: list[Mapping[str, Any]] = [function.__globals__]
    while todo:
        names = todo.pop()
        if id(names) in seen:
            continue
        seen.add(id(names))
        for value in list(names.values()):
            if isinstance(value, Checkpoint):
                yield value
                todo.append(value.__wrapped__.__globals__)
            elif isinstance(value, ModuleType) and any(isinstance(v, Checkpoint) for v in list(vars(value).values())):
                todo.append(vars(value))
            elif isinstance(value, type) and value.__module__ == names.get("__name__"):
                yield from (v for v in vars(value).values() if isinstance(v, Checkpoint))


def recorded_type(record: StepRecord, blob: Callable[[str], bytes]) -> Any:
    """The type of a recorded outcome, as it was stored; `Any` of a failure or of `None`."""
    value = record.outcome
    if isinstance(value, MaterializedValue | PickledValue):
        return find_class(value.data_type) or Any
    if not isinstance(value, JsonValue | BlobValue):
        return Any
    tree = value_tree(value, blob)
    if tree is None:
        return Any
    if type(tree) is not dict or "$type" not in tree:
        return type(tree)
    if "class" in tree:
        return find_class(tree["class"]) or Any
    for module in ("builtins", "datetime", "uuid", "decimal"):
        found = getattr(sys.modules.get(module), tree["$type"], None)
        if isinstance(found, type):
            return found
    return Any


def _adapter(declared: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(declared)
    except PydanticUserError:  # a DataFrame, say: at least of that class
        return TypeAdapter(declared, config=ConfigDict(arbitrary_types_allowed=True))


def _reason(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    return f"{place}: {error['msg']}" if place else str(error["msg"])


def _name(declared: Any) -> str:
    return (
        declared.__name__
        if isinstance(declared, type) and not hasattr(declared, "__args__")
        else re.sub(r"\btyping\.", "", str(declared))
    )
