"""Tools as Python text: a call is `get_weather(city='Paris', days=2)`, a tool its signature."""

import json
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import Any

from chatdata.disk import each_key_once
from chatdata.errors import ConversationError, kind_of

# a call of these with one string argument is that string
_RUN_TEXT = frozenset(("python", "code_interpreter", "calculator"))
MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")
_CALL_KEYS = frozenset(("id", "type", "index", "function", "name", "arguments"))
_TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"}
_TYPES |= {"array": "list", "object": "dict", "null": "None"}
MAX_NUMBER = 10**308
_decode = json.JSONDecoder(object_pairs_hook=each_key_once).decode


@dataclass(slots=True)
class Call:
    id: str | None
    name: str
    code: str
    trained: bool = True
    turn: int = 0  # of its message
    output: str | None = None


def calls_of(value: Any, where: str) -> list[Call]:
    """The calls of `tool_calls`, `function_call` or a ShareGPT value: an object, a list of them, or JSON of either."""
    value = parsed(value, where)
    return [_call(call, where) for call in (value if isinstance(value, list) and value else [value])]


def _call(call: Any, where: str) -> Call:
    function, name = _named(call, where)
    if not (function.keys() <= _CALL_KEYS and call.keys() <= _CALL_KEYS):
        key = next((key for key in (*call, *function) if key not in _CALL_KEYS and {**call, **function}[key]), None)
        if key is not None:
            raise ConversationError(f'{where}: key "{key}" not understood; a call has a name and arguments')
    arguments = function.get("arguments")
    arguments = parsed(arguments, f"{where}, arguments of {name}") if arguments not in (None, "", []) else {}
    if not isinstance(arguments, dict):
        raise ConversationError(f"{where}, arguments of {name}: must be a JSON object, not {kind_of(arguments)}")
    if name in _RUN_TEXT and len(arguments) == 1 and isinstance(text := next(iter(arguments.values())), str):
        return Call(call.get("id"), name, text)
    written = [
        f"{key}={literal(value, where)}" if _is_name(key, 1) else f"**{{{key!r}: {literal(value, where)}}}"
        for key, value in arguments.items()
    ]
    return Call(call.get("id"), name, _written(name, written))


def _named(value: Any, where: str) -> tuple[dict[str, Any], str]:
    """The function of a call or a tool, which may be all of it, and its name."""
    function = value.get("function") or value if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise ConversationError(f"{where}: must be an object with the name of a function")
    return function, name


def _written(name: str, arguments: list[str]) -> str:
    """A call or a signature; a name that Python does not have becomes the first argument of `call`."""
    if not _is_name(name):
        name, arguments = "call", [repr(name), *arguments]
    return f"{name}({', '.join(arguments)})"


@lru_cache(4096)
def _is_name(name: str, max_parts: int = 99) -> bool:
    """Whether it is an ASCII identifier, or several with dots between."""
    parts = name.split(".")
    return name.isascii() and len(parts) <= max_parts and all(p.isidentifier() and not iskeyword(p) for p in parts)


def literal(value: Any, where: str) -> str:
    """JSON as a Python literal. Raises ConversationError for numbers that are not finite and what is not JSON."""
    if isinstance(value, list):
        return f"[{', '.join([literal(item, where) for item in value])}]"
    if isinstance(value, dict):
        return f"{{{', '.join([f'{key!r}: {literal(item, where)}' for key, item in value.items()])}}}"
    if value is None or isinstance(value, str | bool) or (isinstance(value, int | float) and abs(value) < MAX_NUMBER):
        return repr(value)
    raise ConversationError(f"{where}: an argument must be JSON, with numbers of at most 308 digits")


def parsed(value: Any, where: str) -> Any:
    """A string as the JSON it holds, an Arrow map as an object; anything else as it is."""
    try:
        if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
            return each_key_once(value)
        return _decode(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConversationError(f"{where}: not valid JSON: {error}") from None


def output_of(content: Any, where: str) -> str:
    """The text of a tool's result: a string, text parts joined, any other JSON written as such."""
    if isinstance(content, str):
        return content
    parts = [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []
    if media := next((part["type"] for part in parts if part.get("type") in MEDIA), None):
        raise ConversationError(f"{where}: {media} in a tool's result, but only text is trained on")
    texts = [part["text"] for part in parts if part.get("type") == "text" and isinstance(part.get("text"), str)]
    if texts and len(texts) == len(content):
        return "".join(texts)
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConversationError(f"{where}: a tool's result must be text or JSON: {error}") from None


def tools_of(value: Any) -> list[dict[str, Any]]:
    """`tools` next to the messages, a list or JSON of one, in OpenAI's form. Raises ConversationError."""
    where = 'key "tools"'
    tools = parsed(value, where)
    if not isinstance(tools, list):
        raise ConversationError(f"{where}: must be a list of tools or JSON of one")
    found = [_named(parsed(tool, where), f"{where}, tool {i}")[0] for i, tool in enumerate(tools)]
    return [{"type": "function", "function": function} for function in found]


def signatures(tools: list[dict[str, Any]]) -> str:
    """Tools as Python signatures. Raises ConversationError."""
    return "\n\n".join([_signature(tool, f'key "tools", tool {i}') for i, tool in enumerate(tools)])


def _signature(tool: Any, where: str) -> str:
    function, name = _named(tool, where)
    schema = parsed(function.get("parameters") or {}, where)
    # xLAM's parameters are the properties, and what has no default is required
    is_flat = isinstance(schema, dict) and "properties" not in schema and schema.get("type") != "object"
    properties = schema if is_flat or not isinstance(schema, dict) else schema.get("properties") or {}
    if not isinstance(properties, dict):
        raise ConversationError(f'{where}, key "parameters": must be an object, not {kind_of(properties)}')
    needed = None if is_flat else schema.get("required")
    required, optional, described = [], [], []
    for key, value in properties.items():
        field = value if isinstance(value, dict) else {}
        kind = _annotation(field, where)
        typed = f"{key}: {kind}" if kind else key
        is_needed = isinstance(needed, list) and key in needed
        if not _is_name(key, 1):
            optional.append(f"**{{{key!r}: {kind or 'object'}}}")
        elif is_needed or (is_flat and "default" not in field and "optional" not in str(field.get("type"))):
            required.append(typed)
        else:
            optional.append(f"{typed}{' = ' if kind else '='}{literal(field.get('default'), where)}")
        if field.get("description"):
            described.append(f"{key}: {' '.join(str(field['description']).split())}")
    description = " ".join(str(function.get("description") or "").split())
    if described:
        description = f"{description.removesuffix('.')}. {'; '.join(described)}".removeprefix(". ")
    return (f"# {description}\n" if description else "") + _written(name, required + optional)


def _annotation(schema: Any, where: str) -> str:
    if not isinstance(schema, dict):
        return ""
    if isinstance(schema.get("enum"), list):
        return f"Literal[{', '.join([literal(value, where) for value in schema['enum']])}]"
    if isinstance(schema.get("anyOf"), list):
        return " | ".join(filter(None, [_annotation(one, where) for one in schema["anyOf"]]))
    kinds, item = schema.get("type"), _annotation(schema.get("items"), where)
    names = [str(kind).split(",")[0] for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind]
    names = [_TYPES.get(name, name) for name in names]
    return " | ".join([f"list[{item}]" if name == "list" and item else name for name in names])
