from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy

from chattrain import attention
from chattrain.attention import pack_sequences
from chattrain.errors import AttentionError, ConfigError
from chattrain.model import GPT, load_model

# on CPU the flex form is for checks: it says that uncompiled it stores all scores
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

ROWS = [[3, 20, 1], [24], [7, 9, 8], [5]]  # the last row has room left
TOKENS = torch.randint(101, (4, 24), generator=torch.Generator().manual_seed(1))


def hidden_one_by_one(model: GPT, tokens: torch.Tensor, documents: attention.PackedSequences) -> torch.Tensor:
    """The specification of packed rows: every document run alone. tokens [B, T] → hidden [B, T, C]."""
    alone = [model(piece[None])[0] for piece in tokens.flatten().split(documents.lengths)]
    return torch.cat(alone).view(*tokens.shape, -1)


def test_positions_and_lengths():
    documents = pack_sequences([[3, 2], [4]], sequence_len=6)
    assert documents.lengths == (3, 2, 1, 4, 2)  # the free end of a row counts as one document
    assert documents.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    assert documents.block_mask is None


@pytest.mark.parametrize("form", ["split", "flex"])
def test_packed_equals_one_by_one(small_model, form):
    documents = pack_sequences(ROWS, 24, form=form)
    with torch.no_grad():
        expected = small_model.logits(hidden_one_by_one(small_model, TOKENS, documents))
        packed = small_model.logits(small_model(TOKENS, documents))
        assert (packed - expected).abs().max() <= 1e-5

        # the sabotaged twins
        across = small_model.logits(small_model(TOKENS, positions=documents.positions))
        assert (across - expected).abs().max() > 1e-2
        running = small_model.logits(small_model(TOKENS, replace(documents, positions=torch.arange(24).expand(4, -1))))
        # all of a document moved alike changes no distance, so only rounding is left of it: see the next test
        assert (running - expected).abs().max() < 1e-4


def test_positions_that_do_not_restart_are_seen(tiny_config, tiny_weights):
    """Rotary attention depends on distances only, so it takes bf16 tables, where a position has its own rounding, to
    see in the logits that positions restart. With fp32 tables `test_positions_and_lengths` has to see it."""
    model = load_model(tiny_config, tiny_weights)
    documents = pack_sequences([[10, 20, 18]], 48)
    tokens = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.logits(hidden_one_by_one(model, tokens, documents))
        assert (model.logits(model(tokens, documents)) - expected).abs().max() <= 1e-5
        running = model.logits(model(tokens, replace(documents, positions=torch.arange(48)[None])))
        assert (running - expected).abs().max() > 1e-4


@given(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_any_packing_equals_one_by_one(small_weights, small_config, rows):
    model = load_model(small_config, small_weights)
    tokens = torch.randint(101, (len(rows), 24))
    documents = pack_sequences(rows, 24)
    with torch.no_grad():
        assert torch.allclose(model(tokens, documents), hidden_one_by_one(model, tokens, documents), atol=1e-5)


def test_packed_gradients_equal_one_by_one(small_model):
    model, documents = small_model.double(), pack_sequences(ROWS, 24)
    found = []
    for hidden in (model(TOKENS, documents), hidden_one_by_one(model, TOKENS, documents)):
        model.zero_grad()
        cross_entropy(model.logits(hidden).flatten(0, 1), TOKENS.roll(-1).flatten()).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for packed, alone in zip(*found, strict=True):
        assert torch.allclose(packed, alone, rtol=1e-9, atol=1e-11)


def test_flex_refuses_a_gradient_on_cpu(small_model):
    with pytest.raises(AttentionError, match="no backward on CPU: train with 'split'"):
        small_model(TOKENS, pack_sequences(ROWS, 24, form="flex"))


def test_unknown_form_and_lengths_that_do_not_fit():
    with pytest.raises(AttentionError, match=r"'split' .* or 'flex'"):
        pack_sequences(ROWS, 24, form="dense")
    with pytest.raises(ConfigError, match=r"row 1: document lengths \[20, 5\] must be positive and fit 24"):
        pack_sequences([[24], [20, 5]], 24)
    with pytest.raises(ConfigError, match="row 0"):
        pack_sequences([[0, 3]], 24)


@pytest.mark.parametrize("form", ["split", "flex"])
def test_compiled_once_for_all_batches(small_model, form):
    """The lengths of the documents are no part of the compiled graph."""
    torch._dynamo.reset()
    compiled = torch.compile(small_model, backend="eager", fullgraph=form == "flex")
    with torch.no_grad():
        batches = [pack_sequences(rows, 24, form=form) for rows in (ROWS, ROWS[::-1], [[24], [1, 23], [2], [3, 3]])]
        assert torch.allclose(compiled(TOKENS, batches[0]), small_model(TOKENS, batches[0]), atol=1e-6)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for documents in batches[1:]:
                assert torch.allclose(compiled(TOKENS, documents), small_model(TOKENS, documents), atol=1e-6)


def test_on_a_gpu_the_block_mask_is_compiled_once_for_all_batches(monkeypatch):
    """As there, but for the backend: other documents need no new graph, and their blocks are those made plainly."""
    torch._dynamo.reset()
    counter = CompileCounter()
    batches = [torch.arange(512).div(length, rounding_mode="floor").expand(2, -1).clone() for length in (300, 128, 70)]
    plain = [attention._block_mask(starts).to_dense() for starts in batches]
    assert len({mask.sum().item() for mask in plain}) == 3
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    made = attention._block_mask_maker.__wrapped__("cuda")
    monkeypatch.setattr(attention, "_block_mask_maker", lambda device_type: made)
    assert all(torch.equal(attention._block_mask(s).to_dense(), p) for s, p in zip(batches, plain, strict=True))
    assert counter.frame_count == 1
