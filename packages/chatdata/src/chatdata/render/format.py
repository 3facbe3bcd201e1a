"""The chat format as data: which special tokens a document holds, where, and what is supervised.

Rendering, the contract, reports, batches and generation read NANOCHAT. Other formats are in model_format.py: of them
no table is known.

    bos   user.opening … user.closing   assistant_start  (text | python | output)*  assistant_end   user.opening …

Delimiters must differ from each other: the contract tells from a delimiter alone where it is in a document.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from chatdata.conversation import Part
from chatdata.document import SPAN_ROLES

USER, TEXT, PYTHON, OUTPUT, REASONING = range(len(SPAN_ROLES))
# part type of a message → span role
PART_ROLES = {"text": TEXT, "python": PYTHON, "python_output": OUTPUT, "reasoning": REASONING}


@dataclass(frozen=True)
class SpanFormat:
    """How the text of one span role is written: special tokens around it ("" for none), all with one mask value."""

    opening: str
    closing: str
    supervised: bool
    label: str  # in messages for people


@dataclass(frozen=True)
class ChatFormat:
    """Special tokens by name, in the order of a document: karpathy/nanochat@790f3be:nanochat/tokenizer.py
    (render_conversation)."""

    bos: str = "<|bos|>"  # mask 0; generation ends here, too
    user: SpanFormat = SpanFormat("<|user_start|>", "<|user_end|>", supervised=False, label="a user message")
    assistant_start: str = "<|assistant_start|>"  # mask 0: a prompt for completion ends here
    text: SpanFormat = SpanFormat("", "", supervised=True, label="assistant text")
    python: SpanFormat = SpanFormat("<|python_start|>", "<|python_end|>", supervised=True, label="a python part")
    output: SpanFormat = SpanFormat("<|output_start|>", "<|output_end|>", supervised=False, label="tool output")
    reasoning: SpanFormat = SpanFormat("", "", supervised=True, label="reasoning")  # ordinary text, before the answer's
    assistant_end: str = "<|assistant_end|>"  # mask 1: the model learns to end its answer
    padding: str = "<|assistant_end|>"  # input of positions that no document fills; never a target

    @cached_property
    def spans(self) -> tuple[SpanFormat, ...]:
        """By role, as in SPAN_ROLES."""
        return self.user, self.text, self.python, self.output, self.reasoning

    @cached_property
    def delimiters(self) -> dict[str, bool]:
        """Every special token of a document, and whether it is supervised."""
        user, python, output = (
            dict.fromkeys((span.opening, span.closing), span.supervised) for span in self.spans if span.opening
        )
        return {self.bos: False, **user, self.assistant_start: False, self.assistant_end: True, **python, **output}

    @cached_property
    def followers(self) -> dict[str, set[str]]:
        """Which delimiters may come next after each, text aside; "" is the start and the end of a document."""
        parts = (self.python, self.output)
        in_message = {self.assistant_end, *(part.opening for part in parts)}
        return {
            "": {self.bos},
            self.bos: {self.user.opening},
            self.user.opening: {self.user.closing},
            self.user.closing: {self.assistant_start, ""},
            self.assistant_start: in_message,
            self.assistant_end: {self.user.opening, ""},
            **{part.opening: {part.closing} for part in parts},
            **{part.closing: in_message for part in parts},
        }

    @cached_property
    def text_after(self) -> dict[str, int]:
        """Role of the text after each delimiter that may have text after it."""
        roles = {span.opening: role for role, span in enumerate(self.spans) if span.opening}
        return roles | dict.fromkeys((self.assistant_start, self.python.closing, self.output.closing), TEXT)


NANOCHAT = ChatFormat()


def written(part: Part) -> str:
    """The text of a part as it is encoded."""
    return f"<think>\n{part['text']}\n</think>\n\n" if part["type"] == "reasoning" else part["text"]


# An event is the number of a delimiter. START is the state before a document's first token, END comes after its last
EVENTS = {token: number for number, token in enumerate(NANOCHAT.delimiters, start=1)}
START, OTHER, END = 0, len(EVENTS) + 1, len(EVENTS) + 2  # OTHER: a special token that the format does not use
NAMES = ("start", *(token.strip("<|>") for token in EVENTS), "another special token", "end")


class Grammar(NamedTuple):
    """The chat format, or plain text for stage base, as arrays by event."""

    stage: str
    allowed: np.ndarray  # bool [events, events]: the second may come next after the first
    role_after: np.ndarray  # int64 [events]: span role of the text after it; -1 where no text may be
    opens: np.ndarray  # bool [events]: the span of the text after it includes it and the next delimiter
    delimiter_mask: np.ndarray  # uint8 [events]
    text_mask: np.ndarray  # uint8 [events]: of the text after it


@cache
def grammar_of(stage: str) -> Grammar:
    """The grammar of documents of a stage, from NANOCHAT."""
    followers, text_after = NANOCHAT.followers, NANOCHAT.text_after
    if stage == "base":
        followers, text_after = {"": {NANOCHAT.bos}, NANOCHAT.bos: {""}}, {NANOCHAT.bos: TEXT}
    allowed = np.zeros((END + 1, END + 1), dtype=bool)
    for token, following in followers.items():
        allowed[EVENTS.get(token, START), [EVENTS.get(follower, END) for follower in following]] = True
    role_after = np.full(END + 1, -1)
    opens, delimiter_mask, text_mask = (np.zeros(END + 1, dtype=dtype) for dtype in (bool, np.uint8, np.uint8))
    for token, role in text_after.items():
        role_after[EVENTS[token]] = role
        opens[EVENTS[token]] = token == NANOCHAT.spans[role].opening
        text_mask[EVENTS[token]] = NANOCHAT.spans[role].supervised
    for token, supervised in NANOCHAT.delimiters.items():
        delimiter_mask[EVENTS[token]] = supervised
    return Grammar(stage, allowed, role_after, opens, delimiter_mask, text_mask)
