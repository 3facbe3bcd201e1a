"""Who an assistant is, from a small TOML file. identity.py makes conversations of it.

Only the name is needed:

    name = "Pebble"
    description = "a tiny demo chat model"       # what stands after "I am"
    maker = "the chatdata project"               # what stands after "I was made by"
    licence = "MIT"                              # what stands after "My licence is"
    languages = ["English", "Spanish"]
    facts = [
        "I was trained on a laptop in minutes.",  # a sentence it says about itself
        { question = "How big are you?", answer = ["I am tiny.", "About a million parameters."] },  # a text or a list
    ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatdata.errors import PersonaError
from chatdata.recipe import check_keys, read_toml

SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", "।")
_LINE_KEYS = ("name", "description", "maker", "licence")
_KEYS: dict[str, Any] = {**dict.fromkeys(_LINE_KEYS, str), "languages": list, "facts": list}
_FACT_KEYS: dict[str, Any] = {"question": str | list, "answer": str | list}


@dataclass(frozen=True)
class Fact:
    """What is said when one of `questions` is asked; without questions, `answers` is one sentence about itself."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Persona:
    name: str
    description: str | None = None
    maker: str | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()


def load_persona(path: Path) -> Persona:
    """Read a persona file. Raises PersonaError naming file, key and what would be right."""
    if not path.is_file():
        raise PersonaError(f'{path}: no such file; a persona is a TOML file with at least a line name = "…"')
    return parse_persona(read_toml(path, str(path), PersonaError), str(path))


def parse_persona(table: dict[str, Any], shown: str) -> Persona:
    """The persona of a TOML table. shown: the file's name in messages. Raises PersonaError."""
    check_keys(table, _KEYS, shown, PersonaError)
    if "name" not in table:
        raise PersonaError(f'{shown}: no key "name"; a persona has at least a name, as in name = "Pebble"')
    lines = {key: _line(table[key], f'{shown}, key "{key}"') for key in _LINE_KEYS if key in table}
    where = f'{shown}, key "languages"'
    languages = tuple(_line(language, where) for language in table.get("languages", []))
    _check_distinct(languages, where)
    where = f'{shown}, key "facts"'
    facts = tuple(_fact(fact, f"{where}, fact {i}") for i, fact in enumerate(table.get("facts", []), start=1))
    _check_distinct([text for fact in facts for text in fact.questions or fact.answers], where)
    return Persona(**lines, languages=languages, facts=facts)


def _fact(fact: Any, where: str) -> Fact:
    if isinstance(fact, str):
        sentence = _text(fact, where)
        if not sentence.rstrip("\"'”’»)").endswith(SENTENCE_ENDS):
            raise PersonaError(f"{where}: {fact!r} does not end like a sentence; end it with a full stop")
        return Fact((), (sentence,))
    if not isinstance(fact, dict):
        raise PersonaError(f"{where}: must be a sentence or a table of question and answer, not {fact!r}")
    check_keys(fact, _FACT_KEYS, where, PersonaError)
    for key in _FACT_KEYS:
        if not fact.get(key):
            raise PersonaError(f'{where}: needs the key "{key}": one text, or a list of phrasings')
    questions, answers = (
        tuple(_text(text, f'{where}, key "{key}"') for text in (value if isinstance(value, list) else [value]))
        for key, value in ((key, fact[key]) for key in _FACT_KEYS)
    )
    return Fact(questions, answers)


def _line(text: Any, where: str) -> str:
    if "\n" in _text(text, where):
        raise PersonaError(f"{where}: {text!r} is more than one line")
    return text


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise PersonaError(f"{where}: must be str, not {type(text).__name__} {text!r}")
    if text != text.strip() or not text:
        raise PersonaError(f"{where}: {text!r} is empty, or has a space at its start or end")
    return text


def _check_distinct(texts: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for text in texts:
        if text.casefold() in seen:
            raise PersonaError(f'{where}: "{text}" stands there twice; leave one out')
        seen.add(text.casefold())
