"""The text of an answer: without tool calls, but with everything a call that is not closed would hide."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from chatdata.tasks import gsm8k
from chatdata.tokenizer.bpe import Tokenizer, append_special_tokens
from chateval.ask.answers import answer_text
from chateval.ask.generate import Completion

BYTES = {bytes([byte]): byte for byte in range(256)}
TOKENIZER = Tokenizer(BYTES, r"\S+|\s+", append_special_tokens(BYTES), "bytes")
CALL, END = TOKENIZER.special_ids["<|python_start|>"], TOKENIZER.special_ids["<|python_end|>"]
OUTPUT, OUTPUT_END = TOKENIZER.special_ids["<|output_start|>"], TOKENIZER.special_ids["<|output_end|>"]


def text_of(*parts: str | int, forced: str = "") -> str:
    """The text of an answer of these texts and special tokens; then `forced`, which the tool was writing at the end."""
    chosen = [i for part in parts for i in (part.encode() if isinstance(part, str) else [part])]
    tail = [OUTPUT, *forced.encode()] if forced else []
    tokens, is_forced = (*chosen, *tail), (False,) * len(chosen) + (True,) * len(tail)
    return answer_text(SimpleNamespace(tokenizer=TOKENIZER), Completion(tokens, is_forced, "max_tokens", 0, 0))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["a ", CALL, "1+1", END, OUTPUT, "2", OUTPUT_END, " #### 2"], "a  #### 2"),
        (["a ", CALL, "1+1", END, " #### 2"], "a  #### 2"),
        (["a ", CALL, "1+1 #### 2"], "a 1+1 #### 2"),  # nothing closes it
        ([CALL, "#### 3 ", CALL, "1+1", END, OUTPUT, "2", OUTPUT_END], "#### 3 "),  # the second call is closed
        ([CALL, "#### 3", OUTPUT_END, " b"], "#### 3 b"),
        ([OUTPUT, "7 #### 7"], "7 #### 7"),  # written by the model, not by the tool
        ([END, "b", OUTPUT_END], "b"),
        ([CALL, END, "b", CALL], "b"),
        ([], ""),
    ],
)
def test_the_text_of_an_answer(parts: list[str | int], expected: str) -> None:
    assert text_of(*parts) == expected


def test_what_the_tool_was_writing_is_no_answer() -> None:
    assert text_of("Is it 5? ", CALL, "2*6", END, forced="12") == "Is it 5? "


def test_an_open_call_hides_no_answer_in_either_reading() -> None:
    grade = gsm8k.grade({"answer": "#### 12"}, text_of("So ", CALL, "2*6\n#### 12"))
    assert (grade.extracted, grade.correct, grade.flexible_extracted, grade.flexible_correct) == (
        "12",
        True,
        "12",
        True,
    )
    grade = gsm8k.grade({"answer": "#### 12"}, text_of("So ", CALL, "2*6 is 12"))
    assert (grade.extracted, grade.correct, grade.flexible_extracted, grade.flexible_correct) == (
        None,
        False,
        "12",
        True,
    )
