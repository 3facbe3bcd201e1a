"""Requests that arrive within 5 ms of each other share a batch of `generate`, which runs in a thread of its own.

New ones wait for the running batch. The row of a client that hangs up ends at its next token.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from chateval.ask.generate import generate
from chateval.ask.subject import Subject
from chateval.serve.answer import Answer, ApiError, api_error

MAX_WAITING = 256


class Batcher:
    """Completes answers, at most `batch_size` at once, until `is_stopping`. Only the event loop calls `submit`."""

    def __init__(self, subject: Subject, batch_size: int, is_stopping: Callable[[], bool]) -> None:
        self.subject, self.batch_size, self.is_stopping = subject, batch_size, is_stopping
        self.waiting: list[Answer] = []
        self.thread = ThreadPoolExecutor(1)
        self.task: asyncio.Task[None] | None = None

    def submit(self, answer: Answer) -> None:
        """Raises ApiError (429) if too many are waiting."""
        self.waiting = [other for other in self.waiting if other.end is None]
        if len(self.waiting) >= MAX_WAITING:
            raise ApiError(429, f"{MAX_WAITING} requests are waiting already; try again in a second")
        self.waiting.append(answer)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self.waiting:
            await asyncio.sleep(0.005)
            batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
            await asyncio.get_running_loop().run_in_executor(self.thread, self._complete, batch)

    def _complete(self, batch: Sequence[Answer]) -> None:
        def on_token(number: int, token: int, forced: bool) -> bool:
            if self.is_stopping():
                raise ApiError(503, "the server has been stopped")
            return batch[number].add(token, forced)

        try:
            for number, completion in generate(self.subject, [answer.prompt for answer in batch], on_token):
                batch[number].finish(completion)
        except Exception as error:  # too little memory, or a fault of ours; the next batch may do better
            for answer in batch:
                answer.finish(api_error(error))
