"""Requests at once against one after the other: the same answers, and how much sooner.

    uv run benchmarks/serving.py CHECKPOINT [--requests 64]

Needs the extra `serve` and openai. The server is a process of its own on a free port of this machine. Both sides ask
the same questions with different sampling, twice, taking turns; the figures are medians.
"""

import argparse
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai


def questions(model: str, number: int) -> list[dict]:
    """Sums and spellings; each third one greedy, each fourth one with top_p, lengths from 16 to 79 tokens."""
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": f"How much is {7 * i % 90} + {11 * i % 70}? Question {i}."}],
            "temperature": 0 if i % 3 == 0 else 0.4 + i % 5 / 4,
            "top_p": 0.8 if i % 4 == 0 else 1,
            "seed": i,
            "max_tokens": 16 + i % 64,
        }
        for i in range(number)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    options = parser.parse_args()
    command = [sys.executable, "-m", "chateval", "serve", "--checkpoint", str(options.checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(": ")[0]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
            compare(client, questions(client.models.list().data[0].id, options.requests))
        finally:
            server.terminate()


def compare(client: openai.OpenAI, asked: list[dict]) -> None:
    def answer(request: dict) -> tuple[str, str, int]:
        found = client.chat.completions.create(**request)
        (choice,) = found.choices
        return choice.message.content or "", choice.finish_reason, found.usage.completion_tokens if found.usage else 0

    durations: dict[int, list[float]] = {1: [], len(asked): []}
    answers = {}
    for _ in range(2):
        for num_threads in durations:
            started = time.perf_counter()
            with ThreadPoolExecutor(num_threads) as threads:
                answers[num_threads] = list(threads.map(answer, asked))
            durations[num_threads].append(time.perf_counter() - started)
    alone, together = answers[1], answers[len(asked)]
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    alone_s, together_s = map(statistics.median, durations.values())
    num_tokens = sum(tokens for _, _, tokens in alone)
    print(f"{len(asked)} requests, {num_tokens:,} tokens: equal answers: {same} of {len(asked)}")
    print(f"one after the other {alone_s:.2f} s, at once {together_s:.2f} s: {alone_s / together_s:.1f}×")


if __name__ == "__main__":
    main()
