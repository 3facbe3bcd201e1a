"""The command line. Heavy imports stand inside the functions that need them: `--help` answers at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatdata.cli.command import MaskPolicyChoice, examples, run_command
from chatdata.disk import naming
from chattrain.errors import RunError, UsageError

if TYPE_CHECKING:
    from chattrain.run.ranks import Ranks
    from chattrain.run.settings import Settings

PATH = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)


def main() -> None:
    run_command(cli, "chattrain", "interrupted; --resume continues from the last checkpoint", only="run")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="chattrain")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def cli(debug: bool) -> None:
    """Train small chat models on builds of chatdata: streamed by stage policy, exact, resumable."""


@cli.command(
    epilog=examples(
        "chattrain run --data out/demo-mid --init random:d4 --seq-len 256 --device-batch-size 16 --out runs/mid",
        "chattrain run --data out/demo-sft --init runs/mid --seq-len 768 --out runs/sft",
        "torchrun --nproc-per-node 8 -m chattrain run --data out/mid --init random:d20 --out runs/mid --resume",
    )
)
@click.option("--data", type=PATH, required=True, help="A build of chatdata.")
@click.option("--stage", type=click.Choice(["base", "mid", "sft"]), help="Stage policy (default: the build's stage).")
@click.option(
    "--init",
    required=True,
    metavar="random:dN|CHECKPOINT",
    help="Fresh weights (also random:LAYERSxWIDTHxHEADS), a checkpoint or a run.",
)
@click.option("--out", type=PATH, help="Run folder (default: runs/<stage>).")
@click.option("--seq-len", type=POSITIVE, default=2048, show_default=True, help="T, positions of a sequence.")
@click.option("--device-batch-size", type=POSITIVE, default=8, show_default=True, help="B, sequences at a time.")
@click.option("--total-batch-tokens", type=POSITIVE, help="Positions of a step (default: B · T · ranks).")
@click.option("--steps", type=POSITIVE, help="Length of the schedule (default: --epochs times the plan).")
@click.option("--epochs", type=POSITIVE, default=1, show_default=True, help="How often the plan is gone through.")
@click.option(
    "--stop-at", type=click.IntRange(min=0), help="End a longer schedule after this many steps (0: save the start)."
)
@click.option(
    "--lr-scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Every learning rate times this.",
)
@click.option("--save-every", type=POSITIVE, help="Steps between checkpoints (always one at the end).")
@click.option("--keep-last", type=POSITIVE, default=2, show_default=True, help="Checkpoints kept.")
@click.option("--eval-every", type=POSITIVE, help="Steps between validations: bits per byte, in total and per task.")
@click.option("--layout", type=click.Choice(["stream", "pack", "pad"]), help="In place of the stage's own.")
@click.option(
    "--mask",
    type=MaskPolicyChoice(),
    help="In place of the stage's own.",
)
@click.option(
    "--order",
    type=click.Choice(["plan", "nanochat"]),
    default="plan",
    show_default=True,
    help="Ours, or the batches that nanochat's loaders make.",
)
@click.option(
    "--long",
    type=click.Choice(["error", "drop", "truncate"]),
    default="error",
    show_default=True,
    help="Documents of more than T + 1 tokens in pack and pad.",
)
@click.option(
    "--non-finite",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="A step whose loss or gradient is not finite.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), help="Default: cuda where there is one.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Default: bfloat16 on cuda, else float32.")
@click.option("--compile/--no-compile", default=None, help="torch.compile (default: on cuda).")
@click.option("--recompute", is_flag=True, help="Activation checkpointing: less memory, a third more work.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of fresh weights and of packed order.")
@click.option("--resume", is_flag=True, help="Continue from OUT's last checkpoint (from the start if it has none).")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard files (chattrain[tensorboard]).")
@click.option("--dry-run", is_flag=True, help="Plan, parameters, memory and time from one real step; then stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def run(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train on a build. SIGTERM and SIGINT save and exit 0."""
    from chatdata.shards.manifest import read_manifest
    from chattrain.run.ranks import join_ranks
    from chattrain.run.settings import Settings

    stage = options["stage"] or read_manifest(options["data"])["stage"]
    options["out"] = options["out"] or Path("runs") / stage
    settings = Settings(**options)
    with join_ranks(settings.device) as ranks:
        if dry_run:
            _dry_run(settings, ranks, as_json)
        else:
            _train(settings, ranks, as_json)


def _dry_run(settings: Settings, ranks: Ranks, as_json: bool) -> None:
    from chattrain.loop import prepare
    from chattrain.run.dry_run import dry_run

    numbers = dry_run(prepare(settings, ranks))
    if not ranks.is_first:
        return
    if as_json:
        click.echo(json.dumps(numbers))
        return
    memory = numbers["memory_bytes"]
    _echo_plan(numbers["plan"], numbers["steps"], numbers["stage"])
    click.echo(f"model: {numbers['parameters']:,} parameters, {numbers['flops_per_token']:,} FLOPs a token")
    click.echo(
        f"memory: weights and gradients {memory['weights_and_gradients'] / 2**20:,.0f} MiB, optimizer "
        f"{memory['optimizer'] / 2**20:,.0f} MiB, peak of one step {memory['peak_of_one_step'] / 2**20:,.0f} MiB"
    )
    step = numbers["step"]
    click.echo(f"one step on {numbers['device']}: {step['duration_s']} s, {step['tokens_per_s']:,} tokens/s")
    click.echo(f"the run: about {numbers['estimated_duration_s']:,} s")


def _train(settings: Settings, ranks: Ranks, as_json: bool) -> None:
    from chattrain.checkpoint import last_checkpoint
    from chattrain.loop import prepare, train
    from chattrain.run.ranks import StopRequest
    from chattrain.run.telemetry import draw_curve
    from chattrain.run.trace import write_run

    out = settings.out
    if out.exists() and any(out.iterdir()) and not settings.resume:
        raise RunError(f"{out}: already exists; choose another --out, or --resume to continue the run")
    with StopRequest().listening() as stop, naming(out):
        job = prepare(settings, ranks)
        if ranks.is_first:
            out.mkdir(parents=True, exist_ok=True)
            write_run(out, settings.data, job.plan, job.recipe)
            if not as_json:
                _echo_plan(job.plan.counts(), job.num_steps, job.stage.name)
                if settings.resume:
                    click.echo(f"resuming after step {job.start}" if job.start else "nothing to resume: from the start")
        ranks.wait()
        done = train(job, stop)
    if not ranks.is_first:
        return
    curve = draw_curve(out) if done else None
    last = last_checkpoint(out)
    where = str(last.path) if last else None
    if as_json:
        click.echo(json.dumps({"out": str(out), "steps": done, "of": job.num_steps, "checkpoint": where}))
        return
    click.echo(f"{done} of {job.num_steps} steps done; checkpoint {where}")
    if done < job.num_steps:
        click.echo("to go on: the same command with --resume")
    if done:
        click.echo(f"loss curve: {curve}" if curve else "no loss curve: pip install 'chattrain[plot]'")


def _echo_plan(counts: dict[str, Any], num_steps: int, stage: str) -> None:
    click.echo(
        f"stage {stage}: {num_steps:,} steps; an epoch: {counts['steps']:,} steps, {counts['sequences']:,} sequences, "
        f"{counts['input_tokens']:,} input tokens, {counts['targets']:,} targets of {counts['documents']:,} documents"
    )
    left = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts["left_out"].items() if value)
    click.echo(f"left out of an epoch: {left or 'nothing'}")


@cli.command(epilog=examples("chattrain trace runs/mid --step 120", "chattrain trace runs/sft --step 7 --json"))
@click.argument("run_folder", metavar="RUN", type=PATH)
@click.option("--step", type=int, required=True, help="From 0.")
@click.option("--data", type=PATH, help="The build, if it has moved.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def trace(run_folder: Path, step: int, data: Path | None, as_json: bool) -> None:
    """Which documents were in a step of a run."""
    from chattrain.run.trace import trace_step

    found = trace_step(run_folder, step, data)
    if as_json:
        click.echo(json.dumps(found))
        return
    if found["log"]:
        click.echo("  ".join(f"{key} {found['log'][key]}" for key in ("loss", "tokens", "targets", "batch")))
    click.echo(f"{'sequence':>8}  {'doc':>8}  {'tokens':>13}  {'row':>8}  task")
    for document in found["documents"]:
        tokens = f"{document['start']}…{document['stop']}"
        click.echo(
            f"{document['sequence']:>8}  {document['doc']:>8}  {tokens:>13}  {document['row']:>8}  {document['task']}"
        )


@cli.command(epilog=examples("chattrain export runs/sft --out exported --verify"))
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--verify", is_flag=True, help="Load it with transformers and compare logits and config.")
def export(checkpoint: Path, out: Path, verify: bool) -> None:
    """Write a checkpoint (or a run's last one) as transformers' NanoChat."""
    from chatdata.render.format import NANOCHAT
    from chatdata.tokenizer.files import load_tokenizer
    from chattrain.checkpoint import read_checkpoint
    from chattrain.nanochat.export import export_transformers

    found = read_checkpoint(checkpoint)
    tokenizer = found.path / "tokenizer"
    special_ids = load_tokenizer(tokenizer).special_ids
    bos, end = special_ids[NANOCHAT.bos], special_ids[NANOCHAT.assistant_end]
    export_transformers(found.weights(), found.config, out, bos, end, tokenizer, verify)
    click.echo(f"{out}: {found.path.name} as NanoChat{', verified against transformers' if verify else ''}")


@cli.command(
    name="import-nanochat",
    epilog=examples("chattrain import-nanochat base_checkpoints/d20 --tokenizer tokenizer.pkl --out runs/d20-base"),
)
@click.argument("folder", type=PATH)
@click.option("--tokenizer", type=PATH, required=True, help="The tokenizer it was trained with.")
@click.option("--out", type=PATH, required=True, help="Run folder to write; --init takes it.")
def import_nanochat(folder: Path, tokenizer: Path, out: Path) -> None:
    """Make a checkpoint of nanochat's model_<step>.pt and meta_<step>.json (December 2025)."""
    from chatdata.tokenizer.files import load_tokenizer, save_tokenizer
    from chattrain.checkpoint import save_checkpoint
    from chattrain.nanochat.checkpoints import import_nanochat as read

    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: already exists; choose another --out")
    weights, config, step = read(folder)
    loaded = load_tokenizer(tokenizer)
    if loaded.vocab_size != config.vocab_size:
        raise UsageError(
            f"{tokenizer} has {loaded.vocab_size:,} entries, the model {config.vocab_size:,}; "
            "give the tokenizer it was trained with"
        )
    folder_of_tokenizer = out / ".tokenizer"
    try:
        save_tokenizer(loaded, folder_of_tokenizer)
        path = save_checkpoint(out / "checkpoints", step, config, weights, {}, {}, {}, folder_of_tokenizer)
    finally:
        shutil.rmtree(folder_of_tokenizer, ignore_errors=True)
    click.echo(f"{path}: step {step}, {config.n_layer} layers, width {config.n_embd}")
