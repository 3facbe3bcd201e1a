"""Errors a user can cause, as one tree.

    ChatdataError (a ValueError; exit code 1)
    ├── UsageError          options that do not go together or are out of range (exit code 2)
    ├── ConversationError   a conversation is not in an accepted form
    ├── TaskError           a row does not fit its task, or a task file does not define a task
    ├── RecipeError         a recipe file is wrong: unknown key, wrong type, unknown task
    ├── PersonaError        a persona file is wrong, or cannot give the requested number of conversations
    ├── SourceError         data is empty or unreadable; MissingSource: not found
    ├── TokenizerError      a tokenizer cannot be read or is unusable
    ├── EncoderError        an encoder is not installed, or does not give the ids of tiktoken for this tokenizer
    ├── BuildError          a build cannot be made, or not written to OUT
    ├── FormatError         a build on disk is damaged or of an unknown version
    ├── PackingError        documents cannot be packed: one is too long, or an argument is out of range
    ├── PlanError           the requested sequences cannot be made from a split
    └── CalculatorError     a tool call is not arithmetic or a count, or its result is out of bounds

Each message is one line: what was wrong, where (file, row, key), what would be right.
"""

import re
from typing import Self


class ChatdataError(ValueError):
    """Base of all errors a user can cause. `exit_code` is the exit code of the command line."""

    exit_code = 1

    def at(self, where: str) -> Self:
        """The same error with its place in front, e.g. `data.jsonl line 3: …`."""
        return type(self)(f"{where}: {self}")


class UsageError(ChatdataError):
    exit_code = 2


class ConversationError(ChatdataError): ...


class TaskError(ChatdataError): ...


class RecipeError(ChatdataError): ...


class PersonaError(ChatdataError): ...


class SourceError(ChatdataError): ...


class MissingSource(SourceError):
    """A source that was not found; the message ends with how to get it."""


class TokenizerError(ChatdataError): ...


class EncoderError(ChatdataError): ...


class BuildError(ChatdataError): ...


class FormatError(ChatdataError): ...


class PackingError(ChatdataError): ...


class PlanError(ChatdataError): ...


class CalculatorError(ChatdataError): ...


def nearest(word: str, valid: list[str] | tuple[str, ...]) -> str:
    """`; did you mean "x"?` for the closest valid name, else the list of all valid names."""
    import difflib

    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; valid: {', '.join(valid)}"


def first_line(error: object) -> str:
    """The first line of an error of a library, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def general(reason: str) -> str:
    """A reason without what differs from row to row: numbers, texts in single quotes, and advice after a semicolon."""
    return re.sub(r"(?<!\w)('[^']*')|\d+", lambda found: "'…'" if found[1] else "N", reason).partition("; ")[0]


def kind_of(value: object) -> str:
    """What a JSON value is, for messages: `a string`, `null`."""
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "a string", dict: "an object", list: "a list"}
    return names.get(type(value), type(value).__name__)


def printable(text: str, keep: str = "\n\t") -> str:
    """Control characters and marks of direction, but those in `keep`, as visible escapes: data controls no terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
