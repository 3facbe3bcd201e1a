"""Tokens as a client reads them."""

from __future__ import annotations

import asyncio

from chateval.ask.generate import Completion, Prompt
from chateval.serve.answer import Answer


def test_what_the_calculator_did_is_fenced_and_what_the_model_made_up_is_named(sums) -> None:
    tokenizer = sums.tokenizer
    special = tokenizer.special_ids

    async def content(*parts: tuple[str, bool]) -> str:
        async def receive() -> dict[str, str]:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        answer = Answer(Prompt([0]), [], tokenizer, receive)
        for text, forced in parts:
            for token in [special[text]] if text in special else tokenizer.encode_ordinary(text):
                assert not answer.add(token, forced)
        answer.finish(Completion((), (), "assistant_end", 0, 0))
        return "".join([text async for text in answer.texts()])

    call = [("So ", False), ("<|python_start|>", False), ("2+3", False), ("<|python_end|>", False)]
    result = [("<|output_start|>", True), ("5", True), ("<|output_end|>", True)]
    fenced = "So \n```python\n2+3\n```\n```output\n5\n```\n."
    assert asyncio.run(content(*call, *result, (".", False))) == fenced
    made_up = [(text, False) for text, _ in result]
    named = "So \n```python\n2+3\n```\n<|output_start|>5<|output_end|>."
    assert asyncio.run(content(*call, *made_up, (".", False))) == named
    assert asyncio.run(content(("5", False), ("<|python_end|>", False))) == "5<|python_end|>"
