"""Scoring speed: batches against one prompt at a time, and multiple choice against the plain way.

    uv run python benchmarks/scoring.py --data-dir ../shared/data/hub --tokenizer TOKENIZER [--mmlu-items N]

Both models have random weights at d4 over the given tokenizer (65,536 tokens for the figures in LOG.md).
    generation       64 GSM8K prompts, 96 new tokens each, greedy: batches of 32 against one at a time, alternating
    multiple choice  MMLU test, all items, chateval's way: sorted by length, one position per row through the head.
                     Against it, --plain-items of them in the data's order, padded to the longest, all logits of all
                     positions, 8 at a time because 32 long rows of 65,536 logits do not fit in 24 GiB
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from chatdata.tasks import load_tasks
from chatdata.tokenizer.files import load_tokenizer
from chateval.ask.generate import Prompt, Sampling, generate
from chateval.ask.letters import choose_letters
from chateval.ask.questions import ScoredTask, load_questions
from chateval.ask.subject import Subject
from chattrain.model import load_model, parameter_shapes, random_config, softcap

NEW_TOKENS, BATCH = 96, 32


def random_subject(tokenizer_path: Path) -> Subject:
    tokenizer = load_tokenizer(tokenizer_path)
    config = random_config("d4", tokenizer.vocab_size, 2048)
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) / s[1] ** 0.5 for n, s in parameter_shapes(config).items()}
    return Subject(load_model(config, weights).eval(), tokenizer, torch.device("cpu"), torch.float32, "", "random", 0)


def generation_seconds(subject: Subject, prompts: list[Prompt], batch: int) -> tuple[float, int]:
    start, num_tokens = time.perf_counter(), 0
    for first in range(0, len(prompts), batch):
        for _, completion in generate(subject, prompts[first : first + batch]):
            num_tokens += len(completion.tokens)
    return time.perf_counter() - start, num_tokens


def compare_generation(subject: Subject, task: ScoredTask, repeats: int) -> None:
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    prompts = [Prompt(question.prompt, sampling=sampling) for question in task.questions[:64]]
    rates: dict[int, list[float]] = {1: [], BATCH: []}
    for _ in range(repeats):
        for batch in rates:
            duration_s, num_tokens = generation_seconds(subject, prompts, batch)
            rates[batch].append(num_tokens / duration_s)
    alone, together = (statistics.median(rates[batch]) for batch in (1, BATCH))
    print(f"generation, tokens/s: {together:,.0f} in batches of {BATCH}, {alone:,.0f} alone: {together / alone:.1f}×")


def letters_seconds(subject: Subject, task: ScoredTask, items: int) -> float:
    start = time.perf_counter()
    questions = sorted(task.questions[:items], key=lambda question: -len(question.prompt))
    for first in range(0, len(questions), BATCH):
        batch = questions[first : first + BATCH]
        choose_letters(subject, batch)
    return time.perf_counter() - start


def plain_letters_seconds(subject: Subject, task: ScoredTask, items: int, batch: int = 8) -> float:
    ids = [subject.tokenizer.encode_ordinary(letter)[0] for letter in "ABCD"]
    start = time.perf_counter()
    for first in range(0, items, batch):
        prompts = [question.prompt for question in task.questions[first : min(first + batch, items)]]
        tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        with torch.no_grad():
            logits = softcap(subject.model.lm_head(subject.model(tokens)))
        for row, prompt in enumerate(prompts):
            int(logits[row, len(prompt) - 1, ids].argmax())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--mmlu-items", type=int, default=14_042)
    parser.add_argument("--plain-items", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    subject = random_subject(arguments.tokenizer)
    started = time.perf_counter()
    mmlu, gsm8k = load_questions(["mmlu", "gsm8k"], load_tasks(), subject.tokenizer, arguments.data_dir)
    lengths = [len(question.prompt) for question in mmlu.questions]
    print(f"{len(lengths):,} + {len(gsm8k.questions):,} prompts rendered in {time.perf_counter() - started:.1f} s")
    compare_generation(subject, gsm8k, arguments.repeats)
    # both ways on the same items first, then the whole set
    ours, plain = [], []
    for _ in range(arguments.repeats):
        ours.append(letters_seconds(subject, mmlu, arguments.plain_items))
        plain.append(plain_letters_seconds(subject, mmlu, arguments.plain_items))
    ratio = statistics.median(plain) / statistics.median(ours)
    print(f"multiple choice, {arguments.plain_items} items: {statistics.median(ours):.2f} s, plain ", end="")
    print(f"{statistics.median(plain):.2f} s: {ratio:.1f}×")
    duration_s, items = letters_seconds(subject, mmlu, arguments.mmlu_items), min(arguments.mmlu_items, len(lengths))
    rate = sum(sorted(lengths)[:items]) / duration_s
    print(
        f"MMLU, {items:,} items ({sum(lengths):,} tokens): {duration_s:.0f} s, {items / duration_s:.0f} items/s", end=""
    )
    print(f", {rate:,.0f} tokens/s" if items == len(lengths) else "")


if __name__ == "__main__":
    main()
