"""Mask policies against masks written by hand and a walk over the tokens; a split as a dataset, as TRL takes it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.document import Document
from chatdata.errors import PlanError
from chatdata.recipe import load_recipe
from chatdata.shards.masks import Ranges, covered
from chatdata.shards.read import Split, open_build
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer

SPAN_POLICIES = ("last-turn", "tools-only", "no-tools")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(*parts: str) -> dict:
    """Parts: "text", "python=output"."""
    content = []
    for part in parts:
        python, found, output = part.partition("=")
        content.append({"type": "python" if found else "text", "text": python})
        if found:
            content.append({"type": "python_output", "text": output})
    return {"role": "assistant", "content": content if len(parts) != 1 or "=" in parts[0] else parts[0]}


Build = Callable[..., Split]


@pytest.fixture(scope="module")
def build_of(byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build_of(conversations, recipe line, …) → the train split, a token a byte, documents as given."""

    def make(conversations: list[list[dict]], *lines: str) -> Split:
        folder = tmp_path_factory.mktemp("masks")
        (folder / "c.jsonl").write_text("".join(json.dumps(c) + "\n" for c in conversations))
        recipe = ['stage = "sft"', *lines, "[[train]]", 'task = "conversations"', 'path = "c.jsonl"']
        (folder / "r.toml").write_text("\n".join(recipe))
        tasks = load_tasks()
        loaded = load_recipe(str(folder / "r.toml"), tasks)
        build(make_build_plan(loaded, tasks, byte_tokenizer, Locations(folder)), folder / "build", workers=1)
        return open_build(folder / "build")["train"]

    return make


def supervised_text(split: Split, policy: str, number: int = 0) -> list[str]:
    """The supervised runs of a document, special tokens spelled out."""
    first, last = split.offsets[number : number + 2]
    tokenizer = split.build.tokenizer
    document = Document(split.tokens(first, last), split.mask(first, last, policy), tokenizer=tokenizer)
    return [text.replace("<|", "<").replace("|>", ">") for supervised, text in document.runs() if supervised]


TOOLS = [user("q"), assistant("a", "1+1=2", "b"), user("r"), assistant("3*3=9", "4=4")]
TALK = [user("hi"), assistant("yo"), user("so"), assistant("ok"), user("bye")]


@pytest.mark.parametrize(
    ("conversation", "policy", "expected"),
    [
        (
            TOOLS,
            "apply",
            [
                "a<python_start>1+1<python_end>",
                "b<assistant_end>",
                "<python_start>3*3<python_end>",
                "<python_start>4<python_end>",
                "<assistant_end>",
            ],
        ),
        (TOOLS, "last-turn", ["<python_start>3*3<python_end>", "<python_start>4<python_end>", "<assistant_end>"]),
        (
            TOOLS,
            "tools-only",
            ["<python_start>1+1<python_end>", "<python_start>3*3<python_end>", "<python_start>4<python_end>"],
        ),
        (TOOLS, "no-tools", ["a", "b<assistant_end>", "<assistant_end>"]),
        (TALK, "apply", ["yo<assistant_end>", "ok<assistant_end>"]),
        (TALK, "last-turn", ["ok<assistant_end>"]),  # a conversation may end on a user message
        (TALK, "tools-only", []),
        (TALK, "no-tools", ["yo<assistant_end>", "ok<assistant_end>"]),
        ([user("hi")], "last-turn", []),
        # an empty message has no span, and is the last all the same
        ([user("hi"), assistant("yo"), user("x"), assistant("")], "last-turn", ["<assistant_end>"]),
        # text that spells a delimiter is text
        ([user("hi"), assistant("<|python_start|>x")], "tools-only", []),
        ([user("hi"), assistant("<|user_end|>x")], "last-turn", ["<user_end>x<assistant_end>"]),
    ],
)
def test_policies(build_of: Build, conversation: list[dict], policy: str, expected: list[str]) -> None:
    assert supervised_text(build_of([conversation], 'zero_supervised = "keep"'), policy) == expected


def test_all_is_every_token(build_of: Build) -> None:
    split = build_of([TALK])
    assert split.mask(0, split.num_tokens, "ignore").tolist() == [1] * split.num_tokens


@pytest.mark.parametrize(
    ("max_tokens", "last_turn", "tools_only"),
    [
        # bos US q UE AS a PS 1 + 1 PE OS 2 OE b AE US r UE AS PS 3 * 3 PE …
        (24, ["<python_start>3*3"], ["<python_start>1+1<python_end>", "<python_start>3*3"]),
        (20, [], ["<python_start>1+1<python_end>"]),  # assistant_start is left of the last message, nothing supervised
        (19, ["a<python_start>1+1<python_end>", "b<assistant_end>"], ["<python_start>1+1<python_end>"]),
        (18, ["a<python_start>1+1<python_end>", "b<assistant_end>"], ["<python_start>1+1<python_end>"]),
        (9, ["a<python_start>1+"], ["<python_start>1+"]),
    ],
)
def test_documents_cut_by_the_build(
    build_of: Build, max_tokens: int, last_turn: list[str], tools_only: list[str]
) -> None:
    """The last assistant message is the last one of what is stored."""
    split = build_of([TOOLS], f"max_tokens = {max_tokens}", 'overflow = "truncate"', 'zero_supervised = "keep"')
    assert split.num_tokens == max_tokens
    assert supervised_text(split, "last-turn") == last_turn
    assert supervised_text(split, "tools-only") == tools_only


def test_plain_text_has_no_messages(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n')
    (tmp_path / "r.toml").write_text('stage = "base"\n[[train]]\ntask = "text"\npath = "t.jsonl"\n')
    tasks = load_tasks()
    planned = make_build_plan(load_recipe(str(tmp_path / "r.toml"), tasks), tasks, byte_tokenizer, Locations(tmp_path))
    build(planned, tmp_path / "build", workers=1)
    split = open_build(tmp_path / "build")["train"]
    sums = {policy: int(split.mask(0, split.num_tokens, policy).sum()) for policy in ("apply", *SPAN_POLICIES)}
    assert sums == {"apply": 5, "last-turn": 0, "tools-only": 0, "no-tools": 5}


def walked(tokens: list[int], mask: list[int], special: dict[str, int]) -> dict[str, list[int]]:
    """Every policy of one document, by walking over its tokens."""
    starts = [i for i, token in enumerate(tokens) if token == special["<|assistant_start|>"]]
    inside, tools = False, []
    for token in tokens:
        inside |= token == special["<|python_start|>"]
        tools.append(int(inside))
        inside &= token != special["<|python_end|>"]
    last = max(starts, default=len(tokens))
    return {
        "apply": mask,
        "ignore": [1] * len(tokens),
        "last-turn": [m if i > last else 0 for i, m in enumerate(mask)],
        "tools-only": [m & t for m, t in zip(mask, tools, strict=True)],
        "no-tools": [m & (1 - t) for m, t in zip(mask, tools, strict=True)],
    }


@pytest.fixture(scope="module")
def many(build_of: Build) -> tuple[Split, dict[str, np.ndarray]]:
    """300 conversations cut at 40 tokens, in several shards; and their policies, walked."""
    draw = random.Random(5)

    def message() -> dict:
        parts = [draw.choice(["a", "bc", "1+1=2", "7=7", "", "x=y"]) for _ in range(draw.randint(1, 4))]
        return assistant(*parts)

    def conversation() -> list[dict]:
        turns = [turn for _ in range(draw.randint(1, 4)) for turn in (user(draw.choice(["q", "why"])), message())]
        return turns[: len(turns) - draw.randint(0, 1)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", 2_000)
        split = build_of(
            [conversation() for _ in range(300)], "max_tokens = 40", 'overflow = "truncate"', 'zero_supervised = "keep"'
        )
    assert len(split.shards) > 3 and split.index["truncated"].sum() > 30
    expected: dict[str, list[int]] = {}
    for document in split:
        special = split.build.manifest["tokenizer"]["special_ids"]
        for policy, mask in walked(document.tokens.tolist(), document.mask.tolist(), special).items():
            expected.setdefault(policy, []).extend(mask)
    return split, {policy: np.array(mask, np.uint8) for policy, mask in expected.items()}


@pytest.mark.parametrize("at_once", [7, 2**16])
def test_policies_agree_with_a_walk_over_the_tokens(many, monkeypatch, at_once: int) -> None:
    split, expected = many
    monkeypatch.setattr("chatdata.shards.maps.INDEX_ROWS_AT_ONCE", at_once)
    fresh = open_build(split.build.path)["train"]
    for policy, mask in expected.items():
        assert np.array_equal(fresh.mask(0, fresh.num_tokens, policy), mask), policy
    assert 0 < expected["last-turn"].sum() < expected["apply"].sum()


def test_how_policies_relate(many) -> None:
    split, _ = many
    stored, last, tools, rest = (split.mask(0, split.num_tokens, p) for p in ("apply", *SPAN_POLICIES))
    assert np.array_equal(stored, np.concatenate([document.mask for document in split]))
    assert not (last & ~stored).any()
    assert not (tools & rest).any() and np.array_equal(tools | rest, stored)


@given(st.data())
def test_any_part_of_the_split_has_the_same_mask(many, data) -> None:
    """A sequence of stream rows may begin and end inside a document, a message, a part."""
    split, expected = many
    start = data.draw(st.integers(0, split.num_tokens))
    stop = data.draw(st.integers(start, min(split.num_tokens, start + 200)))
    policy = data.draw(st.sampled_from(sorted(expected)))
    assert split.mask(start, stop, policy).tolist() == expected[policy][start:stop].tolist()


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 30), unique=True, max_size=12).map(sorted),
    st.lists(st.tuples(st.integers(0, 31), st.integers(0, 9)), max_size=6),
)
def test_covered_counts_by_hand(edges: list[int], runs: list[tuple[int, int]]) -> None:
    """Touching ranges, empty runs, runs in any order and overlapping."""
    starts, stops = np.array(edges[:-1], np.int64), np.array(edges[1:], np.int64)
    inside = {i for a, b in pairwise(edges) for i in range(a, b)}
    found = covered(
        Ranges(starts, stops), np.array([r[0] for r in runs], np.int64), np.array([r[1] for r in runs], int)
    )
    assert found.tolist() == [i in inside for start, count in runs for i in range(start, start + count)]


def test_an_unknown_policy_is_refused(build_of: Build) -> None:
    with pytest.raises(PlanError, match=r"unknown mask policy 'last_turn'; did you mean \"last-turn\"\?"):
        build_of([TALK]).mask(0, 3, "last_turn")


def test_the_stored_mask_is_a_view(build_of: Build) -> None:
    split = build_of([TALK])
    assert np.shares_memory(split.mask(0, 5), split.map("mask", 0))


# to_dataset


@pytest.mark.parametrize("policy", ["apply", "ignore", "last-turn"])
def test_a_split_as_a_dataset(many, policy: str) -> None:
    split, expected = many
    dataset = split.to_dataset(policy)
    assert dataset.column_names == ["input_ids", "labels", "assistant_masks"] and len(dataset) == 300
    for number in (0, 1, 77, 299):
        first, last = split.offsets[number : number + 2]
        tokens, mask = split.tokens(first, last), expected[policy][first:last]
        assert dataset[number] == {
            "input_ids": tokens.tolist(),
            "labels": [token if bit else -100 for token, bit in zip(tokens.tolist(), mask.tolist(), strict=True)],
            "assistant_masks": mask.tolist(),
        }


def test_a_dataset_lies_over_the_shards(many) -> None:
    """Ids and the stored mask are not copied: their Arrow buffers are the memory maps."""
    split, _ = many
    table = split.to_dataset().data.table
    for name, kind in (("input_ids", "tokens"), ("assistant_masks", "mask")):
        for number, chunk in enumerate(table[name].chunks[-len(split.shards) :]):
            assert chunk.values.buffers()[1].address == split.map(kind, number).__array_interface__["data"][0]


def test_datasets_of_one_build_and_policy_have_one_name(many) -> None:
    split, _ = many
    names = [split.to_dataset(policy)._fingerprint for policy in ("apply", "apply", "ignore")]
    assert names[0] == names[1] != names[2]


def test_trl_trains_on_it(many, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trains with trl: uv sync")
    torch = pytest.importorskip("torch", reason="trains with torch: uv sync")
    from transformers import NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerFast

    split, _ = many
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig(vocab_size=320, intermediate_size=64, pad_token_id=264, **sizes))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(split.build.path / "tokenizer")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False
    )
    dataset = split.to_dataset("last-turn")
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    fed = next(iter(trainer.get_train_dataloader()))
    ids, labels = fed["input_ids"], fed["labels"]
    # aligned, not shifted, and as masked here: labels are the ids or nothing
    assert (labels[labels != -100] == ids[labels != -100]).all() and (labels == -100).any()
    rows = {tuple(row["input_ids"]): row["labels"] for row in dataset}
    for row in range(2):
        length = int(fed["attention_mask"][row].sum()) if "attention_mask" in fed else ids.shape[1]
        assert rows[tuple(ids[row, :length].tolist())] == labels[row, :length].tolist()
    trainer.train()
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert trainer.state.global_step == 2 and np.isfinite(losses).all() and losses
