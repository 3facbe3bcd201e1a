import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import chattrain.loss as loss_module
from chattrain.loss import IGNORED, chunked_loss, position_losses
from chattrain.model import softcap

VOCAB, ROWS, WIDTH = 101, 128, 32
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The specification of `chunked_loss`: the same arguments and result, with all logits at once."""
    logits = softcap(linear(hidden, weight[:vocab_size].to(hidden.dtype)))
    return cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def problem(dtype, kept: float, seed: int = 0):
    """Hidden states [3, 16, WIDTH], head, targets of which about `kept` are not ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 16, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype).mul(2).requires_grad_()  # up into the cap
    targets = torch.randint(VOCAB, (3, 16), generator=generator)
    targets[torch.rand(3, 16, generator=generator) >= kept] = -100
    return hidden, weight, targets


def value_and_gradients(loss, hidden, weight, targets, divisor=7.0, **kwargs):
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    value = loss(hidden, weight, targets, VOCAB, **kwargs)
    (value / divisor).backward()
    return value.detach(), hidden.grad, weight.grad


def relative(found, expected) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("chunk_rows", [1, 5, 48, None])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunked_equals_plain(dtype, kept, chunk_rows):
    hidden, weight, targets = problem(dtype, kept)
    expected = value_and_gradients(plain_loss, hidden, weight, targets)
    found = value_and_gradients(chunked_loss, hidden, weight, targets, chunk_rows=chunk_rows)
    for name, x, y in zip(("value", "hidden", "weight"), found, expected, strict=True):
        assert x.dtype == y.dtype == dtype
        assert relative(x, y) <= TOLERANCE[dtype], name
    if kept == 0:
        assert not any(x.any() for x in found)
    assert not found[2][VOCAB:].any()  # the padding rows of the head


@pytest.mark.parametrize("sabotage", ["target dropped", "shifted by one", "mask flipped", "another cap"])
def test_equality_sees(sabotage, monkeypatch):
    hidden, weight, targets = problem(torch.float64, kept=0.5)
    expected = value_and_gradients(plain_loss, hidden, weight, targets)
    wrong = targets.clone()
    if sabotage == "target dropped":
        wrong.view(-1)[(targets.view(-1) != -100).nonzero()[0]] = -100
    elif sabotage == "shifted by one":
        wrong = targets.roll(1, dims=1)
    elif sabotage == "mask flipped":
        wrong = torch.where(targets == -100, 5, -100)
    else:
        monkeypatch.setattr(loss_module, "SOFTCAP", 30.0)
    for x, y in zip(value_and_gradients(chunked_loss, hidden, weight, wrong), expected, strict=True):
        assert relative(x, y) > 1e-3


def test_sums_do_not_depend_on_micro_batches_but_means_do():
    hidden, weight, targets = problem(torch.float64, kept=0.4)
    count = (targets != -100).sum()
    counts = (targets != -100).sum(1)
    assert len(set(counts.tolist())) > 1
    whole = value_and_gradients(chunked_loss, hidden, weight, targets, divisor=count)[2]
    parts = [
        value_and_gradients(chunked_loss, hidden[i : i + 1], weight, targets[i : i + 1], divisor=count)[2]
        for i in range(3)
    ]
    assert relative(sum(parts), whole) <= 1e-12
    means = [part * count / counts[i] / 3 for i, part in enumerate(parts)]  # the sabotaged twin
    assert relative(sum(means), whole) > 1e-3


def test_rows_with_a_target_are_given_or_found():
    hidden, weight, targets = problem(torch.float32, kept=0.5)
    rows = torch.tensor([i for i, target in enumerate(targets.flatten().tolist()) if target != IGNORED])
    expected = value_and_gradients(chunked_loss, hidden, weight, targets)
    found = value_and_gradients(chunked_loss, hidden, weight, targets, rows=rows)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    given = position_losses(hidden, weight, targets, VOCAB, rows=rows)
    assert torch.equal(given, position_losses(hidden, weight, targets, VOCAB))
    fewer = value_and_gradients(chunked_loss, hidden, weight, targets, rows=rows[1:])  # the sabotaged twin
    assert relative(fewer[0], expected[0]) > 1e-3


def test_position_losses():
    hidden, weight, targets = problem(torch.float64, kept=0.5)
    losses = position_losses(hidden, weight, targets, VOCAB, chunk_rows=5)
    assert losses.shape == targets.shape
    assert not losses.requires_grad
    assert not losses[targets == -100].any()
    assert (losses[targets != -100] > 0).all()
    assert relative(losses.sum(), plain_loss(hidden, weight, targets, VOCAB)) <= 1e-12
    with torch.no_grad():  # chunked_loss without gradients is their sum
        assert torch.equal(chunked_loss(hidden, weight, targets, VOCAB, chunk_rows=5), losses.sum())


def test_every_position_has_its_own_loss():
    hidden, weight, targets = problem(torch.float64, kept=0.5)
    losses = position_losses(hidden, weight, targets, VOCAB, chunk_rows=5).flatten()
    for x, target, loss in zip(hidden.flatten(0, 1), targets.flatten(), losses, strict=True):
        assert abs(plain_loss(x[None], weight, target[None], VOCAB) - loss) <= 1e-12


def test_position_losses_of_bf16_hidden_states():
    hidden, weight, targets = problem(torch.float32, kept=0.5)
    losses = position_losses(hidden.bfloat16(), weight, targets, VOCAB)
    assert losses.dtype == torch.float32
    assert relative(losses, position_losses(hidden, weight, targets, VOCAB)) <= 2e-2


def test_logits_are_held_for_as_many_targets_as_asked(monkeypatch):
    hidden, weight, targets = problem(torch.float64, kept=1.0)
    targets.view(-1)[12:] = -100
    with_gradient, without = [], []
    losses_and_gradient, softcap = loss_module._losses_and_gradient, loss_module.softcap
    monkeypatch.setattr(
        loss_module, "_losses_and_gradient", lambda z, *a: with_gradient.append(len(z)) or losses_and_gradient(z, *a)
    )
    monkeypatch.setattr(loss_module, "softcap", lambda z: without.append(len(z)) or softcap(z))
    with warnings.catch_warnings(action="error"):  # torch warns where a buffer is not of the size it is used with
        chunked_loss(hidden, weight, targets, VOCAB, chunk_rows=5)
    with torch.no_grad():
        chunked_loss(hidden, weight, targets, VOCAB, chunk_rows=5)
    assert with_gradient == without == [5, 5, 2]


@pytest.mark.parametrize(
    ("device", "vocab_size", "expected"),
    [("cpu", 65_536, 256), ("cuda", 65_536, 4096), ("cpu", 2**24 - 1, 1), ("cpu", 2**25, 1)],
)
def test_chunks_suit_the_device(device, vocab_size, expected):
    first, *_, last = loss_module._chunks(10_000, vocab_size, torch.device(device), None)
    assert first == slice(0, expected)
    assert last.start < 10_000 <= last.stop


def test_bf16_hidden_states():
    hidden, weight, targets = problem(torch.float32, kept=0.5)
    expected = value_and_gradients(plain_loss, hidden, weight, targets)
    found = value_and_gradients(chunked_loss, hidden.bfloat16(), weight, targets, chunk_rows=5)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float32]
    for x, y in zip(found, expected, strict=True):
        assert relative(x.float(), y) < 2e-2
    # the logits are bf16, everything after them fp32, as in the specification
    plain = value_and_gradients(plain_loss, hidden.bfloat16(), weight, targets)
    for x, y, tolerance in zip(found, plain, (1e-6, 1e-2, 1e-2), strict=True):
        assert relative(x.float(), y.float()) <= tolerance


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_dtype_is_hiddens_under_autocast_too(dtype, autocast):
    hidden, weight, targets = problem(torch.float32, kept=0.5)
    hidden = hidden.to(dtype)
    expected = value_and_gradients(chunked_loss, hidden, weight, targets)
    with torch.autocast("cpu", autocast):
        found = value_and_gradients(chunked_loss, hidden, weight, targets)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_compiled_form(monkeypatch):
    monkeypatch.setattr(loss_module, "_compiled", lambda f: torch.compile(f, backend="aot_eager", dynamic=True))
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = problem(torch.float32, kept=0.5)
        expected = value_and_gradients(chunked_loss, hidden.to(dtype), weight, targets, chunk_rows=5)
        found = value_and_gradients(chunked_loss, hidden.to(dtype), weight, targets, chunk_rows=5, compiled=True)
        for x, y in zip(found, expected, strict=True):
            assert relative(x.float(), y.float()) <= 1e-6


def test_a_function_is_compiled_once():
    compiled = loss_module._compiled(relative)
    assert callable(compiled) and loss_module._compiled(relative) is compiled


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_targets_outside_the_vocabulary_fail(target):
    hidden, weight, targets = problem(torch.float32, kept=0.5)
    targets[0, 0] = target
    with pytest.raises((RuntimeError, IndexError)):
        chunked_loss(hidden, weight, targets, VOCAB)


def test_a_second_backward_fails_instead_of_scaling_twice():
    hidden, weight, targets = problem(torch.float32, kept=0.5)
    loss = chunked_loss(hidden, weight, targets, VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


def test_either_gradient_alone():
    hidden, weight, targets = problem(torch.float64, kept=0.5)
    _, *expected = value_and_gradients(plain_loss, hidden, weight, targets, divisor=1.0)
    for which in (0, 1):
        inputs = [x.detach().requires_grad_(i == which) for i, x in enumerate((hidden, weight))]
        chunked_loss(*inputs, targets, VOCAB).backward()
        assert relative(inputs[which].grad, expected[which]) <= 1e-12
        assert inputs[1 - which].grad is None


def test_gradients_of_gradients_are_refused():
    hidden, weight, targets = problem(torch.float32, kept=0.5)
    loss = chunked_loss(hidden, weight, targets, VOCAB).square()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_hidden_states_of_any_layout():
    hidden, weight, targets = problem(torch.float64, kept=0.5)
    transposed = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not transposed.is_contiguous()
    chunked_loss(transposed, weight, targets, VOCAB).backward()
    expected = value_and_gradients(plain_loss, hidden, weight, targets, divisor=1.0)
    assert relative(transposed.grad, expected[1]) <= 1e-12


def test_memory_for_logits_suits_the_device():
    """Rows of logits at a time at V = 65,536: mps shares its memory with the CPU."""
    rows = {name: loss_module._chunks(10**6, 65_536, torch.device(name), None) for name in ("cpu", "mps", "cuda")}
    assert {name: next(chunks) for name, chunks in rows.items()} == {
        "cpu": slice(0, 256),
        "mps": slice(0, 1024),
        "cuda": slice(0, 4096),
    }
