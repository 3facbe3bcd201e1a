"""Generation: many prompts at once, with a key/value cache and the calculator tool in between.

Each row of a batch is at its own place in its own answer:

    chosen    python_start 1 2 + 3 python_end                              . assistant_end
    forced                                    output_start 1 5 output_end

Between python_start and python_end the row's tokens are an expression. At python_end the calculator's result is put
into the answer, token by token, in place of what the model would say; an expression that cannot be calculated leaves
the model to go on by itself (karpathy/nanochat@790f3be:nanochat/engine.py does the same). Rows that ended are dropped.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from chatdata.calculator import calculate
from chatdata.errors import CalculatorError
from chateval.ask.kv_cache import KeyValueCache
from chateval.ask.subject import prompt_logits

if TYPE_CHECKING:
    from chatdata.tokenizer.bpe import Tokenizer
    from chateval.ask.subject import Subject

# assistant_end and bos end an answer; the others say why one was cut
Ending = Literal["assistant_end", "bos", "max_tokens", "context"]

DROP_SHARE = 0.25  # of the rows have ended before the cache is copied without them: a copy at every end costs more


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: the highest logit, the lowest id of several."""

    temperature: float = 0.0
    top_k: int | None = None
    max_new_tokens: int = 512  # forced ones included
    seed: int = 42


@dataclass(frozen=True)
class Prompt:
    """What to continue. `key` names problem and draw: with the seed it decides the row's random numbers."""

    tokens: Sequence[int]
    key: str = ""


@dataclass(frozen=True)
class Completion:
    """An answer, without the token that ended it."""

    tokens: tuple[int, ...]
    forced: tuple[bool, ...]  # per token: put there by the tool
    ending: Ending
    tool_calls: int
    tool_failures: int  # calls whose expression could not be calculated


@dataclass
class _Row:
    """One answer in the making."""

    prompt: Prompt
    generator: random.Random
    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)  # tokens still to be forced
    expression: list[int] | None = None  # tokens since python_start
    tool_calls: int = 0
    tool_failures: int = 0

    @property
    def position(self) -> int:
        """Of the newest token."""
        return len(self.prompt.tokens) + len(self.tokens) - 1


def generate(
    subject: Subject,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    on_token: Callable[[int, int, bool], None] | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Continue all of `prompts` as one batch; yield (number of the prompt, answer) as each ends.

    on_token: called with (number of the prompt, token, forced) for each token, for showing it at once.
    A prompt that fills the model's positions ends at once, with ending "context".
    """
    special = subject.tokenizer.special_ids
    ends: dict[int, Ending] = {special["<|assistant_end|>"]: "assistant_end", special["<|bos|>"]: "bos"}
    rows: list[_Row | None] = []
    numbers = []
    for number, prompt in enumerate(prompts):
        if len(prompt.tokens) >= subject.num_positions:
            yield number, Completion((), (), "context", 0, 0)
        else:
            rows.append(_Row(prompt, random.Random(_seed(sampling.seed, prompt.key))))
            numbers.append(number)
    if not rows:
        return
    cache, logits = _read_prompts(subject, [row.prompt.tokens for row in rows if row], sampling)
    while True:
        chosen = _choose(logits, rows, sampling)
        for i, row in enumerate(rows):
            if row is None:
                continue
            forced = bool(row.waiting)
            token = row.waiting.popleft() if forced else chosen[i]
            ending = None if forced else ends.get(token)
            if ending is None:
                _accept(row, token, forced, subject.tokenizer)
                if on_token is not None:
                    on_token(numbers[i], token, forced)
                ending = _cut(row, subject.num_positions, sampling)
            if ending is not None:
                yield numbers[i], _complete(row, ending)
                rows[i] = None
        going = [i for i, row in enumerate(rows) if row is not None]
        if not going:
            return
        if len(rows) - len(going) >= DROP_SHARE * len(rows):
            cache.keep(going)
            rows, numbers = [rows[i] for i in going], [numbers[i] for i in going]
        logits = _read_tokens(subject, rows, cache)


def _read_prompts(subject: Subject, prompts: list[Sequence[int]], sampling: Sampling) -> tuple[KeyValueCache, Tensor]:
    """A cache that holds the prompts, and the logits [B, V] behind each."""
    num_slots = min(max(map(len, prompts)) + sampling.max_new_tokens, subject.num_positions)
    cache = KeyValueCache(subject.model.config, len(prompts), num_slots, subject.device, subject.dtype)
    cache.start()
    return cache, prompt_logits(subject, prompts, cache)


def _read_tokens(subject: Subject, rows: list[_Row | None], cache: KeyValueCache) -> Tensor:
    """Feed each row's newest token (for an ended row still here: anything); logits [B, V] behind it."""
    tokens = [0 if row is None else row.tokens[-1] for row in rows]
    positions = [0 if row is None else row.position for row in rows]
    place = torch.tensor(positions, device=subject.device)
    cache.advance(place, max(positions))
    hidden = subject.hidden(torch.tensor(tokens, device=subject.device)[:, None], place[:, None], cache)
    return subject.logits(hidden[:, 0])


def _choose(logits: Tensor, rows: list[_Row | None], sampling: Sampling) -> list[int]:
    """A token for each row from logits [B, V]; each row's draws are its own, whatever else is in the batch."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()  # the first of several equal ones
    scaled = logits.cpu().double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.size(-1):
        smallest = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    shares = scaled.softmax(-1).cumsum(-1)
    # one number a row and chosen token: forced tokens draw none, so that they do not move the draws behind them
    draws = [0.0 if row is None or row.waiting else row.generator.random() for row in rows]
    drawn = torch.tensor(draws, dtype=torch.float64)[:, None] * shares[:, -1:]
    return torch.searchsorted(shares, drawn, right=True).squeeze(1).clamp(max=logits.size(-1) - 1).tolist()


def _accept(row: _Row, token: int, forced: bool, tokenizer: Tokenizer) -> None:
    """Append a token, and call the calculator where it closes an expression."""
    special = tokenizer.special_ids
    row.tokens.append(token)
    row.forced.append(forced)
    if forced:
        return
    if token == special["<|python_start|>"]:
        row.expression = []
    elif token == special["<|python_end|>"] and row.expression is not None:
        row.tool_calls += 1
        try:
            result = calculate(tokenizer.decode(row.expression))
        except CalculatorError:
            row.tool_failures += 1
        else:
            output = tokenizer.encode_ordinary(result)
            row.waiting.extend([special["<|output_start|>"], *output, special["<|output_end|>"]])
        row.expression = None
    elif row.expression is not None:
        row.expression.append(token)


def _cut(row: _Row, num_positions: int, sampling: Sampling) -> Ending | None:
    if len(row.tokens) >= sampling.max_new_tokens:
        return "max_tokens"
    return "context" if row.position + 1 >= num_positions else None


def _complete(row: _Row, ending: Ending) -> Completion:
    return Completion(tuple(row.tokens), tuple(row.forced), ending, row.tool_calls, row.tool_failures)


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little")
