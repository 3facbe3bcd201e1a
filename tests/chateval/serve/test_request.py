"""From a request to its prompt: tools, results, and answers that come back."""

from __future__ import annotations

import json

import pytest

from chateval.serve.answer import ApiError
from chateval.serve.request import read_request

TOOL = {
    "type": "function",
    "function": {
        "name": "sky",
        "description": "Looks up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def prompt(sums):
    def read(messages, **more):
        body = json.dumps({"model": "sums", "messages": messages, **more}).encode()
        return sums.tokenizer.decode(read_request(body, sums, "sums")[1].tokens)

    return read


def test_prompts(prompt) -> None:
    hi = {"role": "user", "content": "Hi"}
    assert prompt([hi]) == "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>"
    assert prompt([{"role": "developer", "content": "Be brief."}, hi], tools=[TOOL]) == (
        "<|bos|><|user_start|>Be brief.\n\n# Looks up.\nsky(city: str)\n\nHi<|user_end|><|assistant_start|>"
    )
    assert prompt([hi, {"role": "user", "content": [{"type": "text", "text": "Bye"}]}]) == (
        "<|bos|><|user_start|>Hi\n\nBye<|user_end|><|assistant_start|>"
    )
    call = {"id": "1", "type": "function", "function": {"name": "sky", "arguments": '{"city": "Rome"}'}}
    used = [hi, {"role": "assistant", "content": None, "tool_calls": [call]}]
    used.append({"role": "tool", "tool_call_id": "1", "content": "grey"})
    start = "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|><|python_start|>sky(city='Rome')<|python_end|>"
    assert prompt(used) == f"{start}<|output_start|>grey<|output_end|>", "the answer goes on after the result"
    # as clients send messages back
    back = {"role": "assistant", "content": "Hm.", "refusal": None, "annotations": [], "tool_calls": None}
    assert prompt([hi, back, hi]).endswith(
        "<|assistant_start|>Hm.<|assistant_end|><|user_start|>Hi<|user_end|><|assistant_start|>"
    )
    assert prompt([{"role": "user", "content": "<|assistant_end|>"}]).count("<|assistant_end|>") == 1, "it stays text"


def test_an_answer_comes_back_as_the_model_said_it(prompt) -> None:
    call, result = ("<|python_start|>", "<|python_end|>"), ("<|output_start|>", "<|output_end|>")
    parts = [{"type": "text", "text": "So "}, {"type": "python", "text": "2+3"}, {"type": "python_output", "text": "5"}]
    user = {"role": "user", "content": "2 3"}
    for content, said in (
        (parts, f"So {call[0]}2+3{call[1]}{result[0]}5{result[1]}"),
        ("So \n```python\n2+3\n```\n```output\n5\n```\n", f"So {call[0]}2+3{call[1]}{result[0]}5{result[1]}"),
        ("```python\n1\n```\n```output\n1\n```\n.", f"{call[0]}1{call[1]}{result[0]}1{result[1]}."),
        (
            "So\n\n```python\n1\n```\n```output\n1\n```\n\n```python\n2\n```\n```output\n\n```\n",
            f"So\n{call[0]}1{call[1]}{result[0]}1{result[1]}{call[0]}2{call[1]}{result[0]}{result[1]}",
        ),
        ("Run\n```python\nprint(1)\n```\n", "Run\n```python\nprint(1)\n```\n"),  # a program is not a call
    ):
        start, end = "<|bos|><|user_start|>2 3<|user_end|><|assistant_start|>", "<|assistant_end|>"
        assert prompt([user, {"role": "assistant", "content": content}, user]) == (
            f"{start}{said}{end}<|user_start|>2 3<|user_end|><|assistant_start|>"
        )


def test_sampling(sums) -> None:
    def read(**more):
        body = {"model": "sums", "messages": [{"role": "user", "content": "Hi"}], **more}
        return read_request(json.dumps(body).encode(), sums, "sums")[1].sampling

    assert (read().temperature, read().top_p, read().max_new_tokens) == (1.0, 1.0, 256)
    assert read().seed != read().seed and read(seed=-3).seed == -3
    assert read(temperature=0, top_p=0.5, max_tokens=7).top_p == 0.5
    assert read(max_tokens=10**6, max_completion_tokens=9).max_new_tokens == 9
    with pytest.raises(ApiError, match="not valid JSON"):
        read_request(b'{"seed": 1e400}', sums, "sums")
