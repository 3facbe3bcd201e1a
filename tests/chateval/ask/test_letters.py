"""Multiple choice: the same letters however the questions are cut into batches and ranks, and whoever computes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chatdata.tasks import load_tasks
from chatdata.tokenizer.files import load_tokenizer
from chateval.ask.letters import choose_letters, letter_ids
from chateval.ask.questions import load_questions
from chateval.ask.subject import load_subject
from chateval.errors import ScoringError
from chattrain.checkpoint import read_checkpoint
from chattrain.errors import CheckpointError
from chattrain.nanochat.export import export_transformers

NUM_ITEMS = 500
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(shared, save_random, tmp_path_factory):
    """Random weights over the 65,536-entry tokenizer."""
    from chatdata.tokenizer.files import save_tokenizer

    folder = tmp_path_factory.mktemp("random")
    save_tokenizer(load_tokenizer(shared / "data" / "tokenizer" / "tokenizer.pkl"), folder / "tokenizer")
    return save_random(folder / "checkpoints", num_positions=2048, tokenizer_folder=folder / "tokenizer")


@pytest.fixture(scope="module")
def subject(checkpoint):
    return load_subject(checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def mmlu(shared, subject):
    (task,) = load_questions(["mmlu"], load_tasks(), subject.tokenizer, shared / "data" / "hub", limit=NUM_ITEMS)
    return task


def letters_of(subject, task, batch_size):
    found = []
    for first in range(0, len(task.questions), batch_size):
        batch = task.questions[first : first + batch_size]
        found += choose_letters(subject, batch)
    return found


def test_a_question_is_asked_as_nanochat_asks_it(mmlu, subject) -> None:
    question = mmlu.questions[0]
    text = subject.tokenizer.decode(question.prompt)
    assert text.startswith("<|bos|><|user_start|>Multiple Choice question: ")
    assert text.endswith("=D\n\nRespond only with the letter of the correct answer.<|user_end|><|assistant_start|>")
    assert question.gold in "ABCD" and question.subject and len(mmlu.questions) == NUM_ITEMS
    assert question.document.tokens.tolist()[: len(question.prompt)] == question.prompt


def test_the_answer_by_hand(mmlu, subject) -> None:
    """One question computed plainly: all logits of the text in fp32, then only the letters at the last position."""
    question = mmlu.questions[3]
    choice = choose_letters(subject, [question])[0]
    with torch.no_grad():
        hidden = subject.model(torch.tensor([question.prompt]))[0]
        logits = 15 * torch.tanh(hidden @ subject.model.lm_head.weight.T / 15)
    shares = logits[-1].softmax(0)
    ids = [subject.tokenizer.encode_ordinary(letter)[0] for letter in "ABCD"]
    values = logits[-1, ids].tolist()
    best, second = sorted(values)[:-3:-1]
    assert choice.letter == "ABCD"[values.index(best)] and not choice.tie
    assert choice.margin == pytest.approx(best - second, abs=1e-5)
    assert choice.letter_mass == pytest.approx(float(shares[ids].sum()), rel=1e-4)
    assert choice.gold_nats == pytest.approx(-math.log(shares[ids["ABCD".index(question.gold)]]), rel=1e-5)


@pytest.fixture(scope="module")
def alone(subject, mmlu):
    return letters_of(subject, mmlu, 1)


@pytest.mark.parametrize("batch_size", [7, 32])
def test_batch_size_does_not_matter(mmlu, subject, alone, batch_size) -> None:
    together = letters_of(subject, mmlu, batch_size)
    assert len({choice.letter for choice in alone}) >= 3, "a model that always says the same proves nothing"
    near_ties = [i for i, (a, b) in enumerate(zip(alone, together, strict=True)) if a.letter != b.letter]
    assert all(alone[i].margin < NEAR_TIE for i in near_ties), near_ties
    assert [c.letter_mass for c in together] == pytest.approx([c.letter_mass for c in alone], rel=1e-3)
    print("near ties:", near_ties)


def test_transformers_gives_the_same_letters(mmlu, subject, alone, checkpoint, tmp_path) -> None:
    """An export of the same weights, run by transformers, on 500 MMLU questions; and our reading of that export."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers: uv sync")
    special = subject.tokenizer.special_ids
    saved = read_checkpoint(checkpoint)
    ends = special["<|bos|>"], special["<|assistant_end|>"]
    export_transformers(
        saved.weights(), saved.config, tmp_path / "hf", *ends, tokenizer_dir=checkpoint / "tokenizer", verify=False
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.tensor(letter_ids(subject, "ABCD"))
    near_ties = []
    for number, (question, choice) in enumerate(zip(mmlu.questions, alone, strict=True)):
        with torch.no_grad():
            logits = theirs(torch.tensor([question.prompt]), logits_to_keep=1).logits[0, -1, ids]
        if "ABCD"[int(logits.argmax())] != choice.letter:
            near_ties.append((number, choice.margin))
    assert all(margin < NEAR_TIE for _, margin in near_ties), near_ties
    print("near ties:", near_ties)
    again = load_subject(tmp_path / "hf", torch.device("cpu"))
    assert again.weights_sha256 == subject.weights_sha256 and again.step is None
    batch = mmlu.questions[:32]
    assert choose_letters(again, batch) == choose_letters(subject, batch)


def test_equal_logits_are_a_tie_for_the_first_letter(mmlu, subject) -> None:
    import copy
    from dataclasses import replace

    model = copy.deepcopy(subject.model)
    torch.nn.init.zeros_(model.lm_head.weight)
    for choice in choose_letters(replace(subject, model=model), mmlu.questions[:3]):
        assert (choice.letter, choice.tie, choice.margin) == ("A", True, 0.0)
        assert choice.letter_mass == pytest.approx(4 / 65536)


def test_a_letter_of_two_tokens_is_refused(subject) -> None:
    with pytest.raises(ScoringError, match=r"splits the letter 'AB\?' into 2 tokens"):
        letter_ids(subject, ["A", "AB?"])


def test_ranks_do_not_matter(shared, checkpoint, chateval, tmp_path) -> None:
    """1, 2 and 3 processes write the same answers in the same order."""
    found = []
    for num_ranks in (1, 2, 3):
        out = tmp_path / str(num_ranks)
        command = ["run", "--checkpoint", checkpoint, "--tasks", "mmlu,arc_easy", "--limit", 30, "--out", out]
        result = chateval(*command, "--data-dir", shared / "data" / "hub", num_ranks=num_ranks)
        assert result.returncode == 0, result.stderr
        assert sorted(path.name for path in out.glob("items*")) == ["items.jsonl"]
        lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
        found.append([(line["task"], line["item"], line["extracted"], line["correct"]) for line in lines])
    assert len(found[0]) == 60 and found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/tokenizer.json"])
def test_a_damaged_checkpoint_is_not_scored(save_random: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = save_random(tmp_path)
    data = bytearray((path / name).read_bytes())
    data[1000] ^= 0x40
    (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"^{path}/{name}: .*SHA-256 differs from state.json's"):
        load_subject(path, torch.device("cpu"))
