"""The settings of a run: the options of `chattrain run`, each with its type, default and help."""

# ruff: noqa: RUF009 - `setting` makes fields
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, MaskPolicyChoice

POSITIVE = click.IntRange(min=1)
LONG, NON_FINITE = ("error", "drop", "truncate"), ("raise", "skip")


def setting(text: str, type: Any = None, default: Any = None, **more: Any) -> Any:
    """A field with what `click.option` takes; `more` may name its flag. Without a default it must be given."""
    given = {"required": True} if default is MISSING else {"default": default}
    return field(default=default, metadata={"help": text, "type": type, **given, **more})


def choice(text: str, values: tuple[str, ...], default: str | None = None) -> Any:
    return setting(text, click.Choice(values), default)


required = partial(setting, default=MISSING)
switch = partial(setting, default=False, is_flag=True)


@dataclass(frozen=True)
class RunSettings:
    """None: the default of the stage or the device."""

    data: str | Path = required("A chatdata build: its folder, or an address (hf://, s3://, …).", metavar="BUILD")
    out: Path = setting("Run folder (default: runs/<stage>).", FILE, MISSING, required=False)
    init: str = required(
        "Fresh weights (also random:LAYERSxWIDTHxHEADS), a checkpoint or a run.", metavar="random:dN|CHECKPOINT"
    )
    stage: str | None = choice("Stage policy (default: the build's stage).", ("base", "mid", "sft"))
    seq_len: int = setting("T, positions of a sequence.", POSITIVE, 2048)
    device_batch_size: int = setting("B, sequences at a time.", POSITIVE, 8)
    total_batch_tokens: int | None = setting("Positions of a step (default: B · T · ranks).", POSITIVE)
    steps: int | None = setting("Steps of the whole schedule (default: --epochs times the plan).", POSITIVE)
    epochs: int = setting("Passes over the plan.", POSITIVE, 1)
    stop_at: int | None = setting("End a longer schedule after this many steps (0: save the start).", click.IntRange(0))
    lr_scale: float = setting("Multiply every learning rate.", click.FloatRange(min=0, min_open=True), 1.0)
    save_every: int | None = setting("Steps between checkpoints (there is always one at the end).", POSITIVE)
    keep_last: int = setting("Checkpoints to keep.", POSITIVE, 2)
    eval_every: int | None = setting("Steps between validations: bits per byte, in total and per task.", POSITIVE)
    layout: str | None = choice("Default: the stage's.", ("stream", "pack", "pad"))
    mask: str | None = setting("Which tokens are targets (default: the stage's policy).", MaskPolicyChoice())
    order: str = choice("Our plan, or the batches that nanochat's loaders make.", ("plan", "nanochat"), "plan")
    long: str = choice("What to do with documents of more than T + 1 tokens (pack and pad).", LONG, "error")
    non_finite: str = choice("What to do if a step's loss or gradient is not finite.", NON_FINITE, "raise")
    device: str | None = choice("Default: cuda if available.", ("cpu", "cuda", "mps"))
    dtype: str | None = choice("Default: bfloat16 on cuda, else float32.", ("float32", "bfloat16"))
    compile: bool | None = setting("torch.compile (default: on cuda).", flag="--compile/--no-compile")
    recompute: bool = switch("Activation checkpointing: less memory, a third more compute.")
    seed: int = setting("For fresh weights and the order of sequences.", int, 42)
    resume: bool = switch("Continue from OUT's last checkpoint (from the start if it has none).")
    track: str | None = choice("Also log to a tracker (`uv sync --extra NAME`).", ("trackio", "wandb", "tensorboard"))


def settings_options(command: Any) -> Any:
    """The options of `chattrain run`: one for each field of RunSettings."""
    for each in reversed(fields(RunSettings)):
        options = {"flag": f"--{each.name.replace('_', '-')}", **each.metadata}
        command = click.option(options.pop("flag"), **options)(command)
    return command
