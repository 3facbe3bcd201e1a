import pytest
import torch
from safetensors.torch import load_file, save_file

from chatdata.packing.epoch import STAGE_LAYOUTS, STAGE_MASKS
from chattrain.errors import WeightsError
from chattrain.loss import chunked_loss
from chattrain.model import load_model
from chattrain.optim import (
    SCHEDULES,
    Muon,
    load_optimizer_tensors,
    make_optimizers,
    momentum,
    multiplier,
    optimizer_tensors,
    orthogonalise,
    owners,
    set_step,
)


def train(model, optimizers, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(step))
        set_step(optimizers, multiplier=1 - step / 20, momentum=0.85 + step / 300)
        (chunked_loss(model(tokens[:, :-1]), model.lm_head.weight, tokens[:, 1:], 101) / 46).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


@pytest.fixture
def fresh(small_config, small_weights):
    model = load_model(small_config, small_weights)
    return model, make_optimizers(model)


def test_ten_and_ten_steps_are_twenty(fresh, small_config, tmp_path):
    model, optimizers = fresh
    train(model, optimizers, range(10))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_file(optimizer_tensors(model, optimizers), tmp_path / "optimizer.safetensors")
    train(model, optimizers, range(10, 20))

    resumed = load_model(small_config, load_file(tmp_path / "model.safetensors"))
    its_optimizers = make_optimizers(resumed)
    load_optimizer_tensors(resumed, its_optimizers, load_file(tmp_path / "optimizer.safetensors"))
    train(resumed, its_optimizers, range(10, 20))
    assert same_bytes(resumed.state_dict(), model.state_dict())
    assert same_bytes(optimizer_tensors(resumed, its_optimizers), optimizer_tensors(model, optimizers))

    for forgotten in ("momentum_buffer", "step", "exp_avg", "exp_avg_sq"):  # the sabotaged twins
        wrong = load_model(small_config, load_file(tmp_path / "model.safetensors"))
        its_optimizers = make_optimizers(wrong)
        tensors = load_file(tmp_path / "optimizer.safetensors")
        for name in tensors:
            if name.endswith("/" + forgotten):
                tensors[name] = torch.zeros_like(tensors[name])
        load_optimizer_tensors(wrong, its_optimizers, tensors)
        train(wrong, its_optimizers, range(10, 20))
        assert not same_bytes(wrong.state_dict(), model.state_dict())


def test_names_of_the_state(fresh):
    model, optimizers = fresh
    assert optimizer_tensors(model, optimizers) == {}
    load_optimizer_tensors(model, optimizers, {})
    train(model, optimizers, range(1))
    names = set(optimizer_tensors(model, optimizers))
    assert len(names) == 2 * 6 + 2 * 3  # a buffer per matrix of 2 blocks, three tensors each for head and embedding
    assert {"lm_head.weight/step", "transformer.wte.weight/exp_avg_sq"} < names
    assert "transformer.h.1.mlp.c_fc.weight/momentum_buffer" in names


def test_loading_refuses_by_name_and_leaves_the_state_alone(fresh):
    model, optimizers = fresh
    train(model, optimizers, range(1))
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizers).items()}
    with pytest.raises(WeightsError, match="unknown tensors extra/step, missing tensors none"):
        load_optimizer_tensors(model, optimizers, tensors | {"extra/step": torch.ones(())})
    with pytest.raises(WeightsError, match=r"missing tensors lm_head\.weight/step"):
        load_optimizer_tensors(model, optimizers, {k: v for k, v in tensors.items() if k != "lm_head.weight/step"})
    with pytest.raises(WeightsError, match=r"exp_avg has shape \(3,\), must be \(128, 64\)"):
        load_optimizer_tensors(model, optimizers, tensors | {"lm_head.weight/exp_avg": torch.ones(3)})
    assert same_bytes(optimizer_tensors(model, optimizers), tensors)


def test_loaded_state_is_a_copy(fresh):
    model, optimizers = fresh
    train(model, optimizers, range(1))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizers).items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    load_optimizer_tensors(model, optimizers, saved)
    train(model, optimizers, range(1, 2))
    assert same_bytes(saved, kept)


def test_rates(fresh):
    model, _ = fresh
    muon, adamw = optimizers = make_optimizers(model, lr_scale=0.02)
    set_step(optimizers, multiplier=0.5, momentum=0.9)
    width_scale = (64 / 768) ** -0.5
    assert muon.param_groups[0]["lr"] == pytest.approx(0.02 * 0.02 * 0.5)
    assert muon.param_groups[0]["momentum"] == 0.9
    assert [group["lr"] for group in adamw.param_groups] == pytest.approx(
        [0.004 * width_scale * 0.02 * 0.5, 0.2 * width_scale * 0.02 * 0.5]
    )
    set_step(optimizers, multiplier=1.0, momentum=0.95)  # from the base rate again, not from the last one
    assert muon.param_groups[0]["lr"] == pytest.approx(0.02 * 0.02)
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups)
    in_groups = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, in_groups)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (64, 64)])
def test_muon_is_torchs(shape):
    """Held to torch.optim.Muon, which orthogonalises in bf16: within its rounding."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    mine = Muon([{"params": [ours]}])
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="original")
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.param_groups[0]["momentum"] = reference.param_groups[0]["momentum"] = 0.85 + step / 300
        mine.step()
        reference.step()
        a, b = ours.detach() - before[0], theirs.detach() - before[1]
        assert (a - b).norm() < 0.05 * b.norm()
        assert (a - b * 2**0.5).norm() > 0.2 * b.norm()  # the sabotaged twin: a scale that is not this one
    assert torch.allclose(mine.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


def test_orthogonalise():
    matrices = torch.randn(3, 40, 100, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices, torch.float32))
    assert 0.6 < values.min() < values.max() < 1.3
    assert torch.equal(orthogonalise(matrices.mT, torch.float32), orthogonalise(matrices, torch.float32).mT)
    assert orthogonalise(matrices, torch.bfloat16).dtype == torch.bfloat16
    assert not orthogonalise(torch.zeros(2, 3, 4), torch.float32).any()


def plain_orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The specification of `orthogonalise`: one matrix, in fp32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


@pytest.mark.parametrize("shape", [(16, 256, 256), (4, 1024, 256), (4, 256, 1024), (3, 100, 150), (2, 64, 48)], ids=str)
def test_matrices_stacked_give_the_bytes_of_each_alone(shape):
    """So golden losses hold, and so does a run at another number of ranks, where others are in the stack."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalise(matrices, torch.float32)
    for number, matrix in enumerate(matrices):
        assert torch.equal(found[number], plain_orthogonalise(matrix))
        assert torch.equal(found[number], orthogonalise(matrix[None], torch.float32)[0])


def test_owners(fresh):
    model, optimizers = fresh
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert set(owners(optimizers, 1).values()) == {0}
    parts = {}
    for parameter, rank in owners(optimizers, 3).items():
        parts.setdefault(rank, []).append(names[parameter].removeprefix("transformer.").removesuffix(".weight"))
    # sides of 64 (32 for c_k and c_v) and AdamW's 64 for head and embedding: 16, 8, 4 and 1 are the works
    assert parts == {
        0: ["h.0.mlp.c_fc", "h.1.mlp.c_proj", "h.0.attn.c_k", "h.1.attn.c_v"],
        1: ["h.0.mlp.c_proj", "lm_head", "h.0.attn.c_q", "h.1.attn.c_q", "h.0.attn.c_v"],
        2: ["h.1.mlp.c_fc", "wte", "h.0.attn.c_proj", "h.1.attn.c_proj", "h.1.attn.c_k"],
    }
    assert sorted(owners(optimizers, 20).values())[-1] == 13  # more ranks than matrices: some have nothing to do


def test_stages():
    assert list(SCHEDULES) == list(STAGE_LAYOUTS) == list(STAGE_MASKS) == ["base", "mid", "sft"]
    assert SCHEDULES["base"] == SCHEDULES["mid"] and STAGE_LAYOUTS["base"] == STAGE_LAYOUTS["mid"] == "stream"
    assert (STAGE_LAYOUTS["sft"], STAGE_MASKS) == ("pack", {"base": "ignore", "mid": "ignore", "sft": "apply"})
    assert (SCHEDULES["mid"].lr_fraction, SCHEDULES["sft"].lr_fraction) == (1.0, 0.02)


def test_multiplier():
    mid, sft = SCHEDULES["mid"], SCHEDULES["sft"]
    assert [multiplier(mid, s, 10) for s in range(10)] == pytest.approx([1] * 8 + [1, 0.5])
    assert [multiplier(mid, s, 20) for s in range(14, 20)] == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])
    assert [multiplier(sft, s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert multiplier(mid, 0, 1) == multiplier(sft, 0, 1) == 1


def test_momentum():
    mid, sft = SCHEDULES["mid"], SCHEDULES["sft"]
    assert [momentum(mid, s) for s in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert [momentum(sft, s) for s in (0, 1, 1000)] == [0.95] * 3
