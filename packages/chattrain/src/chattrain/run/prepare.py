"""From settings and a build to a run that is ready for its first step: plans, model, optimizers, where to start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from chatdata.packing.epoch import STAGE_LAYOUTS, STAGE_MASKS, TrainingPlan, plan_epoch
from chatdata.shards.read import Build
from chattrain.checkpoint import Checkpoint, Recipe, last_checkpoint, read_checkpoint, require_same_recipe
from chattrain.errors import RunError
from chattrain.model import GPT, initial_weights, load_model, random_config
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.optim import SCHEDULES, load_optimizer_tensors, make_optimizers
from chattrain.plan import PlanRecord, check_cut, plan_record, require_same_plan
from chattrain.run.ranks import Ranks
from chattrain.run.settings import RunSettings


@dataclass(frozen=True, eq=False)
class Learner:
    """A model in training: what a step calls and what it updates."""

    model: GPT
    called: nn.Module  # the model as a step calls it: compiled, under DDP
    optimizers: list[torch.optim.Optimizer]
    ranks: Ranks
    bf16: bool  # autocast to bfloat16
    compiled_loss: bool


@dataclass(frozen=True, eq=False)
class Run:
    """Everything a run needs before its first step."""

    learner: Learner
    plan: TrainingPlan
    plan_record: PlanRecord
    val_plan: TrainingPlan | None
    recipe: Recipe
    start: int  # the first step to do


def prepare(settings: RunSettings, build: Build, ranks: Ranks) -> Run:
    """Plan the run, make its model and optimizers, and load its last checkpoint if `resume` is set.

    Raises RunError for settings that contradict each other or the build, ResumeError, PlanError, PackingError,
    FormatError, ConfigError, WeightsError and CheckpointError.
    """
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise RunError('--tensorboard: tensorboard is not installed; install chattrain with its extra "tensorboard"')
    stage, on_cuda = settings.stage or build.manifest["stage"], ranks.device.type == "cuda"

    plan, val_plan = _make_plans(settings, build, stage, ranks.num_ranks)
    check_cut(plan, ranks.num_ranks, settings.device_batch_size)
    record = plan_record(plan)
    num_steps = settings.steps or plan.num_steps * settings.epochs
    if plan.order == "nanochat" and num_steps > plan.num_steps:
        raise RunError(f"order nanochat has only the {plan.num_steps} steps of its first epoch, not {num_steps}")
    recipe = Recipe(
        init=settings.init,
        stage=stage,
        num_steps=num_steps,
        lr_scale=settings.lr_scale,
        dtype=settings.dtype or ("bfloat16" if on_cuda else "float32"),
        non_finite=settings.non_finite,
        seed=settings.seed,
    )

    saved = last_checkpoint(settings.out) if settings.resume else None
    kind, _, size = settings.init.partition(":")
    if saved is not None:
        require_same_plan(saved.plan, record)
        require_same_recipe(saved.recipe, recipe)
        config, weights = saved.config, saved.weights()
    elif kind == "random":
        config = random_config(size, build.manifest["tokenizer"]["vocab_size"], settings.seq_len)
        weights = initial_weights(config, settings.seed)
    else:
        found = read_checkpoint(Path(settings.init))
        _require_same_tokenizer(found, build)
        config = replace(found.config, sequence_len=max(found.config.sequence_len, settings.seq_len))
        weights = found.weights()

    model = load_model(config, weights, ranks.device, settings.recompute)
    compiled = on_cuda if settings.compile is None else settings.compile
    # One graph for one width is fastest. Batches of pad differ in width: torch compiles at most 8, then runs without.
    called: nn.Module = torch.compile(model, dynamic=plan.layout == "pad") if compiled else model  # type: ignore[assignment]
    if ranks.num_ranks > 1:
        called = DistributedDataParallel(called, device_ids=[ranks.device] if on_cuda else None)
    optimizers = make_optimizers(model, SCHEDULES[stage].lr_fraction * settings.lr_scale)
    if saved is not None:
        load_optimizer_tensors(model, optimizers, saved.optimizer_tensors())
    learner = Learner(model, called, optimizers, ranks, recipe.dtype == "bfloat16", compiled and on_cuda)
    return Run(learner, plan, record, val_plan, recipe, start=0 if saved is None else saved.step)


def _make_plans(
    settings: RunSettings, build: Build, stage: str, num_ranks: int
) -> tuple[TrainingPlan, TrainingPlan | None]:
    """The plans of the train split and, if the run validates, of the val split."""
    chosen = {
        "layout": settings.layout or STAGE_LAYOUTS[stage],
        "mask": settings.mask or STAGE_MASKS[stage],
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "long": settings.long,
    }
    step_sequences = settings.device_batch_size * num_ranks
    if settings.total_batch_tokens is not None:
        step_sequences, rest = divmod(settings.total_batch_tokens, settings.seq_len)
        if rest or not step_sequences:
            raise RunError(
                f"--total-batch-tokens {settings.total_batch_tokens} is not a multiple of --seq-len {settings.seq_len}"
            )
    if settings.order == "plan":
        plan = plan_epoch(build.splits["train"], **chosen, step_sequences=step_sequences)
    elif settings.total_batch_tokens or settings.layout:
        raise RunError("--order nanochat fixes layout and batch: it goes without --layout and --total-batch-tokens")
    else:
        plan = make_nanochat_plan(
            build.splits["train"],
            mask=chosen["mask"],
            seq_len=settings.seq_len,
            num_ranks=num_ranks,
            device_batch_size=settings.device_batch_size,
        )
    if settings.eval_every is None:
        return plan, None
    if "val" not in build.splits:
        raise RunError(f"{settings.data}: --eval-every needs a val split, and this build has none")
    return plan, plan_epoch(build.splits["val"], **chosen, step_sequences=1)


def _require_same_tokenizer(checkpoint: Checkpoint, build: Build) -> None:
    """Raise RunError unless the tokenizers of checkpoint and build give the same ids for the canary texts."""
    from chatdata.tokenizer.files import load_tokenizer

    theirs, ours = load_tokenizer(checkpoint.path / "tokenizer"), build.manifest["tokenizer"]
    if (theirs.vocab_size, theirs.canary_sha256) != (ours["vocab_size"], ours["canary_sha256"]):
        raise RunError(
            f"{checkpoint.path} was trained with another tokenizer ({theirs.vocab_size:,} tokens) than {build.path} "
            f"was built with ({ours['vocab_size']:,}); build with --tokenizer {checkpoint.path / 'tokenizer'}"
        )
