"""The training loop: one step after the other, with checkpoints, validation and the log.

Loss of a step = sum over its targets ÷ number of its targets, over all ranks and micro-batches. The plan knows that
number before step 0, so each micro-batch's loss is divided by it once and gradients simply add up.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from chatdata.disk import sync
from chatdata.packing.epoch import TrainingPlan
from chatdata.progress import Progress, say, shown_progress
from chattrain.attention import pack_sequences
from chattrain.batches import Batch, Lengths, Step, ahead, read_step
from chattrain.checkpoint import Recipe, keep_last, require_finite, save_checkpoint
from chattrain.errors import NonFiniteError
from chattrain.evaluate import bits_per_byte, token_byte_counts
from chattrain.loss import chunked_loss
from chattrain.optim import SCHEDULES, all_optimizer_tensors, momentum, multiplier, optimizer_tensors, set_step, update
from chattrain.reads import name_documents, reads_of_step
from chattrain.run.losses import FOLDER, open_losses
from chattrain.run.settings import RunSettings
from chattrain.run.start import Learner, Run, StopRequest
from chattrain.run.telemetry import TrainEntry, ValEntry, digest_text, flops_per_token, mfu, open_log, peak_memory


class StepResult(NamedTuple):
    """The outcome of a step, over all ranks and micro-batches, as it is logged."""

    loss: float  # nats per target
    multiplier: float  # of every learning rate
    gradient_norm: float  # before the update
    batch: str  # see `digest_text`
    skipped: bool  # nothing was updated: loss or gradient was not finite
    # not logged:
    reads: np.ndarray  # float64 [2, reads of the step]: summed loss in nats and number of targets of each
    losses: np.ndarray  # float32 [N], of every target of this rank, in the order of Step.target_reads


def read_ahead(
    plan: TrainingPlan, steps: Iterable[int], *share: int | None, device: torch.device | str = "cpu"
) -> Iterator[Step]:
    """`read_step` of each of `steps`, one `ahead` of the caller. share: its rank, num_ranks, device_batch_size."""
    device = torch.device(device)
    pin = {"pin": True} if device.type == "cuda" else {}
    return ahead(lambda step: read_step(plan, step, *share, **pin), steps, device)


def hidden_states(learner: Learner, called: nn.Module, inputs: Tensor, lengths: Lengths) -> Tensor:
    """inputs [B, W] → hidden [B, W, C] on the learner's device; attention stays inside the documents of `lengths`."""
    device = learner.ranks.device
    form = "flex" if device.type == "cuda" else "split"
    documents = None if lengths is None else pack_sequences(lengths, inputs.shape[1], device, form)
    with torch.autocast(device.type, torch.bfloat16, enabled=learner.bf16):
        return called(inputs.to(device, non_blocking=True), documents)


def backward(learner: Learner, batch: Batch, num_targets: int) -> tuple[Tensor, Tensor]:
    """Add one micro-batch's share of the step's gradient; return its losses, still on the device.

    These are their sum and those of its targets [N], in nats.

    DDP averages gradients over ranks, so the share is multiplied by their number to turn the average into a sum.
    """
    model, ranks = learner.model, learner.ranks
    hidden = hidden_states(learner, learner.called, batch.inputs, batch.lengths)
    targets, rows = (t.to(ranks.device, non_blocking=True) for t in (batch.targets, batch.rows))
    compiled, vocab_size = learner.compiled_loss, model.config.vocab_size
    losses = torch.empty(len(rows), device=ranks.device)
    loss = chunked_loss(hidden, model.lm_head.weight, targets, vocab_size, compiled=compiled, rows=rows, out=losses)
    (loss * (ranks.num_ranks / num_targets)).backward()
    return loss.detach(), losses


def train_step(learner: Learner, recipe: Recipe, plan: TrainingPlan, step: Step) -> StepResult:
    """One step of the optimizer: gradients of all micro-batches, then the update. The host waits for the device once.

    Raises NonFiniteError before the update, naming the step and its documents; non_finite="skip" skips the update.
    Weights that are not finite raise in any case: no other document would help.
    """
    model, ranks = learner.model, learner.ranks
    results = []
    for number, batch in enumerate(step.batches):
        last = number + 1 == len(step.batches)
        # gradients travel once a step, with the last micro-batch
        with contextlib.nullcontext() if last or ranks.num_ranks == 1 else learner.called.no_sync():
            results.append(backward(learner, batch, max(step.num_targets, 1)))
    totals, losses = zip(*results, strict=True)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    found = torch.cat([torch.stack([*totals, norm]), *losses]).cpu().numpy()  # here, and nowhere else, the host waits
    *sums, gradient_norm = found[: len(totals) + 1].tolist()
    # one after the other, in float64: from Python 3.12 on, sum() is another one
    loss = float(ranks.sum(torch.tensor(np.cumsum(sums)[-1]))) / max(step.num_targets, 1)
    digest = int(ranks.sum(torch.tensor(step.digest)))
    read_losses = np.bincount(step.target_reads, found[len(totals) + 1 :], len(step.read_targets))
    reads = np.asarray(ranks.sum(torch.from_numpy(np.stack([read_losses, step.read_targets]))))
    finite = math.isfinite(loss) and math.isfinite(gradient_norm)
    if not finite:
        require_finite(dict(model.named_parameters()), step.number)
    if not finite and recipe.non_finite == "raise":
        names = name_documents(reads_of_step(plan, step.number))
        found = f"loss {loss}, gradient norm {gradient_norm}, from {names} of {plan.split.name}"
        after = "nothing was updated (--non-finite skip leaves such steps out)"
        raise NonFiniteError(f"step {step.number}: {found}; {after}")
    schedule = SCHEDULES[recipe.stage]
    rate = multiplier(schedule, step.number, recipe.num_steps)
    if finite:
        set_step(learner.optimizers, rate, momentum(schedule, step.number))
        update(learner.optimizers, ranks.rank, ranks.num_ranks)
    model.zero_grad(set_to_none=True)
    return StepResult(loss, rate, gradient_norm, digest_text(digest), not finite, reads, found[len(totals) + 1 :])


def train(run: Run, settings: RunSettings, stop: StopRequest) -> int:
    """Do the remaining steps; return how many are done in all. Saves at the end and when asked to stop."""
    learner, plan, recipe, ranks = run.learner, run.plan, run.recipe, run.learner.ranks
    done = run.start
    end = recipe.num_steps if settings.stop_at is None else min(recipe.num_steps, settings.stop_at)
    if done >= end:
        if end == 0:  # only the starting weights are wanted, to compare others with
            _save(run, settings, 0)
        return done
    log = open_log(settings.out, done, settings.track, ranks.is_first)
    losses = open_losses(settings.out, done) if ranks.is_first else contextlib.nullcontext(lambda reads: None)
    with log as write, losses as write_losses, shown_progress(quiet=not ranks.is_first) as progress:
        progress(recipe.stage, done, end, "steps")
        share = ranks.rank, ranks.num_ranks, settings.device_batch_size
        steps = read_ahead(plan, range(done, end), *share, device=ranks.device)
        stopped = done == 0 and run.val_plan is not None and _evaluate(run, settings, 0, write, progress, stop)
        while done < end and not stopped:
            started = time.perf_counter()
            step = next(steps)
            wait_s = time.perf_counter() - started
            result = train_step(learner, recipe, plan, step)
            done, duration_s = step.number + 1, time.perf_counter() - started
            tokens_per_s = step.num_tokens / duration_s
            counts = {"step": step.number, "tokens": step.num_tokens, "targets": step.num_targets}
            share_of_peak = mfu(learner.model.config, plan.seq_len, tokens_per_s / ranks.num_ranks, ranks.device)
            speed = {"tokens_per_s": round(tokens_per_s, 1), "mfu": share_of_peak}
            speed |= {"memory_bytes": peak_memory(ranks.device), "data_wait_share": round(wait_s / duration_s, 5)}
            write_losses(result.reads)
            logged = {key: value for key, value in result._asdict().items() if not isinstance(value, np.ndarray)}
            write(TrainEntry(**logged, **counts, **speed))
            progress(recipe.stage, done, end, "steps", f"loss {result.loss:.4f}, {tokens_per_s:,.0f} tokens/s")
            stopped = stop.agreed(ranks)
            if run.val_plan is not None and not stopped and (done % settings.eval_every == 0 or done == end):
                stopped = _evaluate(run, settings, done, write, progress, stop)
            if settings.save_every and done % settings.save_every == 0 and done < end and not stopped:
                _save(run, settings, done)
        _save(run, settings, done)
    return done


def _evaluate(
    run: Run, settings: RunSettings, step: int, write: Callable[[ValEntry], None], progress: Progress, stop: StopRequest
) -> bool:
    """Log bits per byte of the val split after `step` steps. True if asked to stop meanwhile."""
    started, learner = time.perf_counter(), run.learner

    def show(done: int, total: int) -> None:
        # one that takes long says how far it is, also where there are no bars
        progress("validation", done, total, "sequences", part=time.perf_counter() - started < 10)

    counts, size = token_byte_counts(run.plan.split.build.tokenizer), settings.device_batch_size

    def forward(inputs: Tensor, lengths: Lengths) -> Tensor:
        called = learner.called if len(inputs) == size else learner.model  # the last batch is not worth a graph
        return hidden_states(learner, called, inputs, lengths)

    result = bits_per_byte(learner.model, forward, run.val_plan, counts, learner.ranks, size, stop, show)
    if result is None:
        return True
    write(ValEntry(step, result["total"], result["tasks"], result["bytes"], round(time.perf_counter() - started, 3)))
    if learner.ranks.is_first:
        say(f"step {step}: validation {result['total']:.4f} bits per byte", error=True)
    return False


def _save(run: Run, settings: RunSettings, step: int) -> None:
    learner, model, ranks = run.learner, run.learner.model, run.learner.ranks
    weights, state = model.state_dict(), {}
    require_finite(weights, step)  # on all ranks, which see the same: they end together
    for name, tensor in all_optimizer_tensors(model, learner.optimizers, ranks.rank, ranks.num_ranks):
        require_finite({name: tensor}, step)
        if ranks.is_first:
            state[name] = tensor.cpu()
    if ranks.is_first:
        folder, tokenizer = settings.out / "checkpoints", run.plan.split.build.path / "tokenizer"
        for path in (settings.out / FOLDER).glob("*.bin"):  # so that it has all steps of the checkpoint
            sync(path)
        save_checkpoint(folder, step, model.config, weights, state, run.plan_record, run.recipe, tokenizer)
        keep_last(settings.out, settings.keep_last)
    ranks.wait()


def dry_run(run: Run, device_batch_size: int) -> dict[str, Any]:
    """`chattrain run --dry-run`: do the step the run would begin with, save nothing, and estimate the rest from it.

    The step is done twice and the second one is timed: the first also compiles and allocates.
    """
    learner, ranks = run.learner, run.learner.ranks
    step = read_step(run.plan, run.start, ranks.rank, ranks.num_ranks, device_batch_size)
    for _ in range(2):
        started = time.perf_counter()
        result = train_step(learner, run.recipe, run.plan, step)
        duration_s = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    state = sum(t.numel() * t.element_size() for t in optimizer_tensors(learner.model, learner.optimizers).values())
    memory = {"weights_and_gradients": 2 * parameters * 4, "optimizer": state}
    memory["peak_of_one_step"] = peak_memory(ranks.device)
    recipe, flops = run.recipe, flops_per_token(learner.model.config, run.plan.seq_len)
    numbers = {"plan": run.plan.counts(), "steps": recipe.num_steps, "stage": recipe.stage, "dtype": recipe.dtype}
    numbers |= {"device": str(ranks.device), "ranks": ranks.num_ranks}
    numbers |= {"parameters": parameters, "flops_per_token": flops, "memory_bytes": memory}
    numbers["step"] = {"duration_s": round(duration_s, 3), "tokens_per_s": round(step.num_tokens / duration_s)}
    left_s = round(duration_s * (recipe.num_steps - run.start), 1)
    return numbers | {"first_loss": result.loss, "estimated_duration_s": left_s}
