"""`chatdata identity`: what a persona file may hold, and what its conversations always are."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.conversation import parse_conversation
from chatdata.errors import PersonaError
from chatdata.identity import conversations as identity
from chatdata.identity.conversations import identity_conversations, identity_facts, largest_num_rows
from chatdata.identity.persona import Fact, Persona, load_persona
from chatdata.recipe import load_recipe
from chatdata.render.specification import render_conversation
from chatdata.sources.find import Locations, resolve
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer

ROOT = Path(__file__).parents[3]
TEXTS = ROOT / "packages" / "chatdata" / "src" / "chatdata" / "demo"


def answers(conversations: list) -> set[str]:
    return {message["content"] for row in conversations for message in row["messages"][1::2]}


def exchanges(conversations: list) -> set[tuple[str, str]]:
    contents = [[message["content"] for message in row["messages"]] for row in conversations]
    return {pair for texts in contents for pair in zip(texts[::2], texts[1::2], strict=True)}


def test_conversations_are_of_the_persona(korvo: Persona) -> None:
    rows = identity_conversations(korvo, 1000)
    said = answers(rows)
    for answer in (
        "I am Korvo.",
        "No, I am Korvo, not ChatGPT.",
        "I was made by Acme Inc.",  # not "Inc.."
        "My licence is Apache 2.0.",
        "I speak English, spanish and Klingon.",
        "¡Hola! Soy Korvo.",
        "Yes, I speak Klingon.",
        "No, I do not remember other chats.",
        "I cannot know that: I have no internet.",
        "I have read many books about trains.",
        "I have a billion parameters.",
    ):
        assert answer in said, answer
    asked = {question for question, _ in exchanges(rows)}
    assert {"Is your name Gemini?", "¿Cómo te llamas?", "Who made you?", "How big are you?"} <= asked
    # its own answer stands in place of ours
    assert {answer for question, answer in exchanges(rows) if question == "Who are you?"} == {"I eat electricity."}
    # of an unknown language nobody can say whether it is another name of German
    assert not any("German" in text for pair in exchanges(rows) for text in pair)
    facts = identity_facts(korvo, rows)
    assert facts["languages_spoken"] == ["English", "spanish"] and facts["languages_only_named"] == ["Klingon"]
    assert (facts["rows"], facts["facts"], facts["facts_told"]) == (1000, 3, 3)
    assert facts["answers"] == sum(len(row["messages"]) // 2 for row in rows)
    assert facts["answers_with_name"] > 500


def test_what_the_persona_does_not_say_is_not_said() -> None:
    rows = identity_conversations(Persona("Korvo"), 3000)
    texts = " ".join(text for pair in exchanges(rows) for text in pair)
    for word in ("made by", "licence", "license", "speak", "Who made", "None"):
        assert word not in texts, word
    assert "I am Korvo." in answers(rows) and "Spanish" not in texts


def test_a_wrong_name_is_never_its_own() -> None:
    rows = identity_conversations(Persona("Claude", maker="the friends of OpenAI"), 3000)
    asked = {question for question, _ in exchanges(rows)}
    assert "Are you Gemini?" in asked and "Did Google make you?" in asked
    assert not any(answer.startswith(("No", "I am not")) for q, answer in exchanges(rows) if "Claude" in q)
    assert not any("OpenAI" in question for question in asked)


def test_languages_it_does_not_speak() -> None:
    rows = identity_conversations(Persona("X", languages=("English", "German")), 2000)
    asked = {question for question, _ in exchanges(rows)}
    assert "Do you speak Italian?" in asked and "Wer bist du?" in asked and "¿Quién eres?" not in asked
    assert {a[:3] for q, a in exchanges(rows) if q == "Do you speak German?"} == {"Yes"}
    assert not {a for q, a in exchanges(rows) if "Italian" in q and a.startswith("Yes")}


def test_a_conversation_stays_in_one_language() -> None:
    rows = identity_conversations(Persona("X", languages=("German", "French")), 3000)
    asked = [[message["content"] for message in row["messages"][::2]] for row in rows]
    german = [questions for questions in asked if questions[0] == "Sprichst du Deutsch?"]
    later = {question for questions in german for question in questions[1:]}
    assert later and later <= {"Wer bist du?", "Wer sind Sie?", "Was bist du?", "Mit wem spreche ich?"} | {
        *("Wie heißt du?", "Wie heißen Sie?", "Wie ist dein Name?", "Stell dich vor.", "Sag mir deinen Namen."),
        "wer bist du",
    }


def test_a_greeting_only_opens() -> None:
    rows = identity_conversations(Persona("Korvo"), 3000)
    firsts = [row["messages"][0]["content"] for row in rows]
    assert "Hello!" in firsts and "Hi! Hello!" not in firsts
    assert not any(m["content"] in ("Hi!", "Hello!", "hi") for row in rows for m in row["messages"][2:])


def test_rows_of_a_shorter_file_begin_a_longer_one(korvo: Persona) -> None:
    assert identity_conversations(korvo, 37) == identity_conversations(korvo, 2000)[:37]


def test_no_row_twice_up_to_the_last_and_none_beyond() -> None:
    persona = Persona("Korvo", facts=(Fact(("How big are you?",), ("Small.",)),))
    largest = largest_num_rows(persona)
    rows = identity_conversations(persona, largest)
    assert len({json.dumps(row) for row in rows}) == largest > 10_000
    with pytest.raises(PersonaError, match=rf"{largest + 1:,} rows are more than the {largest:,} different ones"):
        identity_conversations(persona, largest + 1)
    # 1 plain exchange and 10 with something before it
    assert largest - largest_num_rows(Persona("Korvo")) == 11


def test_half_of_the_conversations_have_one_question(korvo: Persona) -> None:
    turns = [len(row["messages"]) // 2 for row in identity_conversations(korvo, 1000)]
    assert set(turns) == {1, 2, 3} and 450 < turns.count(1) < 620


def test_nothing_is_asked_twice(korvo: Persona) -> None:
    for row in identity_conversations(korvo, 1000):
        asked = [message["content"] for message in row["messages"][::2]]
        assert len(set(asked)) == len(asked)


words = st.text(string.ascii_letters + "éß中", min_size=1, max_size=8)
fact = st.one_of(
    st.builds(lambda text: Fact((), (f"I {text}.",)), words),
    st.builds(lambda q, a: Fact((f"{q}?",), tuple(a)), words, st.lists(words, min_size=1, max_size=3)),
)
personas = st.builds(
    Persona,
    name=words,
    description=st.none() | words,
    maker=st.none() | words,
    licence=st.none() | words,
    languages=st.lists(st.sampled_from(["English", "Hindi", "Japanese", "Klingon"]), unique=True).map(tuple),
    facts=st.lists(fact, max_size=3).map(tuple),
)


@settings(max_examples=12, deadline=None)
@given(persona=personas, num_rows=st.integers(1, 200))
def test_every_row_passes_and_is_another(persona: Persona, num_rows: int) -> None:
    rows = identity_conversations(persona, num_rows)
    assert len({json.dumps(row) for row in rows}) == num_rows == len(rows)
    for row in rows:
        assert parse_conversation(row) == row
        assert not any(mark in message["content"] for message in row["messages"] for mark in "{}")
    if num_rows >= 150:
        assert identity_facts(persona, rows)["facts_told"] == len(persona.facts)


def test_braces_of_the_persona_stay_as_they_are() -> None:
    persona = Persona("{maker}", maker="{name}")
    assert {"I am {maker}.", "I was made by {name}."} <= answers(identity_conversations(persona, 2000))


def test_every_row_renders(korvo: Persona, byte_tokenizer: Tokenizer) -> None:
    for row in identity_conversations(korvo, 200):
        document = render_conversation(byte_tokenizer, row)
        said = [message["content"] for message in row["messages"][1::2]]
        assert document.mask.sum() == sum(len(answer.encode()) + 1 for answer in said)


def test_the_phrasings_hold_together() -> None:
    phrasings = identity._phrasings()
    values = {"name", "description", "maker", "licence", "languages"}
    facts = (Fact((), ("I am.",)), Fact(("Are you?",), ("I am.",)))
    groups = identity._groups(Persona("X", languages=("English",), facts=facts), {"English": "Hello!"})
    spoken = {subject.get("language", "English") for subject in phrasings["subjects"]}
    assert spoken == set(phrasings["greetings"]) == set(phrasings["openers"])
    for subject in phrasings["subjects"]:
        assert set(subject) <= {"each", "weight", "language", "opens", "questions", "answers"}
        filled = values | set(groups[subject["each"]][0][0]) if "each" in subject else values
        for texts in (subject["questions"], subject["answers"]):
            assert len(set(texts)) == len(texts)
            for text in texts:
                assert set(re.findall(r"\{(.*?)\}", text)) <= filled and text == text.strip()


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "me.jsonl"
    out.write_text("before")

    def breaks(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chatdata.disk.sync", breaks)
    with pytest.raises(OSError, match="No space left on device") as raised:
        identity.write_conversations(identity_conversations(Persona("X"), 5), out)
    assert raised.value.filename == str(out)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("me.jsonl", "before")]


def test_the_demos_identity_is_its_personas(tmp_path: Path) -> None:
    """chatdata identity persona.toml --rows 80 --out identity.jsonl, in demo/."""
    identity.write_conversations(identity_conversations(load_persona(TEXTS / "persona.toml"), 80), tmp_path / "i.jsonl")
    assert (TEXTS / "identity.jsonl").read_bytes() == (tmp_path / "i.jsonl").read_bytes()
    tasks = load_tasks()
    for name in ("demo-mid", "demo-sft"):
        recipe = load_recipe(name, tasks)
        entry = next(entry for entry in recipe.splits["train"] if entry.task == "identity")
        source = resolve(entry, tasks["identity"], Locations(recipe.folder))
        assert [file.path.resolve() for file in source.files] == [TEXTS / "identity.jsonl"]
    facts = identity_facts(load_persona(TEXTS / "persona.toml"), identity_conversations(Persona("Pebble"), 80))
    assert facts["facts_told"] == 0  # told by the persona's rows alone
    rows = [{"messages": json.loads(line)} for line in (TEXTS / "identity.jsonl").read_text().splitlines()]
    facts = identity_facts(load_persona(TEXTS / "persona.toml"), rows)
    assert facts["facts_told"] == facts["facts"] == 7 and facts["answers_with_name"] >= facts["answers"] / 2
