"""An answer on its way to a client: whole characters, calls and results as fenced blocks, nothing of a stop string.

tokens    It is  ⟨python_start⟩ 2+3 ⟨python_end⟩ ⟨output_start⟩ 5 ⟨output_end⟩ .
text      It is \\n```python\\n2+3\\n```\\n```output\\n5\\n```\\n.
"""

import asyncio
import codecs
from collections.abc import AsyncIterator, Sequence

from starlette.exceptions import HTTPException
from starlette.types import Receive

from chatdata.render.format import NANOCHAT
from chatdata.tokenizer.bpe import Tokenizer
from chateval.ask.generate import Completion, Prompt

CALL, RESULT = NANOCHAT.python, NANOCHAT.output
FENCES = {CALL.opening: "\n```python\n", CALL.closing: "\n```\n"}
FENCES |= {RESULT.opening: "```output\n", RESULT.closing: "\n```\n"}


class ApiError(Exception):
    """An error object of OpenAI's API, with its status; `param` is the key that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def api_error(error: Exception) -> ApiError:
    """Any error as one for clients."""
    if isinstance(error, HTTPException):  # of starlette: no such address, or another method
        return ApiError(error.status_code, error.detail)
    return error if isinstance(error, ApiError) else ApiError(500, f"{error} ({type(error).__name__})")


class Answer:
    """A thread `add`s tokens and `finish`es it, the event loop that made it reads `texts`. `end`: once it is over."""

    def __init__(self, prompt: Prompt, stop: str | Sequence[str], tokenizer: Tokenizer, receive: Receive) -> None:
        self.prompt, self.tokenizer, self.stops = prompt, tokenizer, [stop] if isinstance(stop, str) else stop
        self.names = {token: name for name, token in tokenizer.special_ids.items()}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.is_empty, self.is_call, self.is_stopped = "", True, False, False
        self.end: Completion | ApiError | None = None
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        self.watcher = asyncio.create_task(self._watch(receive))

    def add(self, token: int, forced: bool) -> bool:
        """Whether no more tokens are wanted, because of a stop string or because it is over.

        forced: by the calculator. A result that the model makes up keeps the names of its special tokens.
        """
        name = self.names.get(token)
        text = self.decoder.decode(self.tokenizer.token_bytes.get(token, b""), final=name is not None)
        if name is not None:
            is_fence = forced or name == CALL.opening or (name == CALL.closing and self.is_call)
            self.is_call = name == CALL.opening
            text += (FENCES[name] if is_fence else name).removeprefix("\n" if self.is_empty and not text else "")
        self._give(text)
        return self.is_stopped or self.end is not None

    def finish(self, end: Completion | ApiError) -> None:
        """May be called twice, and by any thread; the first end counts."""
        if not self.is_stopped and isinstance(end, Completion):
            self._give(self.decoder.decode(b"", final=True), hold=False)
        if self.end is None:
            self.end = end
            self.loop.call_soon_threadsafe(self.events.put_nowait, None)

    async def texts(self) -> AsyncIterator[str]:
        """The text, piece by piece. Raises the ApiError that it ended with, if it did."""
        while (text := await self.events.get()) is not None:
            yield text
        if isinstance(self.end, ApiError):
            raise self.end

    async def _watch(self, receive: Receive) -> None:
        """End it when its client hangs up. There is nothing else to receive until the response is complete."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.finish(ApiError(400, "the client hung up"))

    def _give(self, text: str, hold: bool = True) -> None:
        """Pass on `text` up to a stop string, or up to where one may have begun."""
        self.is_empty = self.is_empty and not text
        text = self.held + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        starts = (n for stop in self.stops for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        end = min(found, default=len(text) - hold * max(starts, default=0))
        self.is_stopped, self.held = bool(found), text[end:]
        if end:
            self.loop.call_soon_threadsafe(self.events.put_nowait, text[:end])
