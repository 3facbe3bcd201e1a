"""The route of one conversation, from a GSM8K row to a loss, a validation figure and a graded answer, in ten hops.

    uv run pytest tests/test_route.py -s        prints the conversation at every hop

Every hop calls what the product calls there: one test follows a real build and a real run. All expected values are
literals: with the tokenizer below, single characters are their own byte (id 51 is "3"), and a few words have ids from
256 on.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from chatdata.build.plan import BuildPlan, make_build_plan
from chatdata.build.run import build as run_build
from chatdata.build.units import Renderer, cut_units, read_unit, render_unit
from chatdata.cli import main as data_command
from chatdata.document import SPAN_ROLES
from chatdata.packing.epoch import document_targets
from chatdata.packing.layouts import pack, stream
from chatdata.recipe import load_recipe
from chatdata.render.batch import render_batch
from chatdata.render.documents import RenderedDocuments
from chatdata.render.pieces import CLOSES, OPENS, pieces_of_conversations
from chatdata.render.specification import render_conversation, render_for_completion
from chatdata.shards.read import Build, Split, open_build
from chatdata.shards.write import write_shard
from chatdata.sources.find import Locations
from chatdata.tasks import gsm8k, load_tasks
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens
from chatdata.tokenizer.encoders import find_encoder
from chateval.ask.answers import Draw, answer_texts
from chateval.ask.generate import Sampling
from chateval.ask.questions import Question
from chateval.ask.subject import Subject
from chattrain.batches import Step, read_step
from chattrain.checkpoint import save_checkpoint
from chattrain.cli import main as train_command
from chattrain.evaluate import bits_per_byte, token_byte_counts
from chattrain.loop import hidden_states, train_step
from chattrain.loss import chunked_loss, position_losses
from chattrain.model import parameter_shapes, random_config
from chattrain.run.settings import RunSettings
from chattrain.run.start import Learner, Ranks, Run, StopRequest, prepare

ROOT = Path(__file__).parent.parent
ONE = Ranks(0, 1, torch.device("cpu"))

ROW = {
    "question": "A kite costs 7 euros. What do 3 kites cost?",
    "answer": "Three kites cost 3*7=<<3*7=21>>21 euros.\n#### 21",
}
OTHER_ROWS = [{"question": "7+7?", "answer": "<<7+7=14>>14\n#### 14"}, {"question": "3+3?", "answer": "6\n#### 6"}]
WORDS = [" kite", " kites", " cost", " costs", " euros", "What", " What", " do", "Three", "21", "####"]

TOKENS = [
    *("<|bos|>", "<|user_start|>", "A", " kite", " costs", " ", "7", " euros", "."),
    *(" What", " do", " ", "3", " kites", " cost", "?", "<|user_end|>"),
    *("<|assistant_start|>", "Three", " kites", " cost", " ", "3", "*", "7", "="),
    *("<|python_start|>", "3", "*", "7", "<|python_end|>", "<|output_start|>", "21", "<|output_end|>"),
    *("21", " euros", ".", "\n", "####", " ", "21", "<|assistant_end|>"),
]
# fmt: off
IDS = [
    267, 268, 65, 256, 259, 32, 55, 260, 46,
    262, 263, 32, 51, 257, 258, 63, 269,
    270, 264, 257, 258, 32, 51, 42, 55, 61,
    272, 51, 42, 55, 273, 274, 265, 275,
    265, 260, 46, 10, 266, 32, 265, 271,
]
# what sft trains on: the targets of inputs IDS[:-1], shifted by one, ignored where the target's mask is 0
SFT_TARGETS = [
    *[-100] * 17,
    264, 257, 258, 32, 51, 42, 55, 61,
    272, 51, 42, 55, 273, -100, -100, -100,
    265, 260, 46, 10, 266, 32, 265, 271,
]
# fmt: on
MASK = "000000000000000000111111111111100011111111"
MID_T, SFT_T = 16, 64  # positions of a sequence
NUM_STEPS = 60  # enough to learn three rows by heart


class Hop(NamedTuple):
    files: tuple[str, ...]
    functions: tuple[Callable, ...]  # what the walk calls of them
    what: str


ROUTE = (
    Hop(("tasks/gsm8k.py",), (gsm8k.to_conversation,), "a row becomes a conversation"),
    Hop(("render/pieces.py",), (pieces_of_conversations,), "… becomes pieces: one text and its role each"),
    Hop(("render/batch.py",), (render_batch,), "… becomes tokens and mask, together with many others"),
    Hop(("build/units.py",), (render_unit, read_unit), "… is kept in the cache, in a work unit"),
    Hop(("render/documents.py",), (RenderedDocuments.gather,), "… is cut or dropped by the recipe, and gathered"),
    Hop(("shards/write.py", "shards/read.py"), (write_shard, open_build), "… is written to a shard, and read back"),
    Hop(("packing/layouts.py",), (pack,), "… is placed in a sequence"),
    Hop(("batches.py",), (read_step,), "… becomes inputs and targets, shifted by one"),
    Hop(("loop.py", "loss.py"), (hidden_states, train_step, chunked_loss), "… becomes a loss and a step"),
    Hop(("evaluate.py",), (bits_per_byte, token_byte_counts), "… is validated on"),
)
BACK = Hop(("tasks/gsm8k.py",), (gsm8k.grade,), "… and an answer is graded where the row came from")


def heading(hop: Hop) -> None:
    number = ROUTE.index(hop) + 1 if hop in ROUTE else "back"
    functions = ", ".join(function.__name__ for function in hop.functions)
    print(f"\n\n{number} · {', '.join(hop.files)} · {functions}\n    {hop.what}\n")


def shown(value: int | float) -> str:
    return "·" if value in (-100, 0.0) else f"{value:.3f}" if isinstance(value, float) else str(value)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    entries = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS)]
    ranks = {entry: i for i, entry in enumerate(entries)}
    return Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "bytes and words")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A build of three rows; its val split is the one row of the walk, so that validation can be followed too."""
    folder = tmp_path_factory.mktemp("route")
    for name, rows in (("train", [ROW, *OTHER_ROWS]), ("val", [ROW])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(
        'stage = "sft"\n[[train]]\ntask = "gsm8k"\npath = "train.jsonl"\n[[val]]\ntask = "gsm8k"\npath = "val.jsonl"\n'
    )
    run_build(plan_of(folder, tokenizer), folder / "build")
    return folder / "build"


def plan_of(folder: Path, tokenizer: Tokenizer) -> BuildPlan:
    tasks = load_tasks()
    return make_build_plan(load_recipe(str(folder / "recipe.toml"), tasks), tasks, tokenizer, Locations(folder))


@pytest.fixture
def build(built: Path) -> Build:
    return open_build(built)


@pytest.fixture
def train(build: Build) -> Split:
    return build["train"]


@pytest.fixture
def run_of(build: Build, tmp_path: Path) -> Callable[[str], Run]:
    """run_of(stage): what `chattrain run --stage STAGE --init CHECKPOINT` makes before step 0, from random weights.

    Not from `--init random:…`: a fresh model gives equal logits everywhere, and any loss of it is log(276).
    """

    def make(stage: str) -> Run:
        config = random_config("1x32x2", build.manifest["tokenizer"]["vocab_size"], SFT_T)
        generator = torch.Generator().manual_seed(0)
        shapes = parameter_shapes(config)
        weights = {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
        checkpoint = save_checkpoint(tmp_path, 0, config, weights, {}, {}, {}, build.path / "tokenizer")
        seq_len, num_sequences = (MID_T, 5) if stage == "mid" else (SFT_T, 2)  # one step is an epoch
        return prepare(
            RunSettings(
                data=build.path,
                out=tmp_path / "run",
                init=str(checkpoint),
                stage=stage,
                seq_len=seq_len,
                device_batch_size=num_sequences,
                steps=NUM_STEPS,
                eval_every=NUM_STEPS,
                lr_scale=50.0,  # sft starts at 2 % of the base rates: with this, at all of them
                device="cpu",
            ),
            build,
            ONE,
        )

    return make


def conversation_part(stage: str, rows: torch.Tensor) -> list:
    """The 41 positions of the conversation, of the [B, T] positions of the step that hold it (hops 6 and 7)."""
    return (rows.flatten()[39:80] if stage == "mid" else rows[1, :41]).tolist()


def losses_by_hand(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax at the target, 0 where ignored: logits [..., V] float64, targets [...] → [...]."""
    log_sum = np.log(np.exp(logits).sum(-1))  # of numbers below 15: exp does not overflow
    at_target = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return np.where(targets == -100, 0.0, log_sum - at_target)


def test_hop_1_a_row_becomes_a_conversation() -> None:
    conversation = gsm8k.to_conversation(ROW)
    assert conversation == {
        "messages": [
            {"role": "user", "content": "A kite costs 7 euros. What do 3 kites cost?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Three kites cost 3*7="},
                    {"type": "python", "text": "3*7"},
                    {"type": "python_output", "text": "21"},
                    {"type": "text", "text": "21 euros.\n#### 21"},
                ],
            },
        ]
    }
    heading(ROUTE[0])
    for key, text in ROW.items():
        print(f"    {key:20}{text!r}")
    user, assistant = conversation["messages"]
    print(f"\n    {'user':20}{user['content']!r}")
    for part in assistant["content"]:
        print(f"    {'assistant ' + part['type']:24}{part['text']!r}")


def test_hop_2_a_conversation_becomes_pieces() -> None:
    pieces = pieces_of_conversations([gsm8k.to_conversation(ROW)])
    user, text, python, output = (SPAN_ROLES.index(role) for role in ("user", "text", "python", "output"))
    assert list(zip(pieces.texts, pieces.codes.tolist(), strict=True)) == [
        ("A kite costs 7 euros. What do 3 kites cost?", user),
        ("Three kites cost 3*7=", text | OPENS),
        ("3*7", python),
        ("21", output),
        ("21 euros.\n#### 21", text | CLOSES),
    ]
    assert pieces.counts.tolist() == [5]
    heading(ROUTE[1])
    for piece, code in zip(pieces.texts, pieces.codes.tolist(), strict=True):
        edge = " opens the answer" * bool(code & OPENS) + " closes the answer" * bool(code & CLOSES)
        print(f"    {SPAN_ROLES[code & 3]:8}{piece!r}{edge}")


def test_hop_3_pieces_become_tokens_and_mask(tokenizer: Tokenizer) -> None:
    conversations = [gsm8k.to_conversation(row) for row in (OTHER_ROWS[0], ROW)]
    pieces = pieces_of_conversations(conversations)
    ids, counts = find_encoder("tiktoken", tokenizer).encode_batch(pieces.texts)
    batch = render_batch(pieces, ids, counts, tokenizer.special_ids, tokenizer.dtype, tokenizer.vocab_size)
    assert batch.num_tokens.tolist() == [25, 42]
    assert [tokenizer.decode_token(token) for token in IDS] == TOKENS
    assert batch.tokens[25:].tolist() == IDS
    assert "".join(map(str, batch.mask[25:])) == MASK
    # the specification, one conversation at a time, says the same
    document = render_conversation(tokenizer, conversations[1])
    assert (document.tokens.tolist(), "".join(map(str, document.mask))) == (IDS, MASK)
    assert render_for_completion(tokenizer, conversations[1]) == IDS[:18]  # a prompt ends with assistant_start
    heading(ROUTE[2])
    print("    idx  token                     id  mask")
    for i, (token, token_id, mask) in enumerate(zip(TOKENS, IDS, MASK, strict=True)):
        print(f"    {i:3}  {token!r:22}  {token_id:4}  {mask:>4}")
    print(f"\n    a checkpoint is asked the first 18\n\n{document.conversation_markup()}")


def test_hops_4_and_5_a_work_unit_is_gathered(built: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    plan = plan_of(built.parent, tokenizer)
    source = plan.splits["train"][0].source
    (unit,) = cut_units(0, source, tokenizer, np.ones(3, dtype=bool))
    rendered = render_unit(Renderer((source,), tokenizer, "auto", tmp_path), unit)
    assert rendered.path.name.startswith(unit.key)
    batches = read_unit(rendered.path, tokenizer.dtype)
    assert [batch.num_tokens.tolist() for batch in batches] == [[42, 25, 14]]  # in the source's order
    documents = RenderedDocuments(batches, plan.recipe, source.where)
    tokens, mask = documents.gather(np.array([1, 2, 0]))  # the mixture's order
    assert (tokens[39:].tolist(), "".join(map(str, mask[39:]))) == (IDS, MASK)
    heading(ROUTE[3])
    print(f"    rows 0 … 2 of {source.name} in {unit.key[:8]}….arrow, {rendered.path.stat().st_size:,} bytes")
    heading(ROUTE[4])
    print("    document 1 (25 tokens), document 2 (14), then ours: document 0 (42), tokens 39 … 80")


def test_hop_6_documents_become_a_build(build: Build) -> None:
    files = sorted(path.relative_to(build.path).as_posix() for path in build.path.rglob("*") if path.is_file())
    kinds = ("index-00000.parquet", "mask-00000.npy", "offsets-00000.npy", "tokens-00000.npy")
    assert files == [
        "firewall.json",
        "manifest.json",
        "report.json",
        *("tokenizer/chat_template.jinja", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *(f"train/{name}" for name in kinds),
        *(f"val/{name}" for name in kinds),
    ]
    (ledger,) = build.manifest["splits"]["train"]["entries"]
    assert (ledger["rows"], ledger["documents"], ledger["tokens"], ledger["supervised"]) == (3, 3, 81, 40)
    assert (ledger["truncated"], ledger["tokens_lost"], set(ledger["dropped"].values())) == (0, 0, {0})
    report = json.loads((build.path / "report.json").read_text())
    assert report["tool_calls"]["train"] == {
        "entries": {
            "0": {"task": "gsm8k", "name": "gsm8k", "calls": 2}
        },  # no other counts: the calculator gives what is recorded
        "mismatches": 0,
        "listed": [],
    }
    heading(ROUTE[5])
    for file in files:
        print(f"    {file:34}{(build.path / file).stat().st_size:8,} bytes")
    print(f"\n    train: {ledger['documents']} documents, {ledger['tokens']} tokens, {ledger['supervised']} supervised")


def test_hop_6_the_build_is_read_back(build: Build, train: Split) -> None:
    assert train.offsets.tolist() == [0, 25, 39, 81]
    document = train[2]  # rows 0, 1, 2 have positions 2, 1, 0 in the task; the mixture's order is 1, 0, 2
    assert document.tokens.tolist() == IDS
    assert "".join(map(str, document.mask)) == MASK
    assert np.shares_memory(document.tokens, train.map("tokens", 0))
    line = train.index.row(2, named=True)
    known = {
        "doc": 2,
        "row": 0,
        "task_position": 2,
        "task": "gsm8k",
        "entry": 0,
        "num_tokens": 42,
        "num_supervised": 21,
    }
    known |= {"num_turns": 2, "num_tool_calls": 1, "original_tokens": 42, "truncated": False}
    assert {key: line[key] for key in known} == known
    reads = [tuple(span.values()) for span in line["spans"]]  # role (user 0, text 1, …), start, length, trained
    assert reads == [(0, 1, 16, False), (1, 18, 8, True), (2, 26, 5, True), (3, 31, 3, False), (1, 34, 7, True)]
    assert build["val"].offsets.tolist() == [0, 42]
    print(f"\n    offsets   {train.offsets.tolist()}: the conversation is document 2, tokens 39 … 80")
    print(f"    tokens    {train.tokens(39, 81)[:10].tolist()} …\n    mask      {train.mask(39, 81)[:10].tolist()} …")
    facts = [f"{key} {value}" for key, value in known.items()]
    print(f"    index     {' · '.join(facts[:6])}\n{'':14}{' · '.join(facts[6:])}")


def test_hop_7_a_document_is_placed_in_a_sequence(train: Split, run_of: Callable[[str], Run]) -> None:
    lengths, num_targets = np.diff(train.offsets), document_targets(train, "apply", SFT_T)[0]
    assert (lengths.tolist(), num_targets.tolist()) == ([25, 14, 42], [13, 6, 21])
    assert stream(train.num_tokens, MID_T) == (5, 0)  # 80 targets, none left over
    packing = pack(lengths, num_targets, SFT_T, seed=42)
    assert packing.documents.tolist() == [0, 2, 1]  # 24 positions · 41 and 13: 64 are too few for 41 and 24
    assert packing.bounds.tolist() == [0, 1, 3]
    assert packing.lengths.tolist() == [25, 42, 14]

    mid, sft = run_of("mid").plan, run_of("sft").plan
    assert (mid.layout, mid.mask, mid.num_steps, mid.targets_per_step.tolist()) == ("stream", "ignore", 1, [80])
    assert (sft.layout, sft.mask, sft.num_steps, sft.targets_per_step.tolist()) == ("pack", "apply", 1, [40])
    assert sft.packing.documents.tolist() == packing.documents.tolist()
    heading(ROUTE[6])
    for k in range(5):
        start, stop = k * MID_T, (k + 1) * MID_T
        found = [f"document {d}" for d in range(3) if train.offsets[d] < stop and train.offsets[d + 1] > start]
        print(f"    mid  T = {MID_T}  sequence {k}  inputs {start:2} … {stop - 1:2}   {', '.join(found)}")
    for s, (first, last) in enumerate([(0, 1), (1, 3)]):
        placed = [f"document {d}: {n - 1} positions" for d, n in zip(packing.documents, packing.lengths, strict=True)]
        room = SFT_T - int((packing.lengths[first:last] - 1).sum())
        print(f"    sft  T = {SFT_T}  sequence {s}  {', '.join(placed[first:last])}, {room} free")


def test_hop_8_a_sequence_becomes_inputs_and_targets(run_of: Callable[[str], Run]) -> None:
    (mid,) = read_step(run_of("mid").plan, 0).batches
    (sft,) = read_step(run_of("sft").plan, 0).batches
    assert (tuple(mid.inputs.shape), mid.lengths) == ((5, 16), None)
    assert (tuple(sft.inputs.shape), sft.lengths) == ((2, 64), ((24,), (41, 13)))
    parts = {}
    for stage, batch, targets in (("mid", mid, IDS[1:]), ("sft", sft, SFT_TARGETS)):
        parts[stage] = conversation_part(stage, batch.inputs), conversation_part(stage, batch.targets)
        assert parts[stage] == (IDS[:-1], targets)
    carry = "".join(str(int(target != -100)) for target in SFT_TARGETS)
    assert carry == "00000000000000000" + "1111111111111" + "000" + "11111111" == MASK[1:]
    # mid knows no documents: behind document 1's assistant_end, in sequence 2, comes our bos. Of sft's 64 positions,
    # 41 are ours, 13 document 1's, which begins anew with bos, and 10 hold nothing
    assert (mid.inputs[2, 6].item(), mid.targets[2, 6].item()) == (271, 267)
    assert sft.inputs[1, 41].item() == 267
    assert (sft.inputs[1, 54:].tolist(), sft.targets[1, 54:].tolist()) == ([271] * 10, [-100] * 10)
    heading(ROUTE[7])
    print(f"{'':34}mid{'':23}sft")
    print("    idx  token                   row   at  input  target   row  at  input  target")
    for i, (mid_input, mid_target, sft_input, sft_target) in enumerate(zip(*parts["mid"], *parts["sft"], strict=True)):
        row, at = divmod(39 + i, MID_T)
        sides = f"{row:5}{at:5}{mid_input:7}{mid_target:8}", f"{1:6}{i:4}{sft_input:7}{shown(sft_target):>8}"
        print(f"    {i:3}  {TOKENS[i]!r:22}{''.join(sides)}")


def forward(learner: Learner, step: Step) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Of the step's only micro-batch: hidden states, logits [B, T, V] float64, targets."""
    (batch,) = step.batches
    with torch.no_grad():
        hidden = hidden_states(learner, learner.model, batch.inputs, batch.lengths)
        return hidden, learner.model.logits(hidden).double().numpy(), batch.targets.numpy()


def test_hop_9_targets_become_a_loss_and_a_step(run_of: Callable[[str], Run]) -> None:
    columns = {}
    for stage, num_targets in (("mid", 80), ("sft", 40)):
        made = run_of(stage)
        learner, step = made.learner, read_step(made.plan, 0)
        hidden, logits, targets = forward(learner, step)
        by_hand = losses_by_hand(logits, targets)
        found = position_losses(hidden, learner.model.lm_head.weight, step.batches[0].targets, 276)
        np.testing.assert_allclose(found, by_hand, rtol=1e-5)
        total = chunked_loss(hidden, learner.model.lm_head.weight, step.batches[0].targets, 276)
        assert total.item() == pytest.approx(by_hand.sum(), rel=1e-5)
        assert np.count_nonzero(by_hand) == num_targets  # loss at every target, nowhere else
        result = train_step(learner, made.recipe, made.plan, step)
        assert result.loss == pytest.approx(by_hand.sum() / num_targets, rel=1e-5)
        assert not np.allclose(forward(learner, step)[1], logits)  # the step moved the weights
        columns[stage] = conversation_part(stage, torch.from_numpy(by_hand)), result.loss
    assert "".join(str(int(loss > 0)) for loss in columns["mid"][0]) == "1" * 41
    assert "".join(str(int(loss > 0)) for loss in columns["sft"][0]) == MASK[1:]
    heading(ROUTE[8])
    print("    idx  input                   target                  mid loss  sft loss   (nats)")
    for i, (mid, sft) in enumerate(zip(columns["mid"][0], columns["sft"][0], strict=True)):
        print(f"    {i:3}  {TOKENS[i]!r:22}  {TOKENS[i + 1]!r:22}  {shown(mid):>8}  {shown(sft):>8}")
    print(f"\n    loss of the step: mid {columns['mid'][1]:.3f} over 80 targets, sft {columns['sft'][1]:.3f} over 40")


def test_hop_9_packed_conversations_are_alone(train: Split, run_of: Callable[[str], Run]) -> None:
    """In sft a row holds two documents; each gets the logits it gets by itself, also the one that stands behind."""
    made = run_of("sft")
    model = made.learner.model
    _, packed, _ = forward(made.learner, read_step(made.plan, 0))
    for first, last, ids in ((0, 41, IDS[:-1]), (41, 54, train[1].tokens[:-1].tolist())):
        with torch.no_grad():
            alone = model.logits(model(torch.tensor([ids]))).double().numpy()
        np.testing.assert_allclose(packed[1, first:last], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "counted", "num_bytes"),
    [
        # two sequences of 16: targets are tokens 1 … 32, those that spell text are counted
        ("mid", "0" + "1" * 14 + "00" + "1" * 8 + "0" + "111" + "00" + "1", 43 + 21 + 3 + 2),
        # 41 positions: of tokens 1 … 41 those that are supervised and spell text
        ("sft", "0" * 17 + "1" * 8 + "0" + "111" + "0000" + "1" * 7 + "0", 21 + 3 + 17),
    ],
)
def test_hop_10_validation(
    build: Build, run_of: Callable[[str], Run], stage: str, counted: str, num_bytes: int
) -> None:
    made = run_of(stage)
    model = made.learner.model
    states = partial(hidden_states, made.learner, model)
    result = bits_per_byte(model, states, made.val_plan, token_byte_counts(build.tokenizer), ONE, 2, StopRequest())
    sequences = [IDS[:16], IDS[16:32]] if stage == "mid" else [IDS[:41]]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor(sequences))).flatten(0, 1).double().numpy()
    targets = np.array([token if use == "1" else -100 for token, use in zip(IDS[1:], counted, strict=False)])
    expected = losses_by_hand(logits, targets).sum() / (math.log(2) * num_bytes)
    assert result["bytes"] == num_bytes
    assert result["total"] == pytest.approx(expected, rel=1e-5)
    assert result["tasks"] == {"gsm8k": pytest.approx(expected, rel=1e-5)}
    if stage == "mid":
        heading(ROUTE[9])
    print(f"    {stage}: {result['total']:.3f} bits per byte over {num_bytes} bytes of the conversation")


def test_back_to_the_task_file(build: Build, run_of: Callable[[str], Run]) -> None:
    """The model is asked the question before and after it learned the three rows; gsm8k.grade says what is right."""
    made, tokenizer, conversation = run_of("sft"), build.tokenizer, gsm8k.to_conversation(ROW)
    prompt = render_for_completion(tokenizer, conversation)
    question = Question("gsm8k", "train row 0", None, ROW, conversation, prompt, tokenizer)

    def ask(label: str) -> dict:
        subject = Subject(made.learner.model.eval(), tokenizer, ONE.device, torch.float32, "", label, None)
        (item,) = answer_texts(subject, load_tasks()["gsm8k"], [Draw(question, 0)], Sampling(max_new_tokens=40))
        verdict = "right" if item["correct"] else "wrong"
        print(f"    {label:16}{item['output']!r}\n{'':20}read as {item['extracted']!r}, gold '21': {verdict}")
        return item

    heading(BACK)
    before = ask("random weights")
    assert (before["gold"], before["correct"], before["tool_calls"]) == ("21", False, 0)
    steps = (read_step(made.plan, number) for number in range(NUM_STEPS))
    losses = [train_step(made.learner, made.recipe, made.plan, step).loss for step in steps]
    assert losses[-1] < 0.05 < 5 < losses[0]
    after = ask(f"{NUM_STEPS} steps later")
    assert after["output"] == "".join(TOKENS[18:41])  # without the assistant_end that ended it
    assert (after["extracted"], after["correct"], after["tool_calls"]) == ("21", True, 1)

    # the grader itself, on answers nobody gave: the same number, another number, a number that is not marked as final
    for text, extracted, correct in (("#### 21.0", "21.0", True), ("#### 22", "22", False), ("It is 21", None, False)):
        grade = gsm8k.grade(ROW, text)
        assert (grade.gold, grade.extracted, grade.correct) == ("21", extracted, correct)
        print(f"    {'an answer':16}{text!r}: {'right' if correct else 'wrong'}")


def test_a_real_build_and_run_pass_these_functions(built: Path, tmp_path: Path, monkeypatch) -> None:
    """`chatdata build` and `chattrain run` call every function of the route, first calls in its order."""
    first_calls: list[CodeType] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in codes and frame.f_code not in first_calls:
            first_calls.append(frame.f_code)

    functions = [function for hop in ROUTE for function in hop.functions]
    codes = {inspect.unwrap(function).__code__: function.__qualname__ for function in functions}
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    out, run = tmp_path / "build", tmp_path / "run"
    recipe = [
        "--recipe",
        built.parent / "recipe.toml",
        "--tokenizer",
        built / "tokenizer",
        "--workers",
        "1",
        "--decontaminate",
        "off",
    ]
    settings = ["--init", "random:1x32x2", "--seq-len", SFT_T, "--device-batch-size", "2", "--eval-every", "1"]
    commands = (
        (data_command, ["chatdata", "build", *recipe, "--out", out, "--json"]),
        (train_command, ["chattrain", "run", "--data", out, *settings, "--device", "cpu", "--out", run, "--json"]),
    )
    for command, arguments in commands:
        monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
        handler = signal.getsignal(signal.SIGTERM)
        sys.setprofile(note)
        threading.setprofile(note)  # batches are read ahead in a thread
        try:
            with pytest.raises(SystemExit) as end:
                command()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            signal.signal(signal.SIGTERM, handler)
        assert not end.value.code
    called = [codes[code] for code in first_calls]
    assert set(called) == {function.__qualname__ for function in functions}
    entered = ["to_conversation", "pieces_of_conversations", "render_batch", "read_unit", "RenderedDocuments.gather"]
    entered += ["open_build", "pack", "train_step", "chunked_loss"]
    assert [name for name in called if name in entered] == entered


def test_the_route_is_where_it_is_said_to_be() -> None:
    for hop in (*ROUTE, BACK):
        modules = {function.__module__.partition(".")[2] for function in hop.functions}  # below the package
        assert {f"{module.replace('.', '/')}.py" for module in modules} == set(hop.files)
    # README's own list: files that exist, those of the walk in its order, from the task file back to the task file
    section = (ROOT / "README.md").read_text().split("## The route of a conversation\n")[1].split("\n## ")[0]
    named = re.findall(r"[\w/]+\.py", section.replace("tests/test_route.py", ""))
    there = {path.as_posix().split("/src/")[1].partition("/")[2] for path in ROOT.glob("packages/*/src/**/*.py")}
    files = [file for hop in (*ROUTE, BACK) for file in hop.files]
    assert {*named, *files} <= there
    assert set(files) <= set(named)
    assert [file for file in named if file in files] == [file for file in files if file in named]
