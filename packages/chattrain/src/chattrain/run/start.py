"""Starting a run: ranks and device, plans, model, optimizers, and where to continue.

Ranks are one process each under torchrun; without torchrun there is a single one. They talk through gloo about what is
on the CPU, which makes no GPU wait, and through nccl about what is on GPUs.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from chatdata.errors import first_line
from chatdata.packing.epoch import STAGE_LAYOUTS, STAGE_MASKS, Layout, TrainingPlan, plan_epoch
from chatdata.shards.read import Build
from chattrain.checkpoint import PlanRecord, Recipe, last_checkpoint, plan_record, read_checkpoint, require_same
from chattrain.errors import DeviceError, RankError, ResumeError, RunError
from chattrain.model import GPT, State, initial_weights, load_model, random_config
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.optim import SCHEDULES, load_optimizer_tensors, make_optimizers
from chattrain.run.settings import RunSettings
from chattrain.run.watch import open_peers, watched


class Ranks(NamedTuple):
    """This process, number `rank` of `num_ranks`, on `device`."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values`, which are on the CPU, over all ranks, on every rank."""
        if self.num_ranks > 1:
            values = values.clone()  # summed in place
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        self.sum(torch.zeros(()))


def find_device(wanted: str | None) -> torch.device:
    """The device of this name ("cpu", "cuda", "mps"), by default cuda if available. Raises DeviceError."""
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name):
        raise DeviceError(f"device {name!r} is not available: torch {torch.__version__} does not find one")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)


@contextmanager
def join_ranks(device: str | None, wait: timedelta | None = None) -> Iterator[Ranks]:
    """Join the process group of torchrun's environment, if there is one, and leave it at the end.

    wait: how long a rank waits for others before it fails, by default torch's (10 minutes on nccl). Raises DeviceError,
    and RankError if another rank cannot be reached or ends first.
    """
    found = find_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1:
        yield Ranks(0, 1, found)
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo", timeout=wait)
        peers = open_peers()
    except RuntimeError as error:
        raise RankError(f"cannot join the other ranks: {first_line(error)}") from error
    try:
        with watched(peers):
            ranks = Ranks(dist.get_rank(), num_ranks, found)
            yield ranks
            ranks.wait()  # nobody leaves before the last one is done
    finally:
        dist.destroy_process_group()


@contextmanager
def memory_limited(settings: RunSettings) -> Iterator[None]:
    """What is inside runs the model: if the device has too little memory, DeviceError says what needs less."""
    try:
        yield
    except RuntimeError as error:  # only cuda has a class of its own for it
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        sizes = f"--device-batch-size {settings.device_batch_size} at --seq-len {settings.seq_len}"
        remedy = "try a smaller one (--total-batch-tokens keeps the steps as they are)"
        more = "" if settings.recompute else ", or --recompute"
        raise DeviceError(f"out of memory with {sizes}: {remedy}{more}") from error


SAME_SIGNAL_S = 2  # one Ctrl-C often comes twice, from the terminal and forwarded by a launcher


class StopRequest:
    """Set by SIGTERM or SIGINT: the run saves and ends after its step. A second signal ends it immediately."""

    asked, _asked_at = False, 0.0

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        with ExitStack() as stack:
            for number in (signal.SIGTERM, signal.SIGINT):
                stack.callback(signal.signal, number, signal.signal(number, self._ask))
            yield self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and time.monotonic() - self._asked_at > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked, self._asked_at = True, self._asked_at or time.monotonic()

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them."""
        return bool(ranks.sum(torch.tensor(int(self.asked))).item())


@dataclass(frozen=True, eq=False)
class Learner:
    """A model in training: what a step calls and what it updates."""

    model: GPT
    called: nn.Module  # the model as a step calls it: compiled, under DDP
    optimizers: list[torch.optim.Optimizer]
    ranks: Ranks
    bf16: bool  # autocast to bfloat16
    compiled_loss: bool


class Run(NamedTuple):
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
    if settings.track and getattr(find_spec(settings.track), "origin", None) is None:  # a folder "wandb" is not it
        raise RunError(f"--track {settings.track}: not installed: `uv sync --extra {settings.track}` installs it")
    stage, on_cuda = settings.stage or build.manifest["stage"], ranks.device.type == "cuda"

    plan, val_plan = _make_plans(settings, build, stage, ranks.num_ranks)
    record = plan_record(plan)
    num_steps = settings.steps or plan.num_steps * settings.epochs
    if plan.order == "nanochat" and num_steps > plan.num_steps:
        raise RunError(f"order nanochat has only the {plan.num_steps} steps of its first epoch, not {num_steps}")
    dtype = settings.dtype or ("bfloat16" if on_cuda else "float32")
    recipe = Recipe(settings.init, stage, num_steps, settings.lr_scale, dtype, settings.non_finite, settings.seed)

    saved = last_checkpoint(settings.out) if settings.resume else None
    if saved is not None:
        require_same(saved.plan, record)
        require_same(saved.recipe, recipe)
        if saved.step > num_steps:
            raise ResumeError(f"{saved.path}: step {saved.step:,} of a run of {num_steps:,} steps")
    state = saved.state() if saved else first_state(recipe, build, settings.seq_len)
    learner = make_learner(settings, ranks, recipe, plan.layout, state)
    return Run(learner, plan, record, val_plan, recipe, start=0 if saved is None else saved.step)


def first_state(recipe: Recipe, build: Build, seq_len: int) -> State:
    """What a run starts from: fresh weights, or those of another checkpoint."""
    kind, _, size = recipe.init.partition(":")
    if kind == "random":
        config = random_config(size, build.manifest["tokenizer"]["vocab_size"], seq_len)
        return config, initial_weights(config, recipe.seed), {}
    found = read_checkpoint(Path(recipe.init))
    _require_same_tokenizer(found.path, build)
    return replace(found.config, sequence_len=max(found.config.sequence_len, seq_len)), found.weights(), {}


def make_learner(settings: RunSettings, ranks: Ranks, recipe: Recipe, layout: Layout, state: State) -> Learner:
    """Model and optimizers in a state. Of `settings`, only `compile` and `recompute` are used."""
    config, weights, optimizer = state
    on_cuda = ranks.device.type == "cuda"
    model = load_model(config, weights, ranks.device, settings.recompute)
    compiled = on_cuda if settings.compile is None else settings.compile
    # One graph for one width is fastest. Batches of pad differ in width: torch compiles at most 8, then runs without.
    called = torch.compile(model, dynamic=layout == "pad") if compiled else model
    if ranks.num_ranks > 1:
        # as views of DDP's buckets gradients are held once, not twice: 2.2 GB less at d20
        devices = [ranks.device] if on_cuda else None
        called = DistributedDataParallel(called, device_ids=devices, gradient_as_bucket_view=True)
    optimizers = make_optimizers(model, SCHEDULES[recipe.stage].lr_fraction * recipe.lr_scale)
    load_optimizer_tensors(model, optimizers, optimizer, ranks.rank, ranks.num_ranks)
    return Learner(model, called, optimizers, ranks, recipe.dtype == "bfloat16", compiled and on_cuda)


def _make_plans(
    settings: RunSettings, build: Build, stage: str, num_ranks: int
) -> tuple[TrainingPlan, TrainingPlan | None]:
    """The plans of the train split and, if the run validates, of the val split."""
    layout, mask = settings.layout or STAGE_LAYOUTS[stage], settings.mask or STAGE_MASKS[stage]
    shared = {"mask": mask, "seq_len": settings.seq_len}
    plan_split = partial(plan_epoch, layout=layout, seed=settings.seed, long=settings.long, **shared)
    micro_tokens = num_ranks * settings.device_batch_size * settings.seq_len  # of one micro-batch on every rank
    step_tokens = settings.total_batch_tokens or micro_tokens
    if step_tokens % micro_tokens:
        factors = f"{num_ranks} × {settings.device_batch_size} × {settings.seq_len}"
        least = f"{micro_tokens:,}: {factors} (ranks × device batch size × sequence length)"
        raise RunError(f"--total-batch-tokens {step_tokens:,} must be a multiple of {least}")
    if settings.order == "plan":
        plan = plan_split(build.splits["train"], step_sequences=step_tokens // settings.seq_len)
    elif settings.total_batch_tokens or settings.layout:
        raise RunError("--order nanochat fixes layout and batch: it goes without --layout and --total-batch-tokens")
    else:
        ranks = {"num_ranks": num_ranks, "device_batch_size": settings.device_batch_size}
        plan = make_nanochat_plan(build.splits["train"], **shared, **ranks)
    if settings.eval_every is None:
        return plan, None
    if "val" not in build.splits:
        raise RunError(f"{settings.data}: --eval-every needs a val split, and this build has none")
    return plan, plan_split(build.splits["val"], step_sequences=1)


def _require_same_tokenizer(path: Path, build: Build) -> None:
    """Raise RunError unless the checkpoint's tokenizer and the build's give the same ids for the canary texts."""
    from chatdata.cli.command import tokenizer_of

    theirs = tokenizer_of(path / "tokenizer", chat_format=build.manifest["chat_format"])
    ours = build.manifest["tokenizer"]
    if (theirs.vocab_size, theirs.canary_sha256) != (ours["vocab_size"], ours["canary_sha256"]):
        trained = f"{path} was trained with another tokenizer ({theirs.vocab_size:,} tokens)"
        built = f"{build.path} was built with ({ours['vocab_size']:,}); build with --tokenizer {path / 'tokenizer'}"
        raise RunError(f"{trained} than {built}")
