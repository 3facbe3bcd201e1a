"""`to_torch`: the items of every layout are chattrain's batches, and what transformers makes of them."""

from __future__ import annotations

import json
import pickle
from typing import get_args

import numpy as np
import polars as pl
import pytest
import torch
from torch.utils.data import DataLoader

import chatdata
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.errors import PackingError, PlanError
from chatdata.packing.epoch import plan_epoch
from chatdata.packing.torch import TorchDataset
from chatdata.recipe import load_recipe
from chatdata.shards.masks import MaskPolicy
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer
from chattrain.attention import pack_sequences
from chattrain.batches import read_step

TOOL = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
SEQ_LEN = 48  # of the documents, 8 … 60 tokens, some are longer


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> chatdata.Split:
    """40 documents in several shards, a token a byte: one or two turns, every other with a tool call."""
    folder = tmp_path_factory.mktemp("torch")
    chats = []
    for i in range(40):
        answer = [{"type": "text", "text": "ab" * (i % 3 + 1)}, *(TOOL * (i % 2))]
        chats.append([{"role": "user", "content": "q" * (i % 5 + 1)}, {"role": "assistant", "content": answer}])
        if i % 3:
            chats[-1] += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "c" * i}]
    (folder / "c.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    tasks = load_tasks()
    recipe = load_recipe(str(folder / "r.toml"), tasks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", 400)
        build(make_build_plan(recipe, tasks, byte_tokenizer, Locations(folder)), folder / "out", decontaminate="off")
    split = chatdata.open_build(folder / "out")["train"]
    assert len(split.shards) > 2
    return split


def targets_of(dataset: TorchDataset) -> int:
    return sum(int((item["labels"] != -100).sum()) for item in dataset)


def test_literal_items(make_split) -> None:
    """T = 6: a (4 tokens) and c (3) share a sequence; where c begins, the label is a's last token."""
    split = make_split([[10, 11, 12, 13], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32]])
    (first, second) = sorted(chatdata.to_torch(split, "pack", 6), key=lambda item: int(item["input_ids"][0]))
    assert {key: values.tolist() for key, values in first.items()} == {
        "input_ids": [10, 11, 12, 30, 31, 32, 9],
        "labels": [-100, 11, 12, 13, 31, 32, -100],
        "position_ids": [0, 1, 2, 0, 1, 2, 0],
    }
    assert second["input_ids"].tolist() == [20, 21, 22, 23, 24, 25, 26]
    assert second["labels"].tolist() == [-100, 21, 22, 23, 24, 25, 26]
    pad = {int(item["input_ids"][0]): item for item in chatdata.to_torch(split, "pad", 6, "ignore")}
    assert pad[30]["input_ids"].tolist() == [30, 31, 32, 9, 9, 9, 9]
    assert pad[30]["labels"].tolist() == [-100, 31, 32, -100, -100, -100, -100]
    assert pad[30]["position_ids"].tolist() == [0, 1, 2, 0, 0, 0, 0]
    stream = chatdata.to_torch(split, "stream", 6)
    assert [item["input_ids"].tolist() for item in stream] == [
        [10, 11, 12, 13, 20, 21, 22],
        [22, 23, 24, 25, 26, 30, 31],
    ]
    assert [item["labels"].tolist() for item in stream] == [
        [-100, 11, 12, 13, -100, 21, 22],
        [-100, 23, 24, 25, 26, -100, 31],
    ]
    assert {values.dtype for item in stream for values in item.values()} == {torch.int64}


@pytest.mark.parametrize("mask", get_args(MaskPolicy))
@pytest.mark.parametrize("layout", ["stream", "pack", "pad"])
def test_items_in_order_are_the_steps_of_chattrain(split: chatdata.Split, layout: str, mask: str) -> None:
    dataset = chatdata.to_torch(split, layout, SEQ_LEN, mask, seed=7, long="truncate")
    plan = plan_epoch(split, layout, mask, SEQ_LEN, 3, 7, "truncate")
    batches = [*DataLoader(dataset, batch_size=3)]
    tokens, packing = split.tokens(0, split.num_tokens).tolist(), plan.packing
    for step in range(plan.num_steps):
        expected, batch = read_step(plan, step).batches[0], batches[step]
        width = expected.inputs.shape[1]  # of pad: the longest of the step
        assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (3, SEQ_LEN + 1)
        assert torch.equal(batch["labels"][:, 1 : width + 1], expected.targets)
        assert (batch["labels"][:, 0] == -100).all() and (batch["labels"][:, width + 1 :] == -100).all()
        for row in range(3):
            ids, number = batch["input_ids"][row].tolist(), step * 3 + row
            positions, last = [*range(SEQ_LEN + 1)], tokens[min((number + 1) * SEQ_LEN, len(tokens) - 1)]
            if packing is not None:
                placed = slice(*packing.bounds[number : number + 2])
                lengths = packing.lengths[placed].tolist()
                last = tokens[split.offsets[packing.documents[placed]][-1] + lengths[-1] - 1]
                positions = [i for n in lengths for i in range(n - 1)] + [lengths[-1] - 1]
            n = len(positions) - 1
            # chattrain does not feed the last token, and pads with the same id
            assert ids == [*expected.inputs[row, :n].tolist(), last, *[260] * (SEQ_LEN - n)]
            assert batch["position_ids"][row].tolist() == positions + [0] * (SEQ_LEN - n)
            if expected.lengths is not None:
                theirs = pack_sequences(expected.lengths, SEQ_LEN).positions[row]
                assert positions[:n] == theirs[:n].tolist()
    assert targets_of(dataset) == plan.targets_per_step.sum() + plan.left_out.sequence_targets > 0
    assert dataset.plan.left_out.long_documents_cut == plan.left_out.long_documents_cut


@pytest.mark.parametrize("mask", get_args(MaskPolicy))
def test_documents_are_whole(split: chatdata.Split, mask: str) -> None:
    dataset = chatdata.to_torch(split, mask=mask)
    assert len(dataset) == 40
    for item, row in zip(dataset, split.to_dataset(mask), strict=True):
        assert item["input_ids"].tolist() == row["input_ids"]
        assert item["labels"].tolist() == [-100, *row["labels"][1:]]
        assert item["position_ids"].tolist() == [*range(len(row["labels"]))]
    for layout in ("pad", "pack"):
        assert targets_of(chatdata.to_torch(split, layout, 200, mask)) == targets_of(dataset)


def test_the_stage_decides_the_mask(split: chatdata.Split) -> None:
    assert chatdata.to_torch(split).mask == "apply"


def test_collate_pads(split: chatdata.Split) -> None:
    dataset = chatdata.to_torch(split)
    (batch,) = DataLoader(dataset, batch_size=40, collate_fn=dataset.collate)
    end = split.build.manifest["tokenizer"]["special_ids"]["<|assistant_end|>"]
    for row, document in enumerate(split):
        n = len(document)
        assert batch["input_ids"][row, :n].tolist() == document.tokens.tolist()
        assert (batch["input_ids"][row, n:] == end).all() and (batch["labels"][row, n:] == -100).all()
        # padding is known by position: the same id is a target as the document's own end
        assert batch["labels"][row, n - 1] == end
    assert int((batch["labels"] != -100).sum()) == targets_of(dataset)


@pytest.mark.parametrize("layout", ["documents", "pad", "pack", "stream"])
def test_workers_read_the_same(split: chatdata.Split, layout: str) -> None:
    dataset = chatdata.to_torch(split[::2], layout, None if layout == "documents" else 100, "no-tools")
    both = [DataLoader(dataset, 4, collate_fn=dataset.collate, num_workers=workers) for workers in (0, 2)]
    for alone, shared in zip(*both, strict=True):
        assert alone.keys() == shared.keys() and all(torch.equal(alone[key], shared[key]) for key in alone)


@pytest.mark.parametrize("layout", ["documents", "pack"])
def test_pickles_hold_no_tokens(split: chatdata.Split, layout: str) -> None:
    """What a worker that is spawned gets: the files are mapped again."""
    chosen = split.filter(pl.col("num_tool_calls") > 0)
    dataset = chatdata.to_torch(chosen, layout, None if layout == "documents" else 100, "last-turn")
    items = [*dataset]
    pickled = pickle.dumps(dataset)
    assert b"tokenizer.bpe" not in pickled and chosen[0].tokens.tobytes() not in pickled
    again = pickle.loads(pickled)
    assert again.split.whole._maps == {}
    assert all(torch.equal(a[key], b[key]) for a, b in zip(items, again, strict=True) for key in a)


def test_losses_of_transformers(split: chatdata.Split) -> None:
    """The mean over all targets is the same for whole documents, padded or packed ones: labels and attention fit."""
    transformers = pytest.importorskip("transformers", reason="loads a model of transformers: uv sync")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.NanoChatConfig(vocab_size=265, num_key_value_heads=2, **sizes)
    model = transformers.NanoChatForCausalLM(config).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)

    def loss(layout: str, **cache: bool) -> float:
        dataset = chatdata.to_torch(split, layout, None if layout == "documents" else 200)
        total = 0.0
        for batch in DataLoader(dataset, 1 if layout == "documents" else 8, collate_fn=dataset.collate):
            with torch.no_grad():
                total += float(model(**batch, **cache).loss) * int((batch["labels"] != -100).sum())
        return total / targets_of(dataset)

    alone = loss("documents")
    assert [loss("pad"), loss("pack", use_cache=False)] == pytest.approx([alone, alone], rel=1e-6)
    assert loss("pack") != pytest.approx(alone, rel=1e-4)  # documents see those before them


def test_what_is_refused(split: chatdata.Split) -> None:
    for arguments in (("documents", 48), ("pack", None), ("packed", None)):
        with pytest.raises(PlanError, match=rf"layout '{arguments[0]}', seq_len {arguments[1]}: documents are whole"):
            chatdata.to_torch(split, *arguments)
    with pytest.raises(PlanError, match=r"layout is 'packed': it must be one of stream, pack, pad"):
        chatdata.to_torch(split, "packed", 48)
    with pytest.raises(PlanError, match=r"unknown mask policy 'all'"):
        chatdata.to_torch(split, mask="all")
    with pytest.raises(PackingError, match=r"more than sequence length 48 \+ 1"):
        chatdata.to_torch(split, "pack", SEQ_LEN)
    with pytest.raises(PlanError, match=r"train has 0 documents"):
        chatdata.to_torch(split[:0], "stream", SEQ_LEN)
    dataset = chatdata.to_torch(split)
    assert torch.equal(dataset[-1]["input_ids"], dataset[39]["input_ids"])
    with pytest.raises(IndexError):
        dataset[40]
    assert np.diff(split.offsets).max() > SEQ_LEN + 1
