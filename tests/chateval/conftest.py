"""Models to answer with: one of random weights, and one that follows a script but sees only what the cache holds."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import chatdata
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import load_tokenizer
from chateval.ask.subject import Subject
from chateval.cli import main
from chateval.errors import SandboxError
from chateval.sandbox.run_code import Isolation, find_isolation
from chattrain.checkpoint import save_checkpoint
from chattrain.model import ModelConfig, load_model, parameter_shapes, random_config


@pytest.fixture(scope="session")
def tokenizer(demo_mid: Path) -> Tokenizer:
    return load_tokenizer(demo_mid)


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights that answer something else at every position (a fresh model's logits are all equal)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config)
    weights = {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
    weights["transformer.wte.weight"] *= 16
    weights["lm_head.weight"] *= 8
    return weights


@pytest.fixture(scope="session")
def make_subject(tokenizer: Tokenizer) -> Callable[..., Subject]:
    """make_subject(size, num_positions, seed): random weights of a size such as "d2"."""

    def make(size: str = "d2", num_positions: int = 256, seed: int = 0) -> Subject:
        config = random_config(size, tokenizer.vocab_size, num_positions)
        model = load_model(config, random_weights(config, seed)).eval()
        return Subject(model, tokenizer, torch.device("cpu"), torch.float32, f"seed {seed}", "random", 0)

    return make


@pytest.fixture(scope="session")
def random_subject(make_subject: Callable[..., Subject]) -> Subject:
    return make_subject()


@dataclass(frozen=True, eq=False)
class ScriptedSubject:
    """Answers "A B" with a tool call A+B, then with what the tool's output says. Stands in for a Subject.

    It knows nothing but what it reads out of the cache, where each token is its own key and value: a token missing
    there, of another row, or seen too early changes what it says.
    """

    tokenizer: Tokenizer
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    num_positions: int = 256

    @property
    def model(self) -> Any:
        return SimpleNamespace(config=ModelConfig(self.num_positions, self.tokenizer.vocab_size, 1, 1, 1, 2))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        """tokens [B, T] → next tokens [B, T, 1]."""
        new = tokens[..., None, None].float().expand(-1, -1, 1, 2)
        keys, values, mask = cache.update(0, new, new)
        assert torch.equal(keys, values)
        answers = torch.zeros(*tokens.shape, 1)
        for row in range(tokens.size(0)):
            for place in range(tokens.size(1)):
                seen = slice(0, place + 1) if mask is None else mask[row, 0, place]
                answers[row, place] = self.next_token(keys[row, seen, 0, 0].long().tolist())
        return answers

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0].long(), self.tokenizer.vocab_size).float()

    def next_token(self, seen: list[int]) -> int:
        """What the script says behind `seen`."""
        special = self.tokenizer.special_ids
        start = special["<|assistant_start|>"]
        if start not in seen:
            return 0
        question = self.tokenizer.decode(seen[1 : seen.index(start)]).split()
        said = seen[seen.index(start) + 1 :]
        call = [
            special["<|python_start|>"],
            *self.tokenizer.encode_ordinary("+".join(question)),
            special["<|python_end|>"],
        ]
        if said != call and said == call[: len(said)]:
            return call[len(said)]
        if special["<|output_start|>"] not in said or special["<|output_end|>"] not in said:
            return self.tokenizer.encode_ordinary("?")[0]  # no result was given: goes on asking
        output = said[said.index(special["<|output_start|>"]) + 1 : said.index(special["<|output_end|>"])]
        answer = self.tokenizer.encode_ordinary("#### " + self.tokenizer.decode(output))
        told = said[said.index(special["<|output_end|>"]) + 1 :]
        return answer[len(told)] if len(told) < len(answer) else special["<|assistant_end|>"]


@pytest.fixture(scope="session")
def scripted_subject(tokenizer: Tokenizer) -> ScriptedSubject:
    return ScriptedSubject(tokenizer)


@pytest.fixture(scope="session")
def save_random(tokenizer: Tokenizer, demo_mid: Path) -> Callable[..., Path]:
    """save_random(folder, size, num_positions, seed, tokenizer_folder): a checkpoint of random weights; its path."""

    def save(
        folder: Path, size: str = "d2", num_positions: int = 256, seed: int = 0, tokenizer_folder: Path | None = None
    ) -> Path:
        home = tokenizer_folder or demo_mid / "tokenizer"
        config = random_config(size, load_tokenizer(home).vocab_size, num_positions)
        return save_checkpoint(folder, 7, config, random_weights(config, seed), {}, {}, {}, home)

    return save


def run_ranks(num_ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--standalone"]
    command = [*launcher, "-m", "chateval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def chateval(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line: in this process, where torch is loaded already, or in several under torchrun."""

    def run(*arguments: object, num_ranks: int = 1, typed: str = "") -> subprocess.CompletedProcess[str]:
        if num_ranks > 1:
            return run_ranks(num_ranks, *arguments)
        command = ["chateval", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        out, err, code = io.StringIO(), io.StringIO(), 0
        before = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def words() -> Path:
    return Path(chatdata.__file__).parent / "demo" / "words.txt"


@pytest.fixture(scope="session")
def isolation() -> Isolation:
    """What model-written code runs in: skipped where it cannot be reached, a failure where everything is required."""
    try:
        return find_isolation()
    except SandboxError as error:
        if os.environ.get("CHATDATA_REQUIRE_SHARED") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
