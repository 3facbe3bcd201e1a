"""Requests that no client would send: an error object or an answer, never a 5xx, a broken stream or a traceback.

    CHATEVAL_FUZZ=1000 uv run pytest -q tests/chateval/serve/test_malformed.py

sends more of them, each time others.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from collections import Counter
from typing import Any

NUM = int(os.environ.get("CHATEVAL_FUZZ", "150"))
LONE = "\ud800"
KEYS = (
    *("model", "messages", "tools", "stream", "stream_options", "temperature", "top_p", "max_tokens", "seed", "stop"),
    *("max_completion_tokens", "n", "logprobs", "response_format", "tool_choice", "user", "functions", "x", "", LONE),
)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "2 3"},
    {"role": "user", "content": [{"type": "text", "text": "2 3"}]},
    {"role": "assistant", "content": "#### 5"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "5"},
    {"from": "human", "value": "2 3"},
    {},
]
VALUES = (None, True, False, 0, 1, -1, 2, 10**30, -0.0, 1e-310, 1e308, float("nan"), float("inf"), "", "a", LONE, "😀")
VALUES += ("\x00\x1b[31m", "<|assistant_end|>", "x" * 3000, [], {}, [[]], [{}], ["a"], {"a": {"b": []}}, "sums")
TYPES = (
    "application/json",
    "application/json; charset=utf-8",
    "text/plain",
    "",
    "application/json\x80",
    "multipart/form-data",
)


def anything(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if depth < 4 and kind < 0.2:
        return [anything(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    if depth < 4 and kind < 0.4:
        names = [*KEYS, "role", "content", "type", "text", "function", "name", "arguments", "parameters", "properties"]
        return {draw.choice(names): anything(draw, depth + 1) for _ in range(draw.randint(0, 3))}
    return draw.choice(VALUES)


def body(draw: random.Random) -> bytes:
    """Most are nearly right."""
    fields: dict[str, Any] = {
        "model": "sums",
        "messages": draw.choices(MESSAGES, k=draw.randint(1, 3)),
        "max_tokens": 20,
    }
    if draw.random() < 0.7:
        fields["messages"].append(MESSAGES[1])
    fields["stream"] = draw.random() < 0.5
    for _ in range(draw.choice((0, 0, 1, 1, 2))):
        fields[draw.choice(KEYS)] = anything(draw)
    if draw.random() < 0.2:
        fields["tools"] = [anything(draw), {"type": "function", "function": anything(draw)}]
    data = json.dumps(fields).encode()
    how = draw.random()
    if how < 0.1:
        place = draw.randrange(len(data))
        data = data[:place] + bytes([draw.randrange(256)]) + data[place + draw.randint(0, 3) :]
    elif how < 0.15:
        data = data[: draw.randrange(len(data))]
    elif how < 0.2:
        data = draw.choice((b"", b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe", b"null", b"1" * 5000, data * 2))
    return data


def test_malformed_requests(served_sums, capfd) -> None:
    seed = 0 if "CHATEVAL_FUZZ" not in os.environ else time.time_ns()
    draw, port = random.Random(seed), int(served_sums.url.rpartition(":")[2])
    statuses: Counter[int] = Counter()
    for number in range(NUM):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        data = body(draw)
        headers = {"Content-Type": TYPES[0] if draw.random() < 0.9 else draw.choice(TYPES).encode("latin-1")}
        if draw.random() < 0.05:
            headers["Host"] = draw.choice(("", "evil.example", "[", "127.0.0.1:x", "a@127.0.0.1", "\x80")).encode(
                "latin-1"
            )
        method = "POST" if draw.random() < 0.95 else draw.choice(("GET", "PUT", "DELETE", "OPTIONS", "HEAD"))
        path = (
            "/v1/chat/completions"
            if draw.random() < 0.95
            else draw.choice(("/v1", "//", "/v1/chat/completions/", "/%00", "/%ff"))
        )
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
        statuses[response.status] += 1
        what = (seed, number, method, path, headers, data[:2000], response.status, text[:300])
        assert response.status < 500, what
        if response.status == 200 and "text/event-stream" in response.headers["content-type"]:
            events = text.removesuffix("\n\n").split("\n\n")
            assert events[-1] == "data: [DONE]" and all(event.startswith("data: ") for event in events), what
            assert all("error" not in json.loads(event[6:]) for event in events[:-1]), what
        elif method != "HEAD" and response.status != 307:
            answer = json.loads(text)
            assert "choices" in answer if response.status == 200 else list(answer) == ["error"], what
            assert response.status == 200 or list(answer["error"]) == ["message", "type", "param", "code"], what
        connection.close()
    assert statuses[200] > NUM / 40 and statuses[400] > NUM / 3
    assert "Traceback" not in "".join(capfd.readouterr())
    if "CHATEVAL_FUZZ" in os.environ:
        with capfd.disabled():
            print(dict(statuses))
    question = [{"role": "user", "content": "1 1"}]
    answer = served_sums.client.chat.completions.create(model="sums", messages=question)
    assert answer.choices[0].message.content.endswith("#### 2"), "it still answers"
