"""A server in this process, on a free port of loopback, that answers with one of the models of the tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import uvicorn

from chateval.serve.app import make_app
from chateval.serve.batching import Batcher


@dataclass
class Served:
    url: str
    batcher: Batcher

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)


@contextmanager
def serving(subject: Any, token: str | None = None, batch_size: int = 64) -> Iterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0))
    batcher = Batcher(subject, batch_size, lambda: server.should_exit)
    app = make_app(subject, batcher, token)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=[[listener]])
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", batcher)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    return serving


@pytest.fixture(scope="session")
def sums(scripted_subject) -> Any:
    """Answers the last question, "A B", with a tool call A+B and its result."""

    @dataclass(frozen=True, eq=False)
    class Sums(type(scripted_subject)):
        label: str = "runs/sums"

        def logits(self, hidden: Any) -> Any:
            return 1000 * super().logits(hidden)  # the same at every temperature

        def next_token(self, seen: list[int]) -> int:
            places = {}  # of the last of each special token
            for place, token in enumerate(seen):
                places[token] = place
            user, end, start = (
                places.get(self.tokenizer.special_ids[name])
                for name in ("<|user_start|>", "<|user_end|>", "<|assistant_start|>")
            )
            if start is None:
                return 0
            return super().next_token([seen[0], *seen[user + 1 : end], *seen[start:]])

    return Sums(scripted_subject.tokenizer)


@pytest.fixture(scope="session")
def served_sums(sums) -> Iterator[Served]:
    with serving(sums) as served:
        yield served


@pytest.fixture(scope="session")
def served_random(random_subject) -> Iterator[Served]:
    """Random weights, named random, with 256 positions."""
    with serving(random_subject) as served:
        yield served
