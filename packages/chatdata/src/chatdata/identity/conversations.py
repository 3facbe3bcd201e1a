"""`chatdata identity`: conversations in which the assistant says who it is, from a persona file and phrasings.

phrasings.toml has subjects, each with questions and answers; any question may meet any answer. With the persona's
values filled in, every subject becomes a deck of exchanges (question, answer): plain ones, and opened ones, whose
question begins with something like "Hi!". Row i begins with exchange i of all decks in one order, so no two rows are
equal and there are as many rows as exchanges. Further turns are plain exchanges of other decks in the same language.

Everything is drawn by `random.Random`: `Random(42)` shuffles the decks, `Random(i)` draws the further turns of row i.
So the same persona gives the same rows on every machine, and a longer file starts with the shorter one.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from chatdata.conversation import Conversation
from chatdata.disk import check_file, decode, write_whole
from chatdata.errors import BuildError, PersonaError, UsageError
from chatdata.identity.persona import SENTENCE_ENDS, Persona
from chatdata.tasks.task import one_turn

PHRASINGS = Path(__file__).with_name("phrasings.toml")
NUM_TURNS = (1, 1, 1, 2, 2, 3)  # each as likely: half of the conversations have one question
_PLACEHOLDER = re.compile(r"\{(\w+)\}(\.?)")


class Exchange(NamedTuple):
    question: str
    answer: str


class _Deck(NamedTuple):
    """The exchanges of a subject, or of one value of it (a language, a fact)."""

    language: str
    weight: int
    plain: tuple[Exchange, ...]
    opened: tuple[Exchange, ...]  # none where the questions themselves open a conversation


def largest_num_rows(persona: Persona) -> int:
    """How many different conversations the persona gives."""
    return len(_dealt(persona)[1])


def identity_conversations(persona: Persona, num_rows: int) -> list[Conversation]:
    """The first `num_rows` conversations of the persona, all different.

    Raises PersonaError naming the largest number of rows if the persona gives fewer.
    """
    decks, first = _dealt(persona)
    if num_rows > len(first):
        wrong = f"{num_rows:,} rows are more than the {len(first):,} different ones this persona gives"
        raise PersonaError(f"{wrong}; ask for fewer, or add facts, or phrasings of their questions and answers")
    following: dict[str, list[int]] = {}
    for number, deck in enumerate(decks):
        if deck.opened:
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
            if further.question not in [earlier.question for earlier in exchanges]:  # no question twice; a shorter row
                exchanges.append(further)
        rows.append(Conversation(messages=[part for turn in exchanges for part in one_turn(*turn)["messages"]]))
    return rows


def identity_facts(persona: Persona, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """How much of the persona its conversations tell."""
    answers = [message["content"] for row in conversations for message in row["messages"][1::2]]
    told = [any(text in answer for text in fact.answers for answer in answers) for fact in persona.facts]
    spoken = list(_spoken(persona))
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


def check_target(out: Path, force: bool) -> None:
    """Raise UsageError or BuildError if `out` may not be written: not .jsonl, no such folder, or in the way."""
    if out.suffix != ".jsonl":
        raise UsageError(f"--out {out}: name a file that ends in .jsonl, as `chatdata build --identity` reads it")
    check_file(out)
    if not force and (out.exists() or out.is_symlink()):
        raise BuildError(f"{out}: already exists; choose another --out, or --force to replace it")


def write_conversations(conversations: Iterable[Conversation], out: Path) -> None:
    """Write JSONL, one conversation per line as a list of messages, whole or not at all."""
    lines = (json.dumps(conversation["messages"], ensure_ascii=False) + "\n" for conversation in conversations)
    write_whole(out, "".join(lines).encode())


@lru_cache(maxsize=1)
def _dealt(persona: Persona) -> tuple[list[_Deck], dict[Exchange, int]]:
    """All decks; and every exchange a row can begin with, in the order of rows → its deck.

    Card k of a shuffled deck of weight w gets position (k + 0.5) / w: decks are mixed evenly by weight from the first
    row on until one runs out. Opened exchanges have half the weight of plain ones.
    """
    decks, draw, placed = _decks(persona), random.Random(42), []
    for number, deck in enumerate(decks):
        for weight, exchanges in ((deck.weight, deck.plain), (deck.weight / 2, deck.opened)):
            shuffled = draw.sample(exchanges, len(exchanges))
            placed += [((k + 0.5) / weight, number, exchange) for k, exchange in enumerate(shuffled)]
    placed.sort(key=lambda card: card[0])
    first: dict[Exchange, int] = {}
    for _, number, exchange in placed:
        first.setdefault(exchange, number)
    return decks, first


def _decks(persona: Persona) -> list[_Deck]:
    phrasings = _phrasings()
    common = {"name": persona.name, "description": persona.description, "maker": persona.maker}
    common |= {"licence": persona.licence, "languages": _listed(persona.languages)}
    own_questions = {question.casefold() for fact in persona.facts for question in fact.questions}
    spoken = _spoken(persona)
    greetings = {language: _fill(phrasings["greetings"][known], common) for language, known in spoken.items()}
    groups = _groups(persona, greetings)
    decks = []
    for subject in phrasings["subjects"]:
        language = subject.get("language", "English")
        if "language" in subject and language not in spoken.values():
            continue
        openers = [] if subject.get("opens") else phrasings["openers"][language]
        for group in groups[subject["each"]] if "each" in subject else [[{}]]:
            plain = _exchanges(subject, [common | values for values in group])
            if subject.get("each") != "facts":  # the persona's own answer replaces ours
                plain = [exchange for exchange in plain if exchange.question.casefold() not in own_questions]
            opened = [Exchange(f"{opener} {q}", a) for opener in openers for q, a in plain]
            decks.append(_Deck(language, subject.get("weight", 1), tuple(plain), tuple(opened)))
    return decks


def _spoken(persona: Persona) -> dict[str, str]:
    """Language as the persona writes it → as the phrasings do, of every language that has phrasings."""
    known = known_languages()
    return {name: known[name.casefold()] for name in persona.languages if name.casefold() in known}


def _groups(persona: Persona, greetings: Mapping[str, str | None]) -> dict[str, list[list[dict[str, Any]]]]:
    """The values of `each` in the phrasings: for every deck, what its exchanges are filled with.

    greetings: language that the persona speaks → its greeting.
    """
    phrasings, known = _phrasings(), known_languages()
    # it only denies a language if all that it speaks are known: "Mandarin" is Chinese
    all_known = 0 < len(persona.languages) == len(greetings)
    speaks = {"english", *(language.casefold() for language in persona.languages)}
    return {
        "wrong_names": [_others("wrong_name", phrasings["wrong_names"], persona.name)],
        "new_names": [_others("new_name", phrasings["new_names"], persona.name)],
        "wrong_makers": [_others("wrong_maker", phrasings["wrong_makers"], persona.maker or "")],
        "languages": [[{"language": language}] for language in persona.languages],
        "other_languages": [[{"other_language": known[key]} for key in sorted(known.keys() - speaks) if all_known]],
        "greetings": [[{"language": language, "greeting": text or ""}] for language, text in greetings.items()],
        "sentences": [[{"sentence": fact.answers[0]}] for fact in persona.facts if not fact.questions],
        "facts": [
            [{"question": q, "answer": a} for q in f.questions for a in f.answers] for f in persona.facts if f.questions
        ],
    }


def _others(key: str, names: Sequence[str], own: str) -> list[dict[str, Any]]:
    """{key: name} for every name that is not a spelling of `own`, or a part of it."""
    own = own.casefold()
    return [{key: name} for name in names if not own or (name.casefold() not in own and own not in name.casefold())]


def _exchanges(subject: dict[str, Any], values: Sequence[Mapping[str, str | None]]) -> list[Exchange]:
    """Every question with every answer, once per entry of `values`; those that lack a value are left out."""
    filled = list[Exchange]()
    for given in values:
        questions, answers = ([_fill(text, given) for text in subject[key]] for key in ("questions", "answers"))
        filled += [Exchange(q, a) for q in questions for a in answers if q is not None and a is not None]
    return list(dict.fromkeys(filled))


def _fill(text: str, values: Mapping[str, str | None]) -> str | None:
    """`text` with values in place of {placeholders}, None if one is missing. "Acme Inc." brings its own full stop."""

    def value(place: re.Match[str]) -> str:
        given = values[place[1]] or ""
        return given if given.endswith(SENTENCE_ENDS) else given + place[2]

    absent = any(values[key] is None for key, _ in _PLACEHOLDER.findall(text))
    return None if absent else _PLACEHOLDER.sub(value, text)


def _listed(names: Sequence[str]) -> str | None:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part) if names else None


@cache
def _phrasings() -> dict[str, Any]:
    return decode(PHRASINGS.read_bytes(), dict, PHRASINGS.name, PersonaError, "toml")


def known_languages() -> dict[str, str]:
    """The languages that have phrasings, by their name in lower case."""
    return {language.casefold(): language for language in _phrasings()["greetings"]}
