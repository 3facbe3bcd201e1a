"""The command line. Heavy imports are inside the functions that need them, so that `--help` is fast."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from chatdata.cli.command import FILE, expect_option, program, run_command, tell, tokenizer_of
from chatdata.disk import check_file, check_free
from chatdata.errors import UsageError
from chatdata.progress import say, say_json, shown_progress
from chattrain.run.settings import RunSettings, settings_options

cli = program("chattrain", "Train small chat models on chatdata builds: streamed by stage policy, exact, resumable.")


def run_argument(command: Any) -> Any:
    """Adds RUN, --data and --json, which all commands about a run have."""
    for add in (
        click.option("--json", "as_json", is_flag=True, help="Print as JSON."),
        click.option("--data", metavar="BUILD", help="The build, if it has moved: its folder, or an address."),
        click.argument("run_folder", metavar="RUN", type=FILE),
    ):
        command = add(command)
    return command


@cli.command()
@settings_options
@expect_option
@click.option("--dry-run", is_flag=True, help="Print plan, parameters, memory and time of one real step, then stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def run(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train on a build. SIGTERM and SIGINT save a checkpoint and exit 0.

    Examples:
      chattrain run --data out/demo-mid --init random:d4 --seq-len 256 --device-batch-size 16 --out runs/mid
      chattrain run --data out/demo-sft --init runs/mid --seq-len 768 --out runs/sft
      chattrain run --data hf://datasets/OWNER/NAME --init random:d20 --out runs/mid --expect 0123456789ab
      torchrun --nproc-per-node 8 -m chattrain run --data out/mid --init random:d20 --out runs/mid --resume
    """
    from chatdata.shards.read import open_build
    from chattrain import loop
    from chattrain.checkpoint import checkpoint_name
    from chattrain.run.start import StopRequest, join_ranks, memory_limited, prepare
    from chattrain.run.telemetry import RunRecord, device_name, draw_curve, lock_run, write_run

    build = open_build(options["data"], options.pop("expect"))
    options["out"] = out = options["out"] or Path("runs") / (options["stage"] or build.manifest["stage"])
    settings = RunSettings(**options)
    data = str(settings.data if "://" in str(settings.data) else Path(settings.data).resolve())
    with join_ranks(settings.device) as ranks, memory_limited(settings):
        is_first = ranks.is_first  # it alone writes and prints
        if dry_run:
            numbers = loop.dry_run(prepare(settings, build, ranks), settings.device_batch_size)
            if is_first:
                say_json(numbers) if as_json else _echo_dry_run(numbers)
            return
        with lock_run(out, settings.resume) if is_first else nullcontext(), StopRequest().listening() as stop:
            ready = prepare(settings, build, ranks)
            num_steps = ready.recipe.num_steps
            if is_first:
                machine = {"device": ranks.device.type, "name": device_name(ranks.device)}
                machine |= {"num_ranks": ranks.num_ranks, "device_batch_size": settings.device_batch_size}
                record = RunRecord(
                    data, ready.plan_record, ready.recipe, save_every=settings.save_every, machine=machine
                )
                write_run(out, record)
            if is_first and not as_json:
                _echo_plan(ready.plan.counts(), num_steps, ready.recipe.stage)
                if settings.resume:
                    start = ready.start
                    say(f"resuming after step {start}" if start else "nothing to resume: from the start")
            done = loop.train(ready, settings, stop)
    if not is_first:
        return
    curve = draw_curve(out) if done else None
    checkpoint = str(out / "checkpoints" / checkpoint_name(done))
    lines = [f"{done} of {num_steps} steps done; checkpoint {checkpoint}"]
    lines += ["to continue: the same command with --resume"] if done < num_steps else []
    if done:
        lines.append(f"loss curve: {curve}" if curve else "no loss curve: `uv sync --extra plot` installs matplotlib")
    tell({"out": str(out), "steps": done, "of": num_steps, "checkpoint": checkpoint}, lines, as_json)


def _echo_dry_run(numbers: dict[str, Any]) -> None:
    memory, step = numbers["memory_bytes"], numbers["step"]
    _echo_plan(numbers["plan"], numbers["steps"], numbers["stage"])
    say(f"model: {numbers['parameters']:,} parameters, {numbers['flops_per_token']:,} FLOPs per token")
    say("memory: " + ", ".join(f"{name.replace('_', ' ')} {size / 2**20:,.0f} MiB" for name, size in memory.items()))
    say(f"one step on {numbers['device']}: {step['duration_s']} s, {step['tokens_per_s']:,} tokens/s")
    say(f"the run: about {numbers['estimated_duration_s']:,} s")


def _echo_plan(counts: dict[str, Any], num_steps: int, stage: str) -> None:
    epoch = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in ("steps", "sequences", "input_tokens"))
    targets = f"{counts['targets']:,} targets of {counts['documents']:,} documents"
    say(f"stage {stage}: {num_steps:,} steps; an epoch: {epoch}, {targets}")
    left = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts["left_out"].items() if value)
    say(f"left out of an epoch: {left or 'nothing'}")


@cli.command()
@click.option("--step", type=int, required=True, help="The first step is 0.")
@run_argument
def trace(run_folder: Path, step: int, data: str | None, as_json: bool) -> None:
    """Show which documents were in a step of a run, what each cost, and their text.

    Examples:
      chattrain trace runs/mid --step 120
      chattrain trace runs/sft --step 7 --json
    """
    from chattrain.run.trace import trace_step

    found = trace_step(run_folder, step, data)
    if as_json:
        say_json(found)
        return
    if found["log"]:
        say("  ".join(f"{key} {found['log'][key]}" for key in ("loss", "tokens", "targets", "batch")))
    say(f"{'sequence':>8}  {'doc':>8}  {'tokens':>13}  {'row':>8}  {'loss':>10}  {'targets':>8}  name")
    for read in found["documents"]:
        tokens = f"{read['start']}…{read['stop']}"
        loss = f"{read['loss']:>10.3f}  {read['targets']:>8}" if "loss" in read else f"{'not recorded':>20}"
        say(f"{read['sequence']:>8}  {read['doc']:>8}  {tokens:>13}  {read['row']:>8}  {loss}  {read['name']}")
        say(f"{'':8}  {read['text']}")


@cli.command()
@click.option("--out", type=FILE, help="Parquet file to write: step, doc, task, name, row, loss, targets.")
@run_argument
def losses(run_folder: Path, out: Path | None, data: str | None, as_json: bool) -> None:
    """Show what each task cost over time and the hardest documents; or write all recorded losses.

    Examples:
      chattrain losses runs/sft
      chattrain losses runs/sft --out losses.parquet
    """
    import pyarrow.parquet as pq

    from chatdata.look.console import table
    from chattrain.errors import RunError
    from chattrain.run.losses import THIRDS, contradictions, loss_table, recorded_steps, sum_losses, summarise
    from chattrain.run.telemetry import read_log, read_run
    from chattrain.run.trace import plan_again

    if out:
        check_file(out, b"PAR1", "Parquet")
    plan = plan_again(read_run(run_folder), data)
    num_recorded, log = len(recorded_steps(run_folder)), read_log(run_folder)  # in this order, and the record last
    sums = sum_losses(run_folder, plan)
    if wrong := contradictions(log, sums, num_recorded):
        raise RunError(f"{run_folder}: {wrong[0]}")
    if out:
        record = loss_table(run_folder, plan)
        pq.write_table(record, out, compression="zstd")
        tell({"out": str(out), "losses": len(record)}, [f"{out}: {len(record):,} losses"], as_json)
        return
    found = summarise(sums)
    if as_json:
        say_json(found)
        return
    (first, last), left_out = found["steps"], f"{found['not_finite']:,} losses that are not finite left out"
    title = f"nats per target in each third of steps {first:,} … {last:,}, {left_out}"
    thirds = {name: ["–" if x is None else f"{x:.4f}" for x in of.values()] for name, of in found["tasks"].items()}
    table(title, ("task", *THIRDS), [[name, *row] for name, row in thirds.items()])
    rows = [[f"{v:.4f}" if isinstance(v, float) else v for v in each.values()] for each in found["hardest"]]
    table("hardest documents: most above the mean of their steps", [*found["hardest"][0]] if rows else [], rows)


@cli.command()
@click.option("--out", type=FILE, help="File to write (default: RUN-report.html).")
@run_argument
def report(run_folder: Path, out: Path | None, data: str | None, as_json: bool) -> None:
    """Write an HTML page that shows how a run went.

    It shows losses in all and per task, validations, speed, steps whose loss jumped with the documents behind them, and
    the losses of single tokens, replayed from kept checkpoints. Needs Altair (`uv sync --extra report`).

    Examples:
      chattrain report runs/mid
      chattrain report runs/sft --out sft.html
    """
    from chatdata.look.console import megabytes
    from chattrain.report.page import write_report

    with shown_progress(quiet=as_json) as progress:
        facts = write_report(run_folder, out, data, progress)
    tell(facts, [*facts["missing"], f"{facts['out']}: {megabytes(facts['bytes'])}"], as_json)


@cli.command()
@click.argument("checkpoint", type=FILE)
@click.option("--out", type=FILE, required=True, help="Folder to write.")
@click.option("--verify", is_flag=True, help="Load the export with transformers and compare logits and config.")
def export(checkpoint: Path, out: Path, verify: bool) -> None:
    """Write a checkpoint (or a run's last one) as transformers' NanoChat.

    Examples:
      chattrain export runs/sft --out exported --verify
    """
    from chatdata.render.format import NANOCHAT
    from chattrain.checkpoint import read_checkpoint
    from chattrain.nanochat.export import export_transformers

    found = read_checkpoint(checkpoint)
    tokenizer = found.path / "tokenizer"
    special_ids = found.native_tokenizer().special_ids
    bos, end = special_ids[NANOCHAT.bos], special_ids[NANOCHAT.assistant_end]
    export_transformers(found.weights(), found.config, out, bos, end, tokenizer, verify)
    say(f"{out}: {found.path.name} as NanoChat{', verified against transformers' if verify else ''}")


@cli.command()
@click.argument("folder", type=FILE)
@click.option("--tokenizer", type=FILE, required=True, help="The tokenizer that the model was trained with.")
@click.option("--out", type=FILE, required=True, help="Run folder to write, for --init.")
def import_nanochat(folder: Path, tokenizer: Path, out: Path) -> None:
    """Convert nanochat's model_<step>.pt and meta_<step>.json (December 2025) to a checkpoint.

    Examples:
      chattrain import-nanochat base_checkpoints/d20 --tokenizer tokenizer.pkl --out runs/d20-base
    """
    from chatdata.tokenizer.files import save_tokenizer
    from chattrain.checkpoint import require_finite, save_checkpoint
    from chattrain.nanochat.checkpoints import import_nanochat as read
    from chattrain.run.telemetry import lock_run

    check_free(out)
    weights, config, step = read(folder)
    loaded = tokenizer_of(tokenizer)
    if loaded.vocab_size != config.vocab_size:
        sizes = f"{tokenizer} has {loaded.vocab_size:,} tokens, the model {config.vocab_size:,}"
        raise UsageError(f"{sizes}; give the tokenizer that the model was trained with")
    require_finite(weights, step)
    with lock_run(out), TemporaryDirectory(dir=out) as folder_of_tokenizer:
        save_tokenizer(loaded, Path(folder_of_tokenizer))
        path = save_checkpoint(out / "checkpoints", step, config, weights, {}, {}, {}, Path(folder_of_tokenizer))
    say(f"{path}: step {step}, {config.n_layer} layers, width {config.n_embd}")


main = partial(run_command, cli, "chattrain", "interrupted; --resume continues from the last checkpoint", only="run")
