"""A run in a tracker, next to log.jsonl: trackio, wandb or TensorBoard. All of them work without a network.

A tracker gets the numbers of every line of the log, under the log's names: train/loss, val/tasks/NAME.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

ID_NAME, PROJECT = ".track", "chattrain"


@contextmanager
def open_tracker(tracker: str, out: Path, run: dict, past: list[dict]) -> Iterator[Callable[[dict], None]]:
    """Yield a function that sends a line of log.jsonl to `tracker`.

    run: run.json, shown as the run's configuration. past: the lines that a resumed run keeps. They are sent again, so
    that what a killed run had sent after its last checkpoint, or not yet, is in the tracker once.
    """
    identity = out / ID_NAME
    if not identity.is_file():
        identity.write_text(os.urandom(4).hex())
    name = f"{out.resolve().name}-{identity.read_text()}"
    with redirect_stdout(sys.stderr), ExitStack() as closing:  # what trackers print is no part of `--json`
        if tracker == "trackio":
            import trackio
            from trackio.sqlite_storage import SQLiteStorage

            SQLiteStorage.delete_run(PROJECT, name)
            closing.callback(trackio.finish)
            log = trackio.init(PROJECT, name, config=run, resume="allow").log
        elif tracker == "wandb":
            import wandb

            where = {"project": os.getenv("WANDB_PROJECT", PROJECT), "mode": os.getenv("WANDB_MODE", "offline")}
            options = {"id": name[-8:], "resume": "allow", "settings": wandb.Settings(console="off")}
            opened = closing.enter_context(wandb.init(**where, **options, dir=out, name=name, config=run))
            first, log = opened.step, opened.log
            past = [line for line in past if line["step"] >= first]  # a server has the others, and takes none again
        else:
            from torch.utils.tensorboard import SummaryWriter

            # what earlier files hold from step 0 on is void
            writer = closing.enter_context(SummaryWriter(str(out / "tensorboard"), purge_step=0))

            def log(numbers: dict[str, float], step: int) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

        def send(line: dict) -> None:
            values = line | {f"tasks/{task}": bits for task, bits in line.get("tasks", {}).items()}
            log({f"{line['kind']}/{key}": v for key, v in values.items() if isinstance(v, int | float)}, line["step"])

        for line in past:
            send(line)
        yield send
