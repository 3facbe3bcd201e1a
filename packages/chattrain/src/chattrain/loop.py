"""The training loop: from a build to checkpoints.

Loss of a step = sum over its targets ÷ number of its targets, over all ranks and micro-batches. The number is the
plan's, known before step 0, so each micro-batch's loss is divided by it once and gradients simply add up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chatdata.packing.epoch import Layout, TrainingPlan, plan_epoch
from chatdata.shards.read import Build, open_build
from chattrain.attention import pack_sequences
from chattrain.batches import Batch, Step, digest_text, read_ahead
from chattrain.checkpoint import Checkpoint, keep_last, last_checkpoint, read_checkpoint, save_checkpoint
from chattrain.errors import NonFiniteError, RunError
from chattrain.evaluate import bits_per_byte, token_byte_counts
from chattrain.loss import chunked_loss
from chattrain.model import GPT, ModelConfig, initial_weights, load_model, random_config
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.optim import load_optimizer_tensors, make_optimizers, optimizer_tensors, set_step
from chattrain.plan import check_cut, name_documents, plan_record, reads_of_step, require_same_plan
from chattrain.run import telemetry
from chattrain.run.ranks import Ranks, StopRequest
from chattrain.run.settings import Dtype, Settings, recipe_of, require_same_recipe
from chattrain.schedule import Stage, find_stage, momentum, multiplier


@dataclass
class Job:
    """Everything a run needs, made before step 0."""

    settings: Settings
    ranks: Ranks
    build: Build
    stage: Stage
    plan: TrainingPlan
    val_plan: TrainingPlan | None
    num_steps: int
    dtype: Dtype
    recipe: dict[str, Any]
    model: GPT
    parallel: nn.Module  # the model as it is called: compiled, DDP
    optimizers: list[torch.optim.Optimizer]
    start: int  # the first step to do


@dataclass(frozen=True)
class StepResult:
    """What a step came to, over all ranks and micro-batches."""

    loss: float  # nats per target
    gradient_norm: float  # before the update
    digest: str  # of the batch: see `digest_text`
    skipped: bool  # nothing was updated: loss or gradient was not finite


def prepare(settings: Settings, ranks: Ranks) -> Job:
    """Open the build, make the plan, the model and the optimizers; load the last checkpoint where `resume` is set.

    Raises RunError for what does not go together, UnknownStageError, ResumeError, and what making the plan, the model
    and the optimizers raises: PlanError, PackingError, FormatError, ConfigError, WeightsError, CheckpointError.
    """
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise RunError("--tensorboard: tensorboard is not installed; pip install 'chattrain[tensorboard]'")
    build = open_build(settings.data)
    stage = find_stage(settings.stage or build.manifest["stage"])
    plan = make_run_plan(build, "train", stage, settings, ranks)
    check_cut(plan, ranks.num_ranks, settings.device_batch_size)
    num_steps = settings.steps or plan.num_steps * settings.epochs
    if plan.order == "nanochat" and num_steps > plan.num_steps:
        raise RunError(f"order nanochat has {plan.num_steps} steps, its first epoch; {num_steps} were asked for")
    val_plan = None
    if settings.eval_every is not None:
        if "val" not in build.splits:
            raise RunError(f"{settings.data}: --eval-every needs a val split, and this build has none")
        val_plan = make_run_plan(build, "val", stage, replace(settings, order="plan"), ranks, evaluation=True)
    dtype: Dtype = settings.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    recipe = recipe_of(settings, stage.name, num_steps, dtype)
    resumed = last_checkpoint(settings.out) if settings.resume else None
    if resumed is not None:
        require_same_plan(resumed.plan, plan_record(plan))
        require_same_recipe(resumed.recipe, recipe)
    config, weights = initial_model(settings, build) if resumed is None else (resumed.config, resumed.weights())
    model = load_model(config, weights, ranks.device, settings.recompute)
    optimizers = make_optimizers(model, stage.lr_fraction * settings.lr_scale)
    if resumed is not None:
        load_optimizer_tensors(model, optimizers, resumed.optimizer_tensors())
    return Job(
        settings=settings,
        ranks=ranks,
        build=build,
        stage=stage,
        plan=plan,
        val_plan=val_plan,
        num_steps=num_steps,
        dtype=dtype,
        recipe=recipe,
        model=model,
        parallel=parallel_model(model, settings, ranks, plan.layout),
        optimizers=optimizers,
        start=0 if resumed is None else resumed.step,
    )


def make_run_plan(
    build: Build, split: str, stage: Stage, settings: Settings, ranks: Ranks, evaluation: bool = False
) -> TrainingPlan:
    """The plan of a split under the stage's policy and the command line's changes to it."""
    layout, mask = settings.layout or stage.layout, settings.mask or stage.mask
    if settings.order == "nanochat":
        if settings.total_batch_tokens or settings.layout:
            raise RunError("--order nanochat fixes layout and batch: it goes without --layout and --total-batch-tokens")
        return make_nanochat_plan(
            build[split],
            mask=mask,
            seq_len=settings.seq_len,
            num_ranks=ranks.num_ranks,
            device_batch_size=settings.device_batch_size,
        )
    step_sequences = 1 if evaluation else settings.device_batch_size * ranks.num_ranks
    if settings.total_batch_tokens is not None and not evaluation:
        step_sequences, rest = divmod(settings.total_batch_tokens, settings.seq_len)
        if rest or not step_sequences:
            raise RunError(
                f"--total-batch-tokens {settings.total_batch_tokens} is not a multiple of --seq-len {settings.seq_len}"
            )
    return plan_epoch(
        build[split],
        layout=layout,
        mask=mask,
        seq_len=settings.seq_len,
        step_sequences=step_sequences,
        seed=settings.seed,
        long=settings.long,
    )


def initial_model(settings: Settings, build: Build) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of `--init`: "random:dN", "random:LxWxH", or a checkpoint whose tokenizer is the build's."""
    vocab_size = build.manifest["tokenizer"]["vocab_size"]
    kind, _, size = settings.init.partition(":")
    if kind == "random":
        config = random_config(size, vocab_size, settings.seq_len)
        return config, initial_weights(config, settings.seed)
    checkpoint = read_checkpoint(Path(settings.init))
    require_same_tokenizer(checkpoint, build)
    longest = max(checkpoint.config.sequence_len, settings.seq_len)
    return replace(checkpoint.config, sequence_len=longest), checkpoint.weights()


def require_same_tokenizer(checkpoint: Checkpoint, build: Build) -> None:
    """Raises RunError unless checkpoint and build give the same ids for the canary texts."""
    from chatdata.tokenizer.files import load_tokenizer

    theirs, ours = load_tokenizer(checkpoint.path / "tokenizer"), build.manifest["tokenizer"]
    if (theirs.vocab_size, theirs.canary_sha256) != (ours["vocab_size"], ours["canary_sha256"]):
        raise RunError(
            f"{checkpoint.path} was trained with another tokenizer ({theirs.vocab_size:,} entries) than {build.path} "
            f"was built with ({ours['vocab_size']:,}); build with --tokenizer {checkpoint.path / 'tokenizer'}"
        )


def parallel_model(model: GPT, settings: Settings, ranks: Ranks, layout: Layout) -> nn.Module:
    """The model as the loop calls it: compiled (by default on cuda), and under DDP where there are several ranks."""
    compiled = ranks.device.type == "cuda" if settings.compile is None else settings.compile
    # Batches of stream and pack have one shape, and a graph for it is the fastest. Batches of pad are as wide as each
    # step needs: torch would compile a graph for 8 widths, then give up and run without.
    called: nn.Module = torch.compile(model, dynamic=layout == "pad") if compiled else model  # type: ignore[assignment]
    if ranks.num_ranks == 1:
        return called
    return DistributedDataParallel(called, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)


def hidden_states(job: Job, called: nn.Module, inputs: Tensor, lengths: Any) -> Tensor:
    """inputs [B, W] → hidden [B, W, C] on the job's device and dtype; documents kept apart where `lengths` has them."""
    device = job.ranks.device
    documents = None
    if lengths is not None:
        form = "flex" if device.type == "cuda" else "split"
        documents = pack_sequences(lengths, inputs.shape[1], device, form)
    with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "bfloat16"):
        return called(inputs.to(device, non_blocking=True), documents)


def backward(job: Job, batch: Batch, num_targets: int) -> Tensor:
    """Add one micro-batch's share of the step's gradient; return its sum of losses in nats.

    DDP averages gradients over ranks, so the share is multiplied by their number to make the average a sum.
    """
    hidden = hidden_states(job, job.parallel, batch.inputs, batch.lengths)
    targets = batch.targets.to(job.ranks.device, non_blocking=True)
    compiled = job.ranks.device.type == "cuda" and job.settings.compile is not False
    loss = chunked_loss(hidden, job.model.lm_head.weight, targets, job.model.config.vocab_size, compiled=compiled)
    (loss * (job.ranks.num_ranks / num_targets)).backward()
    return loss.detach()


def train_step(job: Job, step: Step) -> StepResult:
    """One step of the optimizer: gradients of all micro-batches, then the update.

    Raises NonFiniteError before the update, naming the step and its documents; with non_finite="skip" leaves it out.
    """
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for number, batch in enumerate(step.batches):
        last = number + 1 == len(step.batches)
        # gradients travel once a step, with the last micro-batch
        with contextlib.nullcontext() if last or job.ranks.num_ranks == 1 else job.parallel.no_sync():  # type: ignore[operator]
            total += backward(job, batch, max(step.num_targets, 1)).cpu().double()  # mps has no float64
    loss = float(job.ranks.sum(total)) / max(step.num_targets, 1)
    digest = digest_text(int(job.ranks.sum(torch.tensor(step.digest, dtype=torch.int64))))
    gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
    gradient_norm = float(nn.utils.get_total_norm(gradients))
    finite = torch.isfinite(torch.tensor([loss, gradient_norm])).all().item()
    if not finite and job.settings.non_finite == "raise":
        names = name_documents(reads_of_step(job.plan, step.number))
        raise NonFiniteError(
            f"step {step.number}: loss {loss}, gradient norm {gradient_norm}, from {names} of {job.plan.split.name}; "
            "nothing was updated (--non-finite skip leaves such steps out)"
        )
    if finite:
        set_step(job.optimizers, multiplier(job.stage, step.number, job.num_steps), momentum(job.stage, step.number))
        for optimizer in job.optimizers:
            optimizer.step()
    job.model.zero_grad(set_to_none=True)
    return StepResult(loss, gradient_norm, digest, not finite)


def train(job: Job, stop: StopRequest) -> int:
    """Run the steps that are left; return the number of steps done in all. Saves at the end and when asked to stop."""
    settings, ranks = job.settings, job.ranks
    end = job.num_steps if settings.stop_at is None else min(job.num_steps, settings.stop_at)
    if job.start >= end:
        if end == 0:  # only the starting weights are wanted, to compare others with
            _save(job, 0)
        return job.start
    log = telemetry.open_log(settings.out, job.start) if ranks.is_first else None
    done = job.start
    with telemetry.progress(job, end) as show:
        asked = job.start == 0 and _evaluate(job, log, 0, stop)
        if asked:
            _save(job, 0)
            end = 0  # asked to stop before the first step
        for step, wait_s in _timed(
            read_ahead(
                job.plan,
                range(job.start, end),
                ranks.rank,
                ranks.num_ranks,
                settings.device_batch_size,
                ranks.device,
            )
        ):
            started = time.perf_counter()
            result = train_step(job, step)
            done = step.number + 1
            duration_s = time.perf_counter() - started + wait_s
            if log is not None:
                show(telemetry.log_step(log, job, step, result, duration_s, wait_s))
            asked = stop.agreed(ranks)
            if not asked and settings.eval_every and (done % settings.eval_every == 0 or done == end):
                asked = _evaluate(job, log, done, stop)
            if asked or done == end or (settings.save_every and done % settings.save_every == 0):
                _save(job, done)
            if asked:
                break
    if log is not None:
        log.close()
    return done


def _timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds it was waited for."""
    while True:
        started = time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        yield step, time.perf_counter() - started


def _evaluate(job: Job, log: Any, step: int, stop: StopRequest) -> bool:
    """Log bits per byte of the val split, if there is one to evaluate. True if asked to stop meanwhile."""
    if job.val_plan is None:
        return False

    def forward(inputs: Tensor, lengths: Any) -> Tensor:
        return hidden_states(job, job.model, inputs, lengths)

    counts = token_byte_counts(job.build.tokenizer)
    started = time.perf_counter()
    batch = job.settings.device_batch_size
    result = bits_per_byte(job.model, forward, job.val_plan, counts, job.ranks, batch, stop)
    if result is None:
        return True
    if log is not None:
        telemetry.log_evaluation(log, step, result, time.perf_counter() - started)
    return False


def _save(job: Job, step: int) -> None:
    if job.ranks.is_first:
        save_checkpoint(
            job.settings.out / "checkpoints",
            step,
            job.model.config,
            job.model.state_dict(),
            optimizer_tensors(job.model, job.optimizers),
            plan_record(job.plan),
            job.recipe,
            job.build.path / "tokenizer",
        )
        keep_last(job.settings.out, job.settings.keep_last)
    job.ranks.wait()
