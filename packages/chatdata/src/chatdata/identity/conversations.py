"""`chatdata identity`: conversations in which the assistant says who it is, made of a persona file and phrasings.

phrasings.toml holds subjects, each with questions and answers any of which may meet. Together with the
persona's values every subject becomes a deck of exchanges (question, answer): plain ones, and opened ones, before whose
question stands something like "Hi!". Row i begins with exchange i of all decks in one order, so no two rows are equal
and there are as many rows as exchanges. Further turns are plain exchanges of other decks in the same language.

Everything is drawn by `random.Random`: `Random(42)` shuffles the decks, `Random(i)` draws the further turns of row i.
So the same persona gives the same rows on every machine, and the first rows of a longer file are the shorter file.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from chatdata.conversation import Conversation, Role
from chatdata.decode import decode
from chatdata.disk import check_file, naming, write_whole
from chatdata.errors import BuildError, PersonaError, UsageError
from chatdata.identity.persona import SENTENCE_ENDS, Persona

PHRASINGS = Path(__file__).with_name("phrasings.toml")
NUM_TURNS = (1, 1, 1, 2, 2, 3)  # drawn from, so half of the conversations have one question
_PLACEHOLDER = re.compile(r"\{(\w+)\}(\.?)")


class Exchange(NamedTuple):
    question: str
    answer: str


@dataclass(frozen=True)
class _Deck:
    """The exchanges of a subject, or of one value of it (a language, a fact)."""

    language: str
    weight: int
    opens: bool
    plain: tuple[Exchange, ...]
    opened: tuple[Exchange, ...]


def largest_num_rows(persona: Persona) -> int:
    """How many distinct conversations the persona gives."""
    return len(_dealt(persona)[1])


def identity_conversations(persona: Persona, num_rows: int) -> list[Conversation]:
    """The first `num_rows` conversations of the persona, all different (see above).

    Raises PersonaError naming the largest number of rows if the persona gives fewer.
    """
    decks, first = _dealt(persona)
    if num_rows > len(first):
        raise PersonaError(
            f"{num_rows:,} rows are more than the {len(first):,} different ones this persona gives; "
            "ask for fewer, or add facts, or phrasings of their questions and answers"
        )
    following: dict[str, list[int]] = {}
    for number, deck in enumerate(decks):
        if deck.plain and not deck.opens:
            following.setdefault(deck.language, []).extend([number] * deck.weight)
    rows = []
    for row, (exchange, number) in zip(range(num_rows), first.items(), strict=False):
        draw = random.Random(row)
        exchanges, used = [exchange], {number}
        for _ in range(draw.choice(NUM_TURNS) - 1):
            unused = [other for other in following[decks[number].language] if other not in used]
            if not unused:
                break
            number = draw.choice(unused)
            used.add(number)
            further = draw.choice(decks[number].plain)
            if further.question not in [asked.question for asked in exchanges]:  # asked once, the row is shorter for it
                exchanges.append(further)
        rows.append(_conversation(exchanges))
    return rows


def identity_facts(persona: Persona, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """The numbers of the persona's conversations: what came of what the persona says."""
    answers = [message["content"] for row in conversations for message in row["messages"][1::2]]
    told = [any(text in answer for text in fact.answers for answer in answers) for fact in persona.facts]
    spoken = [language for language in persona.languages if language.casefold() in known_languages()]
    return {
        "rows": len(conversations),
        "answers": len(answers),
        "answers_with_name": sum(persona.name in answer for answer in answers),
        "facts": len(told),
        "facts_told": sum(told),
        "languages_spoken": spoken,
        "languages_only_named": [language for language in persona.languages if language not in spoken],
        "largest_rows": largest_num_rows(persona),
    }


def check_out(out: Path, force: bool) -> None:
    """Raise UsageError or BuildError if `out` may not be written: a folder, in none, not JSONL, or there already."""
    if out.suffix != ".jsonl":
        raise UsageError(f"--out {out}: name a file that ends in .jsonl, as `chatdata build --identity` reads it")
    check_file(out)
    if not force and (out.exists() or out.is_symlink()):
        raise BuildError(f"{out}: already exists; choose another --out, or --force to replace it")


def write_conversations(conversations: Iterable[Conversation], out: Path) -> None:
    """Write JSONL, a conversation a line as an array of messages, whole or not at all."""
    lines = (json.dumps(conversation["messages"], ensure_ascii=False) + "\n" for conversation in conversations)
    with naming(out):
        write_whole(out, "".join(lines).encode())


def _conversation(exchanges: Sequence[Exchange]) -> Conversation:
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = [turn for exchange in exchanges for turn in zip(roles, exchange, strict=True)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@lru_cache(maxsize=1)
def _dealt(persona: Persona) -> tuple[list[_Deck], dict[Exchange, int]]:
    decks = _decks(persona)
    return decks, _first_exchanges(decks)


def _first_exchanges(decks: Sequence[_Deck]) -> dict[Exchange, int]:
    """Every exchange a row can begin with, in the order of rows → its deck.

    Card k of a shuffled deck of weight w lies at (k + 0.5) / w: decks are mixed evenly by weight from the first row on,
    and one that is used up is left out from there. Opened exchanges have half the weight of plain ones.
    """
    draw = random.Random(42)
    placed = []
    for number, deck in enumerate(decks):
        for weight, exchanges in ((deck.weight, deck.plain), (deck.weight / 2, deck.opened)):
            shuffled = draw.sample(exchanges, len(exchanges))
            placed += [((k + 0.5) / weight, number, exchange) for k, exchange in enumerate(shuffled)]
    placed.sort(key=lambda card: card[0])
    first: dict[Exchange, int] = {}
    for _, number, exchange in placed:
        first.setdefault(exchange, number)
    return first


def _decks(persona: Persona) -> list[_Deck]:
    phrasings = _phrasings()
    common = {"name": persona.name, "description": persona.description, "maker": persona.maker}
    common |= {"licence": persona.licence, "languages": _listed(persona.languages)}
    own_questions = {question.casefold() for fact in persona.facts for question in fact.questions}
    known = known_languages()
    spoken = {known[language.casefold()] for language in persona.languages if language.casefold() in known}
    groups = _groups(persona, common)
    decks = []
    for subject in phrasings["subjects"]:
        language = subject.get("language", "English")
        if "language" in subject and language not in spoken:
            continue
        opens, openers = subject.get("opens", False), phrasings["openers"][language]
        for group in groups[subject["each"]] if "each" in subject else [[{}]]:
            plain = _exchanges(subject, [common | values for values in group])
            if subject.get("each") != "facts":  # the persona's own answer stands in place of ours
                plain = [exchange for exchange in plain if exchange.question.casefold() not in own_questions]
            opened = () if opens else [Exchange(f"{opener} {q}", a) for opener in openers for q, a in plain]
            decks.append(_Deck(language, subject.get("weight", 1), opens, tuple(plain), tuple(opened)))
    return decks


def _groups(persona: Persona, common: Mapping[str, str | None]) -> dict[str, list[list[dict[str, str]]]]:
    """What `each` in the phrasings goes through: per deck the values its exchanges are made with."""
    phrasings, known = _phrasings(), known_languages()
    greetings = {
        language: _fill(phrasings["greetings"][known[language.casefold()]], common) or ""
        for language in persona.languages
        if language.casefold() in known
    }
    # that it does not speak a language is only said where all that it does speak are known: "Mandarin" is Chinese
    all_known = 0 < len(persona.languages) == len(greetings)
    not_spoken = known.keys() - {"english", *(language.casefold() for language in persona.languages)}
    return {
        "wrong_names": [[{"wrong_name": name} for name in phrasings["wrong_names"] if not _alike(name, persona.name)]],
        "new_names": [[{"new_name": name} for name in phrasings["new_names"] if not _alike(name, persona.name)]],
        "wrong_makers": [
            [{"wrong_maker": name} for name in phrasings["wrong_makers"] if not _alike(name, persona.maker or "")]
        ],
        "languages": [[{"language": language}] for language in persona.languages],
        "other_languages": [[{"other_language": known[key]} for key in sorted(not_spoken) if all_known]],
        "greetings": [[{"language": language, "greeting": text}] for language, text in greetings.items()],
        "sentences": [[{"sentence": fact.answers[0]}] for fact in persona.facts if not fact.questions],
        "facts": [
            [{"question": question, "answer": answer} for question in fact.questions for answer in fact.answers]
            for fact in persona.facts
            if fact.questions
        ],
    }


def _exchanges(subject: dict[str, Any], values: Sequence[Mapping[str, str | None]]) -> list[Exchange]:
    """Every question with every answer, once per entry of `values`, but those that need a value not given."""
    filled = [
        Exchange(question, answer)
        for given in values
        for question in (_fill(text, given) for text in subject["questions"])
        for answer in (_fill(text, given) for text in subject["answers"])
        if question is not None and answer is not None
    ]
    return list(dict.fromkeys(filled))


def _fill(text: str, values: Mapping[str, str | None]) -> str | None:
    """`text` with values in place of {placeholders}, None if one is not given. "Acme Inc." brings its own full stop."""

    def value(place: re.Match[str]) -> str:
        given = values[place[1]] or ""
        return given if given.endswith(SENTENCE_ENDS) else given + place[2]

    absent = any(values[key] is None for key, _ in _PLACEHOLDER.findall(text))
    return None if absent else _PLACEHOLDER.sub(value, text)


def _listed(names: Sequence[str]) -> str | None:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part) if names else None


def _alike(a: str, b: str) -> bool:
    a, b = a.casefold(), b.casefold()
    return bool(a and b) and (a in b or b in a)


@cache
def _phrasings() -> dict[str, Any]:
    return decode(PHRASINGS.read_bytes(), dict, PHRASINGS.name, PersonaError, "toml")


def known_languages() -> dict[str, str]:
    """Those with phrasings of their own, by their name in small letters."""
    return {language.casefold(): language for language in _phrasings()["greetings"]}
