"""Hypothesis strategies that several rooms share: conversations in the common form (chatdata/conversation.py)."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

PART_TYPES = ("text", "reasoning", "python", "python_output")
SPELLED = ["", " ", "\x00", "a\r\n", "<|bos|>", "<|user_end|>12", "🤖é", "f(x=1)", "<think>a</think>b", "<think>c"]

texts = st.one_of(st.text(max_size=12), st.sampled_from(SPELLED))


@st.composite
def parts(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(PART_TYPES))
    text = draw(texts)
    part: dict[str, Any] = {"type": kind, "text": text.strip() if kind == "reasoning" else text}
    return part if draw(st.booleans()) else {**part, "trained": False}


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """Tool calls without results, results without calls and parts in any order are part of the common form."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for turn in range(draw(st.integers(1, 5))):
        message: dict[str, Any] = {"role": "user", "content": draw(texts)}
        if turn % 2:
            message = {"role": "assistant", "content": draw(texts | st.lists(parts(), max_size=5))}
            if draw(st.integers(0, 3)) == 0:
                message["trained"] = False
        messages.append(message)
    return {"messages": messages}
