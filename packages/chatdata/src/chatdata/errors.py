"""Everything a user can cause, as one tree of named errors.

    ChatdataError (a ValueError; exit code 1)
    ├── UsageError          the command line asks for something that cannot be (exit code 2)
    ├── ConversationError   a conversation is not in an accepted form
    ├── TaskError           a row does not fit its task, or a task file does not define a task
    ├── RecipeError         a recipe file is wrong: unknown key, wrong type, unknown task
    ├── PersonaError        a persona file is wrong, or cannot give as many conversations as asked for
    ├── SourceError         data is empty or unreadable; MissingSource: not at hand
    ├── TokenizerError      a tokenizer cannot be read or is unusable
    ├── EncoderError        an encoder is not at hand, cannot do the tokenizer, or gives other ids than tiktoken
    ├── BuildError          a build cannot be written where it was asked for
    ├── FormatError         a build on disk is damaged or of an unknown version
    ├── PackingError        documents do not make sequences as asked: one is too long, or an argument is out of range
    ├── PlanError           a plan of sequences that cannot be made of a split
    └── CalculatorError     a tool call is not arithmetic or a count, or its result is out of bounds

Each message is one line: what was wrong, where (file, row, key), what would be right.
"""

from __future__ import annotations


class ChatdataError(ValueError):
    """Base of all errors a user can cause. `exit_code` is what the command line ends with."""

    exit_code = 1

    def at(self, where: str) -> ChatdataError:
        """The same error with the place it happened in front, e.g. `data.jsonl line 3: …`."""
        return type(self)(f"{where}: {self}")


class UsageError(ChatdataError):
    exit_code = 2


class ConversationError(ChatdataError):
    pass


class TaskError(ChatdataError):
    pass


class RecipeError(ChatdataError):
    pass


class PersonaError(ChatdataError):
    pass


class SourceError(ChatdataError):
    pass


class MissingSource(SourceError):
    """A source that is not at hand; the message ends with what fetches it."""


class TokenizerError(ChatdataError):
    pass


class EncoderError(ChatdataError):
    pass


class BuildError(ChatdataError):
    pass


class FormatError(ChatdataError):
    pass


class PackingError(ChatdataError):
    pass


class PlanError(ChatdataError):
    pass


class CalculatorError(ChatdataError):
    pass


def nearest(word: str, valid: list[str] | tuple[str, ...]) -> str:
    """`; did you mean "x"?` for the closest valid name, else the list of all valid names."""
    import difflib

    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; valid: {', '.join(valid)}"


def printable(text: str) -> str:
    """Control characters as visible escapes, but for newlines and tabs: data must not drive a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
