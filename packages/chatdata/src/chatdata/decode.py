"""Data from outside as typed values: one function reads JSON or TOML into a msgspec type.

A mistake is one line that says where it is, what must be there and what is there instead:

    run.json, key "tasks.gsm8k.draws": must be an integer of at least 1, not "four"
    r.toml: unknown key "sed"; did you mean "seed"?
    r.toml, key "stage": "midd"; did you mean "mid"?
    r.toml: no key "stage"; it must be base, mid or sft

A struct's own rules go into its `__post_init__`; a ValueError there becomes a line of the same form.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec.inspect import is_struct_type

from chatdata.errors import ChatdataError, nearest

T = TypeVar("T")
MAX_SHOWN = 60  # characters of a wrong value in a message
_NOUNS: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
}


def decode(
    data: bytes, type: type[T], where: str, error: type[ChatdataError], kind: Literal["json", "toml"] = "json"
) -> T:
    """Bytes of JSON or TOML as a `type`. Raises `error`, with `where` (a file, or a file and line) in front."""
    try:
        value = tomllib.loads(data.decode("utf-8-sig")) if kind == "toml" else msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as problem:  # also: 5,000 digits, 1,000 brackets
        raise error(f"{where}: not valid {kind.upper()}: {str(problem).splitlines()[0]}") from None
    return convert(value, type, where, error)


def convert(value: Any, type: type[T], where: str, error: type[ChatdataError]) -> T:
    """Plain data, as JSON and TOML have it, as a `type`. Raises `error`, with `where` in front."""
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as problem:
        place, text = _explain(value, type, str(problem))
        key = f", key {json.dumps(place.removeprefix('.'))}" if place else ""
        raise error(f"{where}{key}: {text}") from None


def shown(value: Any) -> str:
    """A value of any kind as one short line of ASCII."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits
        text = "a very large value"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _explain(value: Any, type: Any, problem: str) -> tuple[str, str]:
    """(place, text) of the innermost part of `value` that is wrong. problem: msgspec's words about `value`."""
    for name, part, kind in _parts(value, type):
        try:
            msgspec.convert(part, kind)
        except msgspec.ValidationError as inner:
            place, text = _explain(part, kind, str(inner))
            return name + place, text
    struct = _member(value, type)
    if isinstance(value, dict) and is_struct_type(struct):
        fields = msgspec.structs.fields(struct)
        names = [field.encode_name for field in fields]
        for key in value if struct.__struct_config__.forbid_unknown_fields else ():
            if key not in names:
                return "", f"unknown key {json.dumps(key)}{nearest(key, names)}"
        for field in fields:
            if field.required and field.encode_name not in value:
                return "", f'no key "{field.encode_name}"; it must be {_words(field.type)}'
        return "", problem.splitlines()[0]  # of its __post_init__
    if get_origin(type) is Literal and isinstance(value, str):
        return "", shown(value) + nearest(value, get_args(type))
    return "", f"must be {_words(type)}, not {shown(value)}"


def _parts(value: Any, type: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, type) of everything inside a list or table."""
    kind = _member(value, type)
    if isinstance(value, list) and get_origin(kind) in (list, tuple):
        yield from ((f"[{i}]", item, get_args(kind)[0]) for i, item in enumerate(value))
    elif isinstance(value, dict) and get_origin(kind) is dict:
        for key, item in value.items():
            yield f".{key}" if key.replace("-", "_").isidentifier() else f"[{shown(key)}]", item, get_args(kind)[1]
    elif isinstance(value, dict) and is_struct_type(kind):
        for field in msgspec.structs.fields(kind):
            if field.encode_name in value:
                yield f".{field.encode_name}", value[field.encode_name], field.type


def _member(value: Any, type: Any) -> Any:
    """The alternative of a union that a list or table is for; without Annotated."""
    if get_origin(type) is Annotated:
        return _member(value, get_args(type)[0])
    if get_origin(type) not in (Union, UnionType):
        return type
    members = [_member(value, member) for member in get_args(type)]
    wanted = (list, tuple) if isinstance(value, list) else (dict,)
    return next((m for m in members if get_origin(m) in wanted or (dict in wanted and is_struct_type(m))), type)


def _words(type: Any) -> str:
    """What a value of the type is: "an integer of at least 1", "a string or null", "base, mid or sft"."""
    origin, parts = get_origin(type), get_args(type)
    if origin is Annotated:
        meta = parts[1]
        least = f" of at least {meta.ge:,}" if meta.ge is not None else ""
        most = f" and at most {meta.le:,}" if meta.le is not None else ""
        return meta.description or f"{_words(parts[0])}{least}{most}"
    if origin in (Union, UnionType, Literal):
        words = [str(part) if origin is Literal else _words(part) for part in parts]
        return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
    return _NOUNS.get(origin or type, "a table")
