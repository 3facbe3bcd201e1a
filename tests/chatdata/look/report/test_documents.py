"""Which documents a report shows, and how."""

from __future__ import annotations

import polars as pl

from chatdata import render_conversation
from chatdata.look.report.documents import Segment, choose, lines_of, quotas
from chatdata.look.report.html import spelled
from chatdata.tokenizer.bpe import Tokenizer


def test_documents_chosen() -> None:
    lengths = list(range(10, 110))
    index = pl.DataFrame(
        {
            "num_tokens": lengths,
            "truncated": [n in (50, 60) for n in lengths],
            "digest": [bytes([255 - n]) * 16 for n in lengths],  # the longer, the lower
        }
    )
    expected = [(60, "truncated"), (50, "truncated"), (109, "longest"), (108, "longest"), (10, "shortest")]
    expected += [(11, "shortest"), (107, ""), (106, ""), (105, ""), (104, "")]
    # a second epoch shows nothing twice, and the order of the documents does not matter
    for frame in (index, pl.concat([index, index]), index.reverse()):
        assert [(row["num_tokens"], why) for row, why in choose(frame, 10)] == expected
    assert len(choose(index.head(3), 10)) == 3
    assert [row["num_tokens"] for row, _ in choose(index, 1)] == [60]


def test_document_as_lines(byte_tokenizer: Tokenizer) -> None:
    answer = [("text", "x\r\0"), ("python", "1+1"), ("python_output", "2")]
    parts = [{"type": kind, "text": text} for kind, text in answer]
    messages = [{"role": "user", "content": "é<b>"}, {"role": "assistant", "content": parts}]
    document = render_conversation(byte_tokenizer, messages)
    lines, left = lines_of(document.tokens, document.mask, byte_tokenizer)
    chip, supervised = "chip", "supervised chip"
    assert left == 0 and lines == [
        [Segment(chip, "<|bos|>")],
        [Segment(chip, "<|user_start|>"), Segment("plain", "é<b>"), Segment(chip, "<|user_end|>")],
        [
            Segment(chip, "<|assistant_start|>"),
            Segment("supervised", "x␍␀"),
            Segment(supervised, "<|python_start|>"),
            Segment("supervised", "1+1"),
            Segment(supervised, "<|python_end|>"),
            Segment(chip, "<|output_start|>"),
            Segment("plain", "2"),
            Segment(chip, "<|output_end|>"),
            Segment(supervised, "<|assistant_end|>"),
        ],
    ]
    # bos is 7 bytes, user_start 14, é two tokens of a byte each: 23 bytes are 4 tokens, 20 bytes one
    for max_bytes, shown in ((23, 4), (22, 3), (20, 1), (7, 1), (6, 0)):
        lines, left = lines_of(document.tokens, document.mask, byte_tokenizer, max_bytes)
        assert left == len(document) - shown, max_bytes


def test_small_tasks_are_shown_whole() -> None:
    for sizes, numbers in (
        ([1000, 3, 1000, 40], [178, 3, 179, 40]),
        ([200, 100], [200, 100]),
        ([5] * 401, [0] + [1] * 400),
        ([], []),
    ):
        assert quotas(sizes) == numbers


def test_entries_of_the_vocabulary_spelled(byte_tokenizer: Tokenizer) -> None:
    assert [spelled(byte_tokenizer, i) for i in (97, 32, 10, 0, 255, 256)] == ["a", "␣", "␤", "␀", "\\xff", "<|bos|>"]
