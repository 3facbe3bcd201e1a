"""What a persona file may hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatdata.errors import PersonaError
from chatdata.identity.persona import Fact, Persona, load_persona, parse_persona


def test_a_persona_file(korvo: Persona) -> None:
    assert korvo == Persona(
        name="Korvo",
        description="a helpful chat model",
        maker="Acme Inc.",
        licence="Apache 2.0",
        languages=("English", "spanish", "Klingon"),
        facts=(
            Fact((), ("I have read many books about trains.",)),
            Fact(("How big are you?",), ("I am quite small.", "I have a billion parameters.")),
            Fact(("Who are you?", "What is your favourite food?"), ("I eat electricity.",)),
        ),
    )
    assert parse_persona({"name": "X"}, "x.toml") == Persona("X")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", 'no key "name"; it must be a line of text without space around it'),
        ('nam = "X"', 'unknown key "nam"; did you mean "name"?'),
        ('name = "X"\nlicense = "MIT"', 'unknown key "license"; did you mean "licence"?'),
        ('name = "X"\nzzz = 1', 'unknown key "zzz"; valid: name, description, maker, licence, languages, facts'),
        ("name = 5", 'key "name": must be a line of text without space around it, not 5'),
        ('name = ""', 'key "name": must be a line of text without space around it, not ""'),
        ('name = "X "', 'key "name": must be a line of text without space around it, not "X "'),
        ('name = "X\\nY"', 'key "name": must be a line of text without space around it, not "X\\nY"'),
        ('name = "X"\nlanguages = "English"', 'key "languages": must be a list, not "English"'),
        ('name = "X"\nlanguages = [1]', 'key "languages[0]": must be a line of text without space around it, not 1'),
        ('name = "X"\nlanguages = ["English", "english"]', 'key "languages": "english" is there twice; leave one out'),
        ('name = "X"\nfacts = {}', 'key "facts": must be a list, not {}'),
        (
            'name = "X"\nfacts = ["I am.", 5]',
            'key "facts[1]": must be a sentence with its full stop or a table of question and answer, not 5',
        ),
        (
            'name = "X"\nfacts = ["I am small"]',
            'key "facts[0]": must be a sentence with its full stop or a table of question and answer, not "I am small"',
        ),
        (
            'name = "X"\n[[facts]]\nquestion = "A?"\nanswers = "B."',
            'key "facts[0]": unknown key "answers"; did you mean "answer"?',
        ),
        ('name = "X"\n[[facts]]\nquestion = "A?"', 'key "facts[0]": no key "answer"; it must be a string or a list'),
        (
            'name = "X"\n[[facts]]\nquestion = []\nanswer = "B."',
            'key "facts[0]": question must be a text or a list of texts, without space around them',
        ),
        (
            'name = "X"\n[[facts]]\nquestion = ["A?", 5]\nanswer = "B."',
            'key "facts[0].question[1]": must be a string, not 5',
        ),
        (
            'name = "X"\nfacts = [{question="A?", answer="B"}, {question=["C?", "a?"], answer="D"}]',
            'key "facts": "a?" is there twice; leave one out',
        ),
    ],
)
def test_wrong_personas_name_file_and_key(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "me.toml"
    path.write_text(text)
    with pytest.raises(PersonaError) as raised:
        load_persona(path)
    separator = ": " if error.startswith(("no key", "unknown")) else ", "
    assert str(raised.value) == f"{path}{separator}{error}"


@pytest.mark.parametrize("content", [b"name = \xff", b"name", b"{}", b"a = " + b"[" * 5000, b"a = " + b"9" * 5000])
def test_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "me.toml"
    path.write_bytes(content)
    with pytest.raises(PersonaError, match=f"^{re.escape(str(path))}: not valid TOML: .+$"):
        load_persona(path)
