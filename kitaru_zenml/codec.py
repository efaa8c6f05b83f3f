"""Values and exceptions as data, and back: exactly the same value on a first run and on replay.

A value becomes a JSON tree in which everything that JSON lacks is a tagged object, `{"$type": "<tag>", "value": ...}`: tuples, sets,
bytes, datetimes, enums, dataclasses, Pydantic models. What Pydantic can describe by the step's return annotation goes that way;
what has a ZenML materializer of its own (pandas, numpy, Path) is saved by it. No code is ever stored, and no pickle unless the flow
opts in. A class is looked up by module and name and must be of the kind that the tag says before it is used.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import hashlib
import importlib
import math
import pickle
import sys
import traceback
import uuid
from collections.abc import Callable
from typing import Any, get_origin

from pydantic import BaseModel, PydanticUserError, TypeAdapter
from pydantic_core import PydanticSerializationError, from_json, to_json

from kitaru_zenml.errors import KitaruError, NotDurableError, RecordedFailure
from kitaru_zenml.journal.records import (
    BlobValue,
    Failure,
    JsonValue,
    MaterializedValue,
    PickledValue,
    Value,
)

_TAG = "$type"
_PLAIN = frozenset({bool, type(None)})
_MAX_INT = 2**63  # larger ones are tagged: not every JSON reader keeps them


class Unencodable(Exception):
    """A value that has no JSON form; `leaf` is the part of it that has none."""

    def __init__(self, leaf: Any) -> None:
        super().__init__(type_path(type(leaf)))
        self.leaf = leaf


# --- classes by name -----------------------------------------------------------------------------------------------------


def type_path(cls: type) -> str:
    """`module:qualified name` of a class; a script's `__main__` goes by its real module name, so that a resume finds it."""
    module = cls.__module__
    if module == "__main__":
        module = main_module_name() or module
    return f"{module}:{cls.__qualname__}"


def main_module_name() -> str | None:
    """The importable name of the script that is `__main__`, if it has a file."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    return file.rsplit("/", 1)[-1].removesuffix(".py") if file else None


def find_class(path: str, *, load: bool = True) -> type | None:
    """The class that `type_path` named, or `None`. Without `load`, only modules that are imported already are looked at."""
    module_name, _, qualname = path.partition(":")
    module = sys.modules.get(module_name)
    if module is None and module_name == main_module_name():
        module = sys.modules.get("__main__")
    if module is None and load:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            return None
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


# --- JSON trees ----------------------------------------------------------------------------------------------------------


def to_tree(value: Any) -> Any:
    """The tagged JSON tree of a value.

    Raises:
        Unencodable: If a part of the value has no JSON form.
    """
    cls = type(value)
    if cls is str:
        return value if _is_text(value) else {_TAG: "str", "value": value.encode("utf-8", "surrogatepass").hex()}
    if cls in _PLAIN:
        return value
    if cls is int:
        return value if -_MAX_INT < value < _MAX_INT else {_TAG: "int", "value": str(value)}
    if cls is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if cls is list:
        return [to_tree(item) for item in value]
    if cls is dict:
        if all(type(k) is str and _is_text(k) for k in value) and _TAG not in value:
            return {k: to_tree(v) for k, v in value.items()}
        return {_TAG: "dict", "value": [[to_tree(k), to_tree(v)] for k, v in value.items()]}
    return _tagged(value, cls)


def _is_text(value: str) -> bool:
    """Whether a string has a UTF-8 form; one with lone surrogates (an undecodable file name) has none."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tagged(value: Any, cls: type) -> Any:
    if cls is tuple:
        return {_TAG: "tuple", "value": [to_tree(item) for item in value]}
    if cls in (set, frozenset):
        return {_TAG: cls.__name__, "value": sorted((to_tree(item) for item in value), key=to_json)}
    if cls in (bytes, bytearray):
        return {_TAG: cls.__name__, "value": base64.b64encode(value).decode()}
    if cls in _SCALARS:
        return {_TAG: cls.__name__, "value": _SCALARS[cls][0](value)}
    if isinstance(value, enum.Enum):
        return {_TAG: "enum", "class": _named(value, cls), "value": to_tree(value.value)}
    if isinstance(value, BaseModel):
        fields = dict(value.__dict__) | (value.__pydantic_extra__ or {})
        set_fields = sorted(value.model_fields_set)
        return {
            _TAG: "model",
            "class": _named(value, cls),
            "value": {k: to_tree(v) for k, v in fields.items()},
            "set": set_fields,
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_TAG: "dataclass", "class": _named(value, cls), "value": fields}
    if isinstance(value, tuple) and hasattr(cls, "_fields"):
        return {_TAG: "namedtuple", "class": _named(value, cls), "value": [to_tree(item) for item in value]}
    raise Unencodable(value)


def _named(value: Any, cls: type) -> str:
    path = type_path(cls)
    if find_class(path, load=False) is not cls:  # a local class: nobody could load the record
        raise Unencodable(value)
    return path


_SCALARS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    dt.datetime: (lambda v: v.isoformat(), dt.datetime.fromisoformat),
    dt.date: (lambda v: v.isoformat(), dt.date.fromisoformat),
    dt.time: (lambda v: v.isoformat(), dt.time.fromisoformat),
    dt.timedelta: (lambda v: f"{v.days} {v.seconds} {v.microseconds}", lambda s: dt.timedelta(*map(int, s.split()))),
    uuid.UUID: (str, uuid.UUID),
    decimal.Decimal: (str, decimal.Decimal),
    complex: (repr, complex),
}
_FROM_SCALAR = {cls.__name__: load for cls, (_, load) in _SCALARS.items()}


def from_tree(tree: Any) -> Any:
    """The value of a tagged JSON tree.

    Raises:
        KitaruError: If it names a class that cannot be imported here or is not what the tag says.
    """
    if type(tree) is list:
        return [from_tree(item) for item in tree]
    if type(tree) is not dict:
        return tree
    tag = tree.get(_TAG)
    if tag is None:
        return {k: from_tree(v) for k, v in tree.items()}
    value = tree["value"]
    if tag in _FROM_SCALAR:
        return _FROM_SCALAR[tag](value)
    if tag in _FROM_TAG:
        return _FROM_TAG[tag](value)
    cls = find_class(tree["class"])
    if cls is None:
        raise KitaruError(
            f"The stored value needs the class `{tree['class']}`, which cannot be imported here. Install its package."
        )
    if tag == "described":
        return TypeAdapter(cls).validate_python(value)
    if tag == "enum" and issubclass(cls, enum.Enum):
        return cls(from_tree(value))
    if tag == "model" and issubclass(cls, BaseModel):
        return _load_model(cls, {k: from_tree(v) for k, v in value.items()}, set(tree["set"]))
    if tag == "dataclass" and dataclasses.is_dataclass(cls):
        return _load_dataclass(cls, {k: from_tree(v) for k, v in value.items()})
    if tag == "namedtuple" and issubclass(cls, tuple):
        return cls(*(from_tree(item) for item in value))
    raise KitaruError(f"The stored value says that `{tree['class']}` is a {tag}, which it is not (any more).")


_FROM_TAG: dict[str, Callable[[Any], Any]] = {
    "str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "int": int,
    "float": float,
    "dict": lambda pairs: {from_tree(k): from_tree(v) for k, v in pairs},
    "tuple": lambda items: tuple(from_tree(item) for item in items),
    "set": lambda items: {from_tree(item) for item in items},
    "frozenset": lambda items: frozenset(from_tree(item) for item in items),
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
}


def _load_model(cls: type[BaseModel], fields: dict[str, Any], set_fields: set[str]) -> BaseModel:
    # Not validated: it is the value that was there, and a validator may refuse or change its own output.
    known = cls.model_fields
    for name, field in known.items():
        if name not in fields and not field.is_required():
            fields[name] = field.get_default(call_default_factory=True, validated_data=fields)
    missing = [name for name in known if name not in fields]
    if missing:
        return cls.model_validate(fields)  # the class has changed: let it say what is wrong
    loaded = cls.__new__(cls)
    extra = {k: v for k, v in fields.items() if k not in known} if cls.model_config.get("extra") == "allow" else None
    object.__setattr__(loaded, "__dict__", {k: v for k, v in fields.items() if k in known})
    object.__setattr__(loaded, "__pydantic_extra__", extra)
    object.__setattr__(loaded, "__pydantic_fields_set__", set_fields & {*known, *(extra or {})})
    object.__setattr__(loaded, "__pydantic_private__", None)
    loaded.model_post_init(None)
    return loaded


def _load_dataclass(cls: Any, fields: dict[str, Any]) -> Any:
    loaded = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.name in fields:
            object.__setattr__(loaded, field.name, fields[field.name])
        elif field.default is not dataclasses.MISSING:
            object.__setattr__(loaded, field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            object.__setattr__(loaded, field.name, field.default_factory())
    return loaded


# --- outcomes ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A value ready to store: the record's `value`, what must be stored before it, and the decoded value to hand on."""

    value: Value
    decoded: Any
    tree: Any = None  # of JSON values, for digests
    text: bytes = b""  # its JSON
    blob: tuple[str, bytes] | None = None


class Materializers:
    """Saves and loads values by their ZenML materializers, into folders of the run's artifact store.

    The runtime hands one in, so that this module imports no ZenML.
    """

    def save(self, value: Any, folder: str) -> MaterializedValue | None:
        """Save a value into a folder; `None` if only pickle could."""
        raise NotImplementedError

    def load(self, value: MaterializedValue) -> Any:
        """Load what `save` saved."""
        raise NotImplementedError


def encode_plain(value: Any, inline_limit: int) -> Encoded | None:
    """Encode a value that has a JSON form; `None` for any other, which `encode_value` stores with I/O."""
    try:
        return _encode_tree(to_tree(value), inline_limit)
    except (Unencodable, RecursionError):
        return None


def encode_value(
    value: Any,
    *,
    step: str,
    annotation: Any = Any,
    inline_limit: int,
    folder: Callable[[], str],
    materializers: Materializers | None,
    allow_pickle: bool = False,
) -> Encoded:
    """Encode a step's return value.

    Args:
        value: What the body returned.
        step: The step's name, for errors.
        annotation: The declared return type, used for values that are not self-describing.
        inline_limit: Largest JSON size in bytes that goes into the record itself.
        folder: Names a fresh folder for a materializer to save into.
        materializers: ZenML's materializers, if there is a run.
        allow_pickle: Whether the flow opted in to pickle.

    Raises:
        NotDurableError: If nothing can store the value; it carries the value.
    """
    try:
        tree = to_tree(value)
    except (Unencodable, RecursionError) as error:
        leaf = error.leaf if isinstance(error, Unencodable) else value
        return _encode_other(value, leaf, step, annotation, inline_limit, folder, materializers, allow_pickle)
    return _encode_tree(tree, inline_limit)


def _encode_tree(tree: Any, inline_limit: int) -> Encoded:
    text = to_json(tree, inf_nan_mode="constants")
    decoded = from_tree(tree)  # every leaf of a tree is what JSON gives back
    if len(text) <= inline_limit:
        return Encoded(JsonValue(data=tree), decoded, tree, text)
    sha = _sha256(text)
    return Encoded(BlobValue(sha256=sha, size=len(text)), decoded, tree, text, (sha, text))


def _encode_other(
    value: Any,
    leaf: Any,
    step: str,
    annotation: Any,
    inline_limit: int,
    folder: Callable[[], str],
    materializers: Materializers | None,
    allow_pickle: bool,
) -> Encoded:
    reason = f"`{type_path(type(leaf))}` has no JSON form and no ZenML materializer"
    if materializers is not None:
        try:
            saved = materializers.save(value, folder())
            if saved is not None:
                return Encoded(saved, materializers.load(saved))
        except KitaruError:
            raise
        except Exception as error:
            reason = f"its ZenML materializer failed: {type(error).__name__}: {error}"
    described = _by_annotation(value, annotation)
    if described is not None:
        return _encode_tree(described, inline_limit)
    if allow_pickle:
        try:
            text = pickle.dumps(value)
            decoded = pickle.loads(text)
        except Exception as error:
            reason = f"it cannot be pickled either: {error}"
        else:
            sha = _sha256(text)
            return Encoded(
                PickledValue(sha256=sha, size=len(text), data_type=type_path(type(value))),
                decoded,
                None,
                b"",
                (sha, text),
            )
    raise NotDurableError(step, type_path(type(value)), reason, value)


def _by_annotation(value: Any, annotation: Any) -> Any | None:
    """The tagged tree of a value that only Pydantic can describe (by annotation, else by its class), if it comes back equal."""
    for declared in (annotation, type(value)):
        if declared in (Any, None, object):
            continue
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(declared)
            data = adapter.dump_python(value, mode="json")
            loaded = adapter.validate_python(data)
            if type(loaded) is type(value) and loaded == value:
                origin = get_origin(declared) or declared
                path = type_path(origin) if isinstance(origin, type) else ""
                if path and find_class(path, load=False) is declared:
                    return {_TAG: "described", "class": path, "value": data}
        except (PydanticUserError, PydanticSerializationError, ValueError, TypeError, AttributeError):
            continue
    return None


def decode_value(
    value: Value,
    *,
    blob: Callable[[str], bytes],
    materializers: Materializers | None = None,
    allow_pickle: bool = False,
) -> Any:
    """The value of an outcome, as the first run handed it on.

    Args:
        value: From the record.
        blob: Fetches a blob of the run by its SHA-256.
        materializers: ZenML's materializers, needed for materialized values.
        allow_pickle: Whether the flow opts in to pickle now, too.

    Raises:
        KitaruError: If a class is missing, or the value is pickled and the flow did not opt in.
    """
    if isinstance(value, JsonValue):
        return from_tree(value.data)
    if isinstance(value, BlobValue):
        return from_tree(from_json(blob(value.sha256), cache_strings="keys"))
    if isinstance(value, MaterializedValue):
        if materializers is None:
            raise KitaruError(f"A `{value.data_type}` is loaded through ZenML: load its artifact version.")
        return materializers.load(value)
    if not allow_pickle:
        raise KitaruError(
            f"The stored `{value.data_type}` is pickled, and unpickling runs code. If you trust the artifact store, opt in with "
            "`@flow(allow_pickle=True)`."
        )
    return pickle.loads(blob(value.sha256))


def value_tree(value: Value, blob: Callable[[str], bytes]) -> Any:
    """What a person is shown of a stored value: its JSON tree, or a short description of what is not JSON."""
    if isinstance(value, JsonValue):
        return value.data
    if isinstance(value, BlobValue):
        return from_json(blob(value.sha256))
    if isinstance(value, MaterializedValue):
        return {"type": value.data_type, "materializer": value.materializer, "folder": value.folder}
    return {"type": value.data_type, "pickled": value.size}


def tree_text(tree: Any) -> str:
    """A tree as JSON text, for a person."""
    return to_json(tree, inf_nan_mode="constants").decode("utf-8", "replace")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- failures ------------------------------------------------------------------------------------------------------------

_REBUILDERS: dict[str, Callable[[Failure], BaseException]] = {}


def register_failure(cls: type[BaseException], rebuild: Callable[[Failure], BaseException]) -> None:
    """Let an adapter say how an exception of its framework is rebuilt from its recorded form."""
    _REBUILDERS[type_path(cls)] = rebuild


def encode_failure(error: BaseException) -> Failure:
    """An exception as data: type, message, and what of its arguments and attributes has a JSON form."""
    if isinstance(error, RecordedFailure):
        return Failure(type=error.type_name, message=error.message)
    try:
        args = to_tree(list(error.args))
    except (Unencodable, RecursionError):
        args = None
    state = {}
    for name, attribute in vars(error).items():
        if name.startswith("_"):
            continue
        try:
            state[name] = to_tree(attribute)
        except (Unencodable, RecursionError):
            continue
    text = "".join(traceback.format_exception(error, limit=-30))
    return Failure(type=type_path(type(error)), message=_message(error), args=args, state=state, traceback=text[-20_000:])


def decode_failure(failure: Failure, cls: type | None = None) -> BaseException:
    """The exception of a recorded failure: of its own class if that is imported here, else `RecordedFailure`.

    Args:
        failure: As recorded.
        cls: The class to rebuild it as, for an adapter that knows better than the recorded name.
    """
    if cls is None and failure.type in _REBUILDERS:
        return _REBUILDERS[failure.type](failure)
    cls = cls or find_class(failure.type, load=False)
    if cls is None or not issubclass(cls, Exception) or failure.args is None:
        return RecordedFailure(failure.type, failure.message)
    # Not through `__init__`: many exceptions compute their arguments there, from others that are gone.
    args = from_tree(failure.args)
    rebuilt = cls.__new__(cls, *args)
    rebuilt.args = tuple(args)
    for name, tree in failure.state.items():
        try:
            setattr(rebuilt, name, from_tree(tree))
        except (AttributeError, TypeError):
            continue
    if _message(rebuilt) != failure.message:  # its text needs what was not stored
        return RecordedFailure(failure.type, failure.message)
    return rebuilt


def raised(failure: Failure, original: BaseException | None, path: str) -> BaseException:
    """The exception that reaches the code, the same live and on replay but for its traceback; it knows its step."""
    if isinstance(original, NotDurableError):  # it holds the value, which no replay can give back
        error: BaseException = original
    else:
        error = decode_failure(failure)
        if original is not None:
            error = error.with_traceback(original.__traceback__)
    try:
        error._kitaru_path = path  # type: ignore[attr-defined]
    except AttributeError:
        pass
    return error


def paths_on_chain(error: BaseException) -> list[str]:
    """Paths of the recorded failures on an exception's cause, context and group chain."""
    found: dict[str, None] = {}
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        at = todo.pop()
        if at is None or id(at) in seen:
            continue
        seen.add(id(at))
        if path := getattr(at, "_kitaru_path", None):
            found[path] = None
        todo += [at.__cause__, at.__context__, *(at.exceptions if isinstance(at, BaseExceptionGroup) else ())]
    return list(found)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""
