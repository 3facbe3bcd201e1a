"""Who an assistant is, from a small TOML file. conversations.py turns it into conversations.

Only the name is needed:

    name = "Pebble"
    description = "a tiny demo chat model"       # follows "I am"
    maker = "the chatdata project"               # follows "I was made by"
    licence = "MIT"                              # follows "My licence is"
    languages = ["English", "Spanish"]
    facts = [
        "I was trained on a laptop in minutes.",  # a sentence it says about itself
        { question = "How big are you?", answer = ["I am tiny.", "About a million parameters."] },  # a text or a list
    ]
"""

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from chatdata.disk import convert, decode
from chatdata.errors import PersonaError

SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", "।")
_ENDS = "[" + "".join(SENTENCE_ENDS) + r"""]["'”’»)]*\Z"""
Line = Annotated[str, Meta(pattern=r"^\S(.*\S)?\Z", description="a line of text without space around it")]
Sentence = Annotated[str, Meta(pattern=rf"(?s)^(?!\s).*{_ENDS}", description="a sentence with its full stop")]


class Fact(Struct, frozen=True):
    """`answers` reply to `questions`. Without questions, `answers` is one sentence about the persona."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


class Persona(Struct, frozen=True):
    name: Line
    description: Line | None = None
    maker: Line | None = None
    licence: Line | None = None
    languages: tuple[Line, ...] = ()
    facts: tuple[Fact, ...] = ()


class FactTable(Struct, forbid_unknown_fields=True):
    # no Meta(pattern=…) here: msgspec 0.22 crashes when it frees a type of a pattern or a list
    question: str | tuple[str, ...]
    answer: str | tuple[str, ...]

    def __post_init__(self) -> None:
        for key, texts in (("question", _texts(self.question)), ("answer", _texts(self.answer))):
            if not texts or any(text.strip() != text or not text for text in texts):
                raise ValueError(f"{key} must be a text or a list of texts, without space around them")


FactForm = Sentence | Annotated[FactTable, Meta(description="a table of question and answer")]


class PersonaTable(Persona, frozen=True, forbid_unknown_fields=True):
    """A persona file."""

    facts: tuple[FactForm, ...] = ()  # type: ignore[assignment]


def load_persona(path: Path) -> Persona:
    """Read a persona file. Raises PersonaError naming file, key and what would be right."""
    if not path.is_file():
        raise PersonaError(f'{path}: no such file; a persona is a TOML file with at least a line name = "…"')
    return parse_persona(decode(path.read_bytes(), dict, str(path), PersonaError, "toml"), str(path))


def parse_persona(table: dict[str, Any], shown: str) -> Persona:
    """The persona of a TOML table. shown: the file's name in messages. Raises PersonaError."""
    read = convert(table, PersonaTable, shown, PersonaError)
    facts = [Fact((), (f,)) if isinstance(f, str) else Fact(_texts(f.question), _texts(f.answer)) for f in read.facts]
    told = [text for fact in facts for text in fact.questions or fact.answers]
    for key, texts in (("languages", read.languages), ("facts", told)):
        folded = [text.casefold() for text in texts]
        for i, text in enumerate(texts):
            if folded[i] in folded[:i]:
                raise PersonaError(f'{shown}, key "{key}": "{text}" is there twice; leave one out')
    return Persona(read.name, read.description, read.maker, read.licence, read.languages, tuple(facts))


def _texts(phrasings: str | tuple[str, ...]) -> tuple[str, ...]:
    return (phrasings,) if isinstance(phrasings, str) else phrasings
