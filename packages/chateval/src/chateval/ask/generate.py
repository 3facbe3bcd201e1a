"""Generate answers for many prompts at once, with a key/value cache and the calculator tool.

Each row of a batch is at a different place in its answer:

    chosen    python_start 1 2 + 3 python_end                              . assistant_end
    forced                                    output_start 1 5 output_end

The tokens between python_start and python_end are an expression. At python_end the calculator's result is forced into
the answer, token by token; if the expression cannot be calculated, the model simply continues
(karpathy/nanochat@790f3be:nanochat/engine.py does the same). Finished rows are dropped from the batch.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chatdata.calculator import calculate
from chatdata.errors import CalculatorError
from chatdata.render.format import NANOCHAT
from chatdata.tokenizer.bpe import Tokenizer
from chateval.ask.kv_cache import KeyValueCache
from chateval.ask.subject import Subject, prompt_logits

# assistant_end and bos end an answer; the others say why it was cut
Ending = Literal["assistant_end", "bos", "max_tokens", "context", "stopped"]
# takes the number of the prompt, a token, and whether it was forced; a true result ends the answer
OnToken = Callable[[int, int, bool], bool | None]

DROP_SHARE = 0.25  # copy the cache without its finished rows once they are this share: copying at every end costs more


class Sampling(NamedTuple):
    """How tokens are chosen. At temperature 0 (below 1e-6): the highest logit, and the lowest id among equals."""

    temperature: float = 0.0
    top_k: int | None = None
    max_new_tokens: int = 512  # including forced ones
    seed: int = 42
    top_p: float = 1.0  # draw from the fewest tokens that have this share of the probability


class Prompt(NamedTuple):
    """A prompt to continue. `key` names question and draw; key and seed determine the row's random numbers."""

    tokens: Sequence[int]
    key: str = ""
    sampling: Sampling = Sampling()


class Completion(NamedTuple):
    """An answer, without the token that ended it."""

    tokens: tuple[int, ...]
    forced: tuple[bool, ...]  # per token: put there by the tool
    ending: Ending
    tool_calls: int
    tool_failures: int  # calls whose expression could not be calculated


@dataclass
class _Row:
    """An unfinished answer."""

    prompt: Prompt
    number: int  # of the prompt
    cache_row: int
    generator: random.Random
    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)  # tokens still to be forced
    expression: list[int] | None = None  # tokens since python_start
    tool_calls: int = 0
    tool_failures: int = 0

    @property
    def position(self) -> int:
        """Position of the newest token."""
        return len(self.prompt.tokens) + len(self.tokens) - 1


def generate(
    subject: Subject, prompts: Sequence[Prompt], on_token: OnToken | None = None
) -> Iterator[tuple[int, Completion]]:
    """Continue all `prompts` as one batch, each with its own sampling; yield (its number, answer) as each answer ends.

    on_token: called for each token, to show it immediately. If it returns True, the answer ends there as "stopped".
    A prompt that fills the model's positions ends immediately, with ending "context".
    """
    special = subject.tokenizer.special_ids
    ends: dict[int, Ending] = {special[NANOCHAT.assistant_end]: "assistant_end", special[NANOCHAT.bos]: "bos"}
    rows: list[_Row] = []
    for number, prompt in enumerate(prompts):
        if len(prompt.tokens) >= subject.num_positions:
            yield number, Completion((), (), "context", 0, 0)
        else:
            rows.append(_Row(prompt, number, len(rows), random.Random(_seed(prompt.sampling.seed, prompt.key))))
    if not rows:
        return
    texts = [row.prompt.tokens for row in rows]
    longest = max(len(row.prompt.tokens) + row.prompt.sampling.max_new_tokens for row in rows)
    num_slots = min(longest, subject.num_positions)
    cache = KeyValueCache(subject.model.config, len(rows), num_slots, subject.device, subject.dtype)
    logits = prompt_logits(subject, texts, cache)
    rows.sort(key=_kind)
    while True:
        unfinished = []
        for row, choice in zip(rows, _choose(logits, rows), strict=True):
            forced = bool(row.waiting)
            token = row.waiting.popleft() if forced else choice
            ending = None if forced else ends.get(token)
            if ending is None:
                _accept(row, token, forced, subject.tokenizer)
                is_stopped = on_token is not None and on_token(row.number, token, forced)
                ending = "stopped" if is_stopped else _cut(row, subject.num_positions)
            if ending is None:
                unfinished.append(row)
            else:
                answer = Completion(tuple(row.tokens), tuple(row.forced), ending, row.tool_calls, row.tool_failures)
                yield row.number, answer
        rows = unfinished
        if not rows:
            return
        logits = _read_tokens(subject, rows, cache)


def _read_tokens(subject: Subject, rows: list[_Row], cache: KeyValueCache) -> Tensor:
    """Feed each row's newest token; logits [B, V] after it, for all B rows of the cache (finished ones: anything)."""
    if cache.num_rows - len(rows) >= DROP_SHARE * cache.num_rows:
        cache.keep([row.cache_row for row in rows])
        for place, row in enumerate(rows):
            row.cache_row = place
    newest = torch.zeros(2, cache.num_rows, dtype=torch.int64)
    newest[:, [row.cache_row for row in rows]] = torch.tensor([(row.tokens[-1], row.position) for row in rows]).T
    tokens, positions = newest.to(subject.device)
    cache.advance(positions, max(row.position for row in rows))
    return subject.logits(subject.hidden(tokens[:, None], positions[:, None], cache)[:, 0])


def _choose(logits: Tensor, rows: list[_Row]) -> list[int]:
    """A token for each row, from logits [B, V]. A row's draws do not depend on what else is in the batch."""
    return [token for _, alike in groupby(rows, _kind) for token in _choose_alike(logits, list(alike))]


def _kind(row: _Row) -> tuple[float, int, float]:
    """Rows of one kind are drawn together."""
    sampling = row.prompt.sampling
    return sampling.temperature, sampling.top_k or 0, sampling.top_p


def _choose_alike(logits: Tensor, rows: list[_Row]) -> list[int]:
    cache_rows, sampling = [row.cache_row for row in rows], rows[0].prompt.sampling
    if sampling.temperature < 1e-6:  # a logit divided by less may overflow
        best = logits.argmax(-1).tolist()  # the first of equal ones
        return [best[place] for place in cache_rows]
    # softmax where the logits are, in fp32 on a GPU; sums and draw in float64 on the CPU: 32 × 65,536 logits took 20 ms
    wide = torch.float64 if logits.device.type == "cpu" else torch.float32
    scaled = logits[cache_rows].to(wide) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.size(-1):
        smallest = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        descending = probabilities.sort(-1, descending=True).values
        num_kept = (descending.cumsum(-1) - descending < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)
        probabilities = probabilities.masked_fill(probabilities < descending.gather(-1, num_kept - 1), 0)
    shares = probabilities.cpu().double().cumsum(-1)
    # one number per row and chosen token; forced tokens take none, so they do not change the draws after them
    draws = [0.0 if row.waiting else row.generator.random() for row in rows]
    drawn = torch.tensor(draws, dtype=torch.float64)[:, None] * shares[:, -1:]
    return torch.searchsorted(shares, drawn, right=True).squeeze(1).clamp(max=logits.size(-1) - 1).tolist()


def _accept(row: _Row, token: int, forced: bool, tokenizer: Tokenizer) -> None:
    """Append a token; call the calculator when it closes an expression."""
    special = tokenizer.special_ids
    row.tokens.append(token)
    row.forced.append(forced)
    if forced:
        return
    if token == special[NANOCHAT.python.opening]:
        row.expression = []
    elif token == special[NANOCHAT.python.closing] and row.expression is not None:
        row.tool_calls += 1
        try:
            result = calculate(tokenizer.decode(row.expression))
        except CalculatorError:
            row.tool_failures += 1
        else:
            output = tokenizer.encode_ordinary(result)
            row.waiting.extend([special[NANOCHAT.output.opening], *output, special[NANOCHAT.output.closing]])
        row.expression = None
    elif row.expression is not None:
        row.expression.append(token)


def _cut(row: _Row, num_positions: int) -> Ending | None:
    if len(row.tokens) >= row.prompt.sampling.max_new_tokens:
        return "max_tokens"
    return "context" if row.position + 1 >= num_positions else None


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little")
