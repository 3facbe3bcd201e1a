"""The server as clients see it: the real openai client, and raw HTTP for what no client would send."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.error
import urllib.request

import openai
import pytest

SUM = [{"role": "user", "content": "2 3"}]
ANSWER = "```python\n2+3\n```\n```output\n5\n```\n#### 5"


def ask(served, model="sums", **more):
    return served.client.chat.completions.create(**{"model": model, "messages": SUM, "temperature": 0, **more})


def streamed(served, model="sums", **more):
    """(text, finish reason, usage) of a stream."""
    text, reason, usage = "", None, None
    for chunk in ask(served, model, stream=True, stream_options={"include_usage": True}, **more):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, usage


def post(url, body, **headers):
    """(status, object) of a POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_models_and_a_tool_call(served_sums) -> None:
    (model,) = served_sums.client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("sums", "model", "chateval")
    answer = ask(served_sums)
    assert answer.choices[0].message.content == ANSWER
    assert (answer.choices[0].finish_reason, answer.model, answer.object) == ("stop", "sums", "chat.completion")
    text, reason, usage = streamed(served_sums)
    assert (text, reason, usage) == (ANSWER, "stop", answer.usage)
    # bos, user_start, 2, space, 3, user_end, assistant_start
    assert answer.usage.prompt_tokens == 7 and answer.usage.total_tokens == 7 + answer.usage.completion_tokens


def test_limits_of_an_answer(served_sums, served_random) -> None:
    for more, text, reason in (
        ({"max_tokens": 3}, "```python\n2+", "length"),
        ({"max_completion_tokens": 3, "max_tokens": 9}, "```python\n2+", "length"),
        ({"stop": "####"}, ANSWER[:-6], "stop"),
        ({"stop": ["never", "\n5", "5"]}, "```python\n2+3\n```\n```output", "stop"),
        ({"stop": ["5\n#", "5\n``!"]}, ANSWER, "stop"),  # nothing that was held back is lost
    ):
        assert streamed(served_sums, **more)[:2] == (text, reason)
        choice = ask(served_sums, **more).choices[0]
        assert (choice.message.content, choice.finish_reason) == (text, reason)
    for temperature in (0, 1):
        some = [streamed(served_random, "random", temperature=temperature, seed=7, max_tokens=30) for _ in range(2)]
        assert some[0] == some[1] and some[0][2].completion_tokens == 30
        whole = ask(served_random, "random", temperature=temperature, seed=7, max_tokens=30)
        assert whole.choices[0].message.content == some[0][0], "a character may be of several tokens"
    texts = {streamed(served_random, "random", temperature=1, max_tokens=9)[0] for _ in range(4)}
    assert len(texts) == 4, "without a seed every answer is another"
    assert ask(served_random, "random", temperature=1, top_p=0, max_tokens=20).choices[0].message.content == (
        ask(served_random, "random", temperature=0, max_tokens=20).choices[0].message.content
    )


REFUSED = [  # a body, the status, the key that is named, and what the message says
    ({"model": "gpt-4o"}, 404, "model", 'no model "gpt-4o"; this server has sums'),
    ({"model": None}, 400, None, 'no key "model"'),
    ({"logprobs": True}, 400, "logprobs", 'key "logprobs": can only be false here, not true'),
    ({"n": 2}, 400, "n", 'key "n": can only be 1 here, not 2'),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", 'can only be {"type": "text"} here'),
    ({"tool_choice": "required"}, 400, "tool_choice", 'can only be "auto" here, not "required"'),
    ({"temprature": 1}, 400, "temprature", 'unknown key "temprature"; did you mean "temperature"?'),
    ({"temperature": 2.5}, 400, "temperature", "must be a number of at least 0 and at most 2, not 2.5"),
    ({"temperature": "hot"}, 400, "temperature", 'not "hot"'),
    ({"top_p": -0.1}, 400, "top_p", "not -0.1"),
    ({"max_tokens": 0}, 400, "max_tokens", "must be an integer of at least 1, not 0"),
    ({"max_tokens": True}, 400, "max_tokens", "not true"),
    ({"stop": ["a"] * 5}, 400, "stop", "must be a text or a list of at most 4 texts"),
    ({"stop": ""}, 400, "stop", "must be a text"),
    ({"seed": "x"}, 400, "seed", "must be an integer"),
    ({"stream": "yes"}, 400, "stream", "must be true or false"),
    ({"messages": []}, 400, "messages", "must be a list of messages"),
    ({"messages": [*SUM, {"role": "assistant", "content": "5"}]}, 400, "messages", "the last one must be of role user"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "content", "message 0, key"),
    ({"messages": [{"role": "bot", "content": "x"}, *SUM]}, 400, "role", "unknown role 'bot'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "content", "only text"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "must be an object with the name of a function"),
    ({"messages": [{"role": "user", "content": "1 " * 200}]}, 400, "messages", "404 tokens fill the context of 256"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(served_sums, stream) -> None:
    """Before the first byte of a stream, each with the same error object."""
    for changes, status, param, message in REFUSED:
        body = {"model": "sums", "messages": SUM, "stream": stream, **changes}
        found, answer = post(f"{served_sums.url}/v1/chat/completions", body)
        assert (found, list(answer)) == (status, ["error"]), changes
        error = answer["error"]
        assert list(error) == ["message", "type", "param", "code"] and error["type"] == "invalid_request_error"
        assert message in error["message"], changes
        assert param is None or error["param"] == param, (changes, error)
    assert error["code"] == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this server has sums"):
        ask(served_sums, "gpt-4o", stream=stream)
    with pytest.raises(openai.BadRequestError, match="logprobs") as refused:
        ask(served_sums, stream=stream, logprobs=True)
    assert refused.value.param == "logprobs"


def test_what_asks_for_nothing_is_allowed(served_sums) -> None:
    neutral = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "tool_choice": "auto", "logit_bias": {}}
    more = {"user": "me", "metadata": {"a": "b"}, "stop": None, "seed": None, "presence_penalty": 0.0, "store": False}
    assert ask(served_sums, **neutral, **more).choices[0].message.content == ANSWER


BODIES = [  # bytes, and what is said of them
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", "must be a table"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"model": "sums", "model": "sums"}', 'key "model" twice'),
    (b'{"temperature": NaN}', "not valid JSON"),
    (b'{"temperature": 1e999}', "not valid JSON"),
    (b'{"model": "\\ud800"}', "not valid JSON"),
    (b'{"model": "\xff"}', "not valid JSON"),
]


def test_requests_that_are_no_requests(served_sums) -> None:
    url = f"{served_sums.url}/v1/chat/completions"
    for body, message in BODIES:
        status, answer = post(url, body)
        assert status == 400 and message in answer["error"]["message"], (body[:40], answer)
    assert post(url, {}, **{"Content-Type": "text/plain"})[0] == 415
    status, answer = post(url, b" " * (2**20 + 1))
    assert status == 413 and "1048576" in answer["error"]["message"]
    assert post(url, {}, Host="evil.example")[0] == 403
    assert post(f"{served_sums.url}/v1/models", {}) == (405, error_of("Method Not Allowed"))
    assert post(f"{served_sums.url}/v1/completions", {}) == (404, error_of("Not Found"))


def error_of(message, **more):
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}


def test_a_token_is_needed_for_the_api_only(sums, serve) -> None:
    with serve(sums, token="s3cret") as served:
        url = f"{served.url}/v1/models"
        assert status_of(served.url) == 200
        for header in ("", "s3cret", "Bearer", "Bearer s3cre", "Basic s3cret", "Bearer s3cret2", "Bearer s3cr\xe9t"):
            assert status_of(url, Authorization=header) == 401, header
        assert status_of(url, Authorization="Bearer s3cret", Host="gpu.example:8000") == 200
        with pytest.raises(openai.AuthenticationError, match="Bearer TOKEN"):
            ask(served)
        assert ask(served, extra_headers={"Authorization": "Bearer s3cret"}).choices[0].message.content == ANSWER


def status_of(url, **headers) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_other_web_pages_cannot_ask(served_sums) -> None:
    port = served_sums.url.rpartition(":")[2]
    for host, status in (("localhost", 200), (f"localhost:{port}", 200), ("127.0.0.1:1", 200), ("a.example", 403)):
        assert status_of(f"{served_sums.url}/v1/models", Host=host) == status
    assert status_of(f"{served_sums.url}/v1/models", Host="127.0.0.1.a.example") == 403


def test_the_page_runs_nothing_but_itself(served_sums) -> None:
    """Its policy names the hashes of its own script and style; the message shows the right ones after a change."""
    with urllib.request.urlopen(served_sums.url, timeout=30) as response:
        page = response.read().decode()
        assert response.headers["x-frame-options"] == "DENY"
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page
    assert not re.findall(r"innerHTML|https?://|<link[^>]*href=\"[^d]", page)
