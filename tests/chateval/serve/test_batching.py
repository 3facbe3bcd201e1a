"""Batches: answers of many requests at once are those of one after the other; who hangs up makes room."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

import chateval.serve.batching


def requests_of_all_kinds(number):
    draw = random.Random(3)
    for seed in range(number):
        text = "".join(draw.choices("abc 123.é😀", k=draw.randint(1, 60)))
        more = {"temperature": draw.choice([0, 0.3, 1, 1.7]), "top_p": draw.choice([1, 0.9, 0.4]), "seed": seed}
        more |= {"max_tokens": draw.randint(1, 24), "stop": draw.choice([None, "e", ["a", "th"]])}
        yield {"model": "random", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that are answered."""
    sizes, generate = [], chateval.serve.batching.generate

    def counted(subject, prompts, on_token):
        sizes.append(len(prompts))
        return generate(subject, prompts, on_token)

    monkeypatch.setattr(chateval.serve.batching, "generate", counted)
    return sizes


def test_64_at_once_are_one_after_the_other(served_random, batches) -> None:
    asked = list(requests_of_all_kinds(64))

    def answer(request):
        found = served_random.client.chat.completions.create(**request)
        return found.choices[0].message.content, found.choices[0].finish_reason, found.usage

    alone = [answer(request) for request in asked]
    assert batches == [1] * 64
    with ThreadPoolExecutor(64) as threads:
        together = list(threads.map(answer, asked))
    assert together == alone
    assert sum(batches[64:]) == 64 and max(batches[64:]) > 8, batches[64:]
    assert len({text for text, _, _ in alone}) > 40 and {reason for _, reason, _ in alone} == {"stop", "length"}


ENDLESS = {"model": "sums", "messages": [{"role": "user", "content": "one 2"}], "temperature": 0}  # asks on


def test_who_hangs_up_makes_room(sums, serve, batches, monkeypatch) -> None:
    """In a batch, while waiting, with and without a stream; the next request is answered at once."""
    monkeypatch.setattr(chateval.serve.batching, "MAX_WAITING", 2)
    with serve(replace(sums, num_positions=20_000)) as served:
        complete = served.client.chat.completions.create

        def gives_up() -> None:
            with pytest.raises(openai.APITimeoutError):
                served.client.with_options(timeout=0.5).chat.completions.create(**ENDLESS)

        first = complete(**ENDLESS, stream=True)
        assert next(iter(first)).choices[0].delta.role == "assistant"
        wait_until(lambda: batches == [1])
        quiet = threading.Thread(target=gives_up)
        quiet.start()
        wait_until(lambda: len(served.batcher.waiting) == 1)
        waiting = complete(**ENDLESS, stream=True)
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting") as refused:
            complete(**ENDLESS, stream=True)
        assert refused.value.response.headers["retry-after"] == "1"
        waiting.close()
        quiet.join()
        wait_until(lambda: all(answer.end for answer in served.batcher.waiting))
        first.close()
        assert complete(**{**ENDLESS, "max_tokens": 1}).usage.completion_tokens == 1
        assert batches == [1, 1]
        running = complete(**ENDLESS, stream=True)
        wait_until(lambda: len(batches) == 3)
    with pytest.raises(openai.APIError, match="the server has been stopped"):
        list(running)


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_batch_that_fails_is_told_to_its_clients(served_random, monkeypatch) -> None:
    def out_of_memory(subject, prompts, on_token):
        raise MemoryError("not enough for 1 answer")

    body = {"model": "random", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    with monkeypatch.context() as patch:
        patch.setattr(chateval.serve.batching, "generate", out_of_memory)
        with pytest.raises(openai.InternalServerError, match="not enough for 1 answer"):
            served_random.client.chat.completions.create(**body)
        with pytest.raises(openai.APIError, match="not enough for 1 answer"):  # after the first byte: an event
            list(served_random.client.chat.completions.create(**body, stream=True))
    assert served_random.client.chat.completions.create(**body).usage.completion_tokens == 2
