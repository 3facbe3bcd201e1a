"""`chatdata build` against what people do without it, side by side in one run: tokens per CPU-second.

    uv run python benchmarks/build.py --shared ../shared/data --runs 5

Sides, each in a process of its own (nothing is warm), interleaved; builds start with an empty cache:

    build ...            the command, by workers and encoder; warm: the same again, its units being in the cache
    bare loop            tiktoken text by text over conversations in memory: ids and mask as lists, nothing checked
    datasets loop        nanochat's path: a row through `datasets`, shuffled; its conversation; then the bare loop
    apply_chat_template  transformers with the build's tokenizer folder and assistant mask, under `datasets.map`
    encoder alone        the encoder that `auto` picks over texts in memory, in batches as the build makes them

All render the same distinct rows; repeats that a recipe asks for (epochs) are rendered by none and counted for none.
Fixed cost is taken off. Of a build it is the same command on a recipe of one conversation for each worker and one row
of each word list (imports, tokenizer, encoder and its proof, word lists, workers' start, tokenizer saved); of the
others it is what they did before their loop began. CPU-seconds are user + system of the process and all it started:
this process adopts orphans (PR_SET_CHILD_SUBREAPER), so the fork server and its workers are waited for and counted.
A round of a few rows goes first, uncounted: it leaves compiled bytecode, as every installation has, and read files.
A ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatdata.build import Plan
    from chatdata.sources import Source

RECIPE = Path(__file__).parent.parent / "tests" / "chatdata" / "recipes" / "shared_mid.toml"
BUILDS = {  # side → options of the command; "warm" follows "build" and finds its units
    "build": ["--workers", "1"],
    "build warm": ["--workers", "1"],
    "build 2 workers": ["--workers", "2"],
    "build fastokens": ["--workers", "1", "--encoder", "fastokens"],
    "build tiktoken": ["--workers", "1", "--encoder", "tiktoken"],
}
PR_SET_CHILD_SUBREAPER = 36
PAD_BYTES = 8 << 20  # of a row of the fixed recipe: a second worker is started for the second 8 MiB only


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Options that say what is built."""
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="default: shared_mid.toml of the tests")
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path("../shared/data"),
        help="folder with hub/, tokenizer/tokenizer.pkl, words_alpha.txt, identity_conversations.jsonl",
    )
    parser.add_argument(
        "--limit", type=int, help="at most this many rows per entry, to try it out; too few for 2 workers"
    )


def build_command(arguments: argparse.Namespace, out: Path, *more: str, recipe: Path | None = None) -> list[str]:
    """The command that builds `--recipe`, or `recipe`, which has no identity entry."""
    shared: Path = arguments.shared
    command = [sys.executable, "-c", "from chatdata.cli import main; main()", "build", "--json", "--out", str(out)]
    command += ["--recipe", str(recipe or arguments.recipe), "--data-dir", str(shared / "hub")]
    command += ["--tokenizer", str(shared / "tokenizer" / "tokenizer.pkl")]
    text = (recipe or arguments.recipe).read_text()
    for task, option, name in (
        ("spelling", "--words", "words_alpha.txt"),
        ("identity", "--identity", "identity_conversations.jsonl"),
    ):
        command += [option, str(shared / name)] if task in text else []
    command += ["--limit", str(arguments.limit)] if arguments.limit and not recipe else []
    return [*command, *more]


# sides that run in this file, each in a process of its own


def make_plan(arguments: argparse.Namespace) -> Plan:
    from chatdata import build
    from chatdata.recipe import load_recipe
    from chatdata.sources import Locations
    from chatdata.tasks import load_tasks
    from chatdata.tokenizer import load_tokenizer

    shared, tasks = arguments.shared, load_tasks()
    recipe = load_recipe(str(arguments.recipe), tasks)
    if recipe.max_tokens is not None or recipe.zero_supervised != "keep":
        sys.exit(f"{arguments.recipe}: the other sides cut and drop nothing; give a recipe that keeps whole documents")
    locations = Locations(
        recipe.folder, shared / "hub", shared / "identity_conversations.jsonl", str(shared / "words_alpha.txt")
    )
    tokenizer = load_tokenizer(shared / "tokenizer" / "tokenizer.pkl")
    return build.make_plan(recipe, tasks, tokenizer, locations, arguments.limit)


def distinct_positions(plan: Plan) -> list[tuple[Source, int]]:
    """(source, position) of every row of the mixture in its order, once."""
    from chatdata.mixture import mixture_order

    found: dict[tuple[int, int], tuple[Source, int]] = {}
    for split, entries in plan.splits.items():
        pairs = [(planned.source, position) for planned in entries for position in planned.positions]
        lengths = [len(planned.positions) for planned in entries]
        order = mixture_order(lengths, plan.recipe.seed, plan.recipe.shuffle[split])
        for source, position in (pairs[i] for i in order.tolist()):
            found.setdefault((id(source), position), (source, position))
    return list(found.values())


def wanted_rows(plan: Plan) -> Iterator[tuple[Source, Any]]:
    """Every source with bool [num_rows]: which of its rows the mixture holds."""
    import numpy as np

    from chatdata.mixture import permutation

    for source in plan.sources:
        ranges = [p.positions for entries in plan.splits.values() for p in entries if p.source is source]
        num_rows = max(positions.stop for positions in ranges) if source.make_row else source.num_rows
        row_at = permutation(num_rows) if source.task.permuted else np.arange(num_rows)
        wanted = np.zeros(num_rows, dtype=bool)
        for positions in ranges:
            wanted[row_at[positions.start : positions.stop]] = True
        yield source, wanted


def conversations_in_memory(plan: Plan) -> list[list[dict[str, Any]]]:
    from chatdata.conversation import parse_conversation

    found = []
    for source, wanted in wanted_rows(plan):
        for _, row in source.read(wanted):
            found.append(parse_conversation(source.task.to_conversation(row))["messages"])
    return found


def plain_render(plan: Plan) -> Callable[[Any], tuple[list[int], list[int]]]:
    """messages → (ids, mask): the loop everyone writes first (DESIGN 4), text by text, nothing checked."""
    encode, special = plan.tokenizer.encoding.encode_ordinary, plan.tokenizer.special_ids
    bos, user, user_end = special["<|bos|>"], special["<|user_start|>"], special["<|user_end|>"]
    assistant, assistant_end = special["<|assistant_start|>"], special["<|assistant_end|>"]
    around = {
        "python": (special["<|python_start|>"], special["<|python_end|>"], 1),
        "python_output": (special["<|output_start|>"], special["<|output_end|>"], 0),
    }

    def render(messages: Any) -> tuple[list[int], list[int]]:
        ids, mask, lead = [bos], [0], ""

        def add(tokens: list[int], supervised: int) -> None:
            ids.extend(tokens)
            mask.extend([supervised] * len(tokens))

        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                lead = content + "\n\n"
            elif message["role"] == "user":
                add([user, *encode(lead + content), user_end], 0)
                lead = ""
            else:
                add([assistant], 0)
                if isinstance(content, str):
                    add(encode(content), 1)
                else:
                    for part in content:
                        if part["type"] == "text":
                            add(encode(part["text"]), 1)
                        else:
                            opening, closing, supervised = around[part["type"]]
                            add([opening, *encode(part["text"]), closing], supervised)
                add([assistant_end], 1)
        return ids, mask

    return render


def bare_loop(arguments: argparse.Namespace, folder: Path) -> Callable[[], int]:
    plan = make_plan(arguments)
    conversations, render = conversations_in_memory(plan), plain_render(plan)
    return lambda: sum(len(render(messages)[0]) for messages in conversations)


def datasets_loop(arguments: argparse.Namespace, folder: Path) -> Callable[[], int]:
    from datasets import Dataset

    plan = make_plan(arguments)
    rows: dict[int, Any] = {}
    for source in plan.sources:
        if source.make_row:
            rows[id(source)] = source.make_row
            continue
        paths = [str(file.path) for file in source.files]
        if paths[0].endswith(".jsonl"):  # in memory there too: tasks/customjson.py
            lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
            rows[id(source)] = lines.__getitem__
            continue
        dataset = Dataset.from_parquet(paths, cache_dir=str(folder))
        rows[id(source)] = (dataset.shuffle(seed=42) if source.task.permuted else dataset).__getitem__
    positions, render = distinct_positions(plan), plain_render(plan)

    def work() -> int:
        num_tokens = 0
        for source, position in positions:
            conversation = source.task.to_conversation(rows[id(source)](position))
            ids, _ = render(conversation if isinstance(conversation, list) else conversation["messages"])
            num_tokens += len(ids)
        return num_tokens

    return work


def chat_template(arguments: argparse.Namespace, folder: Path) -> Callable[[], int]:
    """Every --template-share-th conversation. Messages travel as JSON: in one Arrow column contents have one type."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer

    from chatdata.tokenizer_files import save_tokenizer

    plan = make_plan(arguments)
    save_tokenizer(plan.tokenizer, folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    conversations, render = conversations_in_memory(plan)[:: arguments.template_share], plain_render(plan)

    def apply(messages: Any) -> Any:
        return tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )

    for messages in conversations[:: max(1, len(conversations) // 100)]:  # or it would be another task
        found = apply(messages)
        assert (found["input_ids"], found["assistant_masks"]) == render(messages), messages
    dataset = Dataset.from_dict({"messages": [json.dumps(messages) for messages in conversations]})

    def convert(row: dict[str, str]) -> dict[str, list[int]]:
        found = apply(json.loads(row["messages"]))
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    def work() -> int:
        mapped = dataset.map(convert, remove_columns=["messages"], cache_file_name=str(folder / "mapped.arrow"))
        column = mapped.data.column("input_ids")
        return sum(len(chunk.values) for chunk in column.chunks)

    return work


def encoder_alone(arguments: argparse.Namespace, folder: Path) -> Callable[[], int]:
    """Ids of texts only: delimiters are not among its tokens."""
    from chatdata.encoders import find_encoder
    from chatdata.units import MAX_CHARS, pieces_of_rows

    plan = make_plan(arguments)
    encode = find_encoder("auto", plan.tokenizer).encode_batch
    batches = [
        part.texts
        for source, wanted in wanted_rows(plan)
        for rows, raw in source.read_batches(0, wanted)
        for part in pieces_of_rows(source, rows, raw).split(MAX_CHARS)
    ]
    return lambda: sum(len(encode(texts)[0]) for texts in batches)


LOOPS = {
    "bare loop": bare_loop,
    "datasets loop": datasets_loop,
    "apply_chat_template": chat_template,
    "encoder alone": encoder_alone,
}


def run_loop(arguments: argparse.Namespace) -> None:
    """Prints what the loop alone took, as JSON; the caller measures the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        work = LOOPS[arguments.side](arguments, Path(folder))
        gc.collect()
        gc.freeze()  # conversations in memory are not walked by the collector again and again: in favour of the loops
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        num_tokens = work()
        wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"cpu_s": cpu_s, "wall_s": wall_s, "tokens": num_tokens}))


# measuring


def measure(command: list[str], cache: Path) -> tuple[float, float, str]:
    """(CPU-seconds of the process and all its descendants, wall seconds until it ends, what it printed)."""
    environment = {**os.environ, "CHATDATA_CACHE": str(cache), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache.parent / "bytecode")}
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, env=environment)
        cpu_s = wall_s = 0.0
        while True:
            try:
                pid, status, usage = os.wait4(-1, 0)  # its children's children come here when their parent has ended
            except ChildProcessError:
                break
            cpu_s += usage.ru_utime + usage.ru_stime  # with those of the children that it has itself waited for
            if pid == process.pid:
                wall_s, process.returncode = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"exit {process.returncode}: {' '.join(command)}")
        output.seek(0)
        return cpu_s, wall_s, output.read()


def fixed_recipe(arguments: argparse.Namespace, folder: Path, workers: int) -> Path:
    """A recipe with next to nothing to render that takes all that is fixed: word lists, `workers` workers."""
    from chatdata.recipe import load_recipe
    from chatdata.tasks import load_tasks

    tasks = load_tasks()
    recipe = load_recipe(str(arguments.recipe), tasks)
    generated = {e.task: e for entries in recipe.splits.values() for e in entries if tasks[e.task].generate is not None}
    text = f'stage = "{recipe.stage}"\n\n[[train]]\ntask = "conversations"\npath = "fixed-{workers}.jsonl"\n'
    for name, entry in generated.items():
        options = {key: value for key, value in entry.options.items() if key not in entry.file_options}
        text += f'\n[[train]]\ntask = "{name}"\nrows = 1\n'
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items() if value is not None)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    row = {"messages": messages, "pad": " " * (PAD_BYTES if workers > 1 else 0)}
    (folder / f"fixed-{workers}.jsonl").write_text((json.dumps(row) + "\n") * workers)
    path = folder / f"fixed-{workers}.toml"
    path.write_text(text)
    return path


def run_build(arguments: argparse.Namespace, side: str, folder: Path, recipe: Path | None) -> dict[str, Any]:
    """One build, into a folder and from a cache of its own; of `recipe` in place of --recipe for the fixed cost."""
    kind = "fixed" if recipe else "full"
    cache, out = folder / f"cache-{kind}", folder / f"out-{kind}"
    if side != "build warm":
        shutil.rmtree(cache, ignore_errors=True)
    cpu_s, wall_s, printed = measure(build_command(arguments, out, *BUILDS[side], recipe=recipe), cache)
    report = json.loads((out / "report.json").read_text())
    assert (report["units"]["rendered"] == 0) == (side == "build warm"), report
    tokens = distinct_tokens(out, json.loads(printed)["splits"])
    shutil.rmtree(out)
    return {"cpu_s": cpu_s, "wall_s": wall_s, "tokens": tokens, "encoder": report.get("encoder", {}).get("name")}


def distinct_tokens(out: Path, splits: dict[str, Any]) -> int:
    """Tokens of a build's distinct rows."""
    import pyarrow.parquet as pq

    found = {}
    for split, facts in splits.items():
        for path in sorted((out / split).glob("index-*.parquet")):
            columns = pq.read_table(path, columns=["entry", "row", "num_tokens"]).to_pydict()
            for entry, row, num_tokens in zip(*columns.values(), strict=True):
                found[facts["entries"][entry]["source"], row] = num_tokens
    return sum(found.values())


def run_round(arguments: argparse.Namespace, sides: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """side → cpu_s and wall_s of its process, fixed_cpu_s and fixed_wall_s of it that are fixed, tokens."""
    found: dict[str, dict[str, Any]] = {}
    for side in sides:
        if side in BUILDS:
            workers = int(BUILDS[side][1])
            fixed = run_build(arguments, side, folder, fixed_recipe(arguments, folder, workers))
            found[side] = run_build(arguments, side, folder, None)
            found[side] |= {f"fixed_{key}": fixed[key] for key in ("cpu_s", "wall_s")}
            continue
        own = [sys.executable, __file__, "--side", side, "--template-share", str(arguments.template_share)]
        own += ["--recipe", str(arguments.recipe), "--shared", str(arguments.shared)]
        own += ["--limit", str(arguments.limit)] if arguments.limit else []
        cpu_s, wall_s, printed = measure(own, folder / "cache-loops")
        loop = json.loads(printed.splitlines()[-1])
        found[side] = {"cpu_s": cpu_s, "wall_s": wall_s, "tokens": loop["tokens"]}
        found[side] |= {f"fixed_{key}": found[side][key] - loop[key] for key in ("cpu_s", "wall_s")}
    return found


def summarize(rounds: list[dict[str, dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """Medians over rounds. Fixed cost is the median of all rounds, each round's work what is left of its time."""
    sides = list(rounds[0])
    fixed = {
        side: {key: statistics.median(r[side][f"fixed_{key}"] for r in rounds) for key in ("cpu_s", "wall_s")}
        for side in sides
    }

    def work(side: str, key: str) -> list[float]:
        if side in LOOPS:  # measured around the loop itself
            return [r[side][key] - r[side][f"fixed_{key}"] for r in rounds]
        return [r[side][key] - fixed[side][key] for r in rounds]

    def rates(side: str) -> list[float]:
        return [r[side]["tokens"] / cpu_s for r, cpu_s in zip(rounds, work(side, "cpu_s"), strict=True)]

    def ratio(of: list[float], to: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(of, to, strict=True))

    table = {
        side: {
            "cpu_s": statistics.median(r[side]["cpu_s"] for r in rounds),
            "fixed_cpu_s": fixed[side]["cpu_s"],
            "wall_s": statistics.median(r[side]["wall_s"] for r in rounds),
            "fixed_wall_s": fixed[side]["wall_s"],
            "tokens_per_cpu_s": statistics.median(rates(side)),
        }
        for side in sides
    }
    ratios: dict[str, float] = {}
    for name, build, loop in (
        ("build to bare loop (bound 2, aim 5)", "build", "bare loop"),
        ("build to datasets loop (bound 4, aim 10)", "build", "datasets loop"),
        ("build to apply_chat_template (bound 15)", "build", "apply_chat_template"),
        ("build to encoder alone", "build", "encoder alone"),
        ("build tiktoken to bare loop", "build tiktoken", "bare loop"),
        ("build fastokens to bare loop", "build fastokens", "bare loop"),
    ):
        if build in sides and loop in sides:
            ratios[name] = ratio(rates(build), rates(loop))
    if {"build", "build 2 workers"} <= set(sides):
        one, two = work("build", "wall_s"), work("build 2 workers", "wall_s")
        ratios["2 workers to 1, wall beyond the fixed cost of each (bound 1.7)"] = ratio(one, two)
        late = [r["build 2 workers"]["wall_s"] - fixed["build"]["wall_s"] for r in rounds]
        ratios["2 workers to 1, wall, the second worker's start counted"] = ratio(one, late)
    if {"build", "build warm"} <= set(sides):
        ratios["cold to warm, wall beyond fixed"] = ratio(work("build", "wall_s"), work("build warm", "wall_s"))
        ratios["cold to warm, wall, all"] = ratio(*([r[s]["wall_s"] for r in rounds] for s in ("build", "build warm")))
    if {"build", "encoder alone"} <= set(sides):
        beside = zip(work("build", "cpu_s"), work("encoder alone", "cpu_s"), strict=True)
        per_million = statistics.median((build - encoder) / tokens * 1e6 for build, encoder in beside)
        ratios["everything but encoding, CPU-seconds per million tokens (bound 0.1)"] = per_million
    return {"sides": table, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser)
    parser.add_argument("--runs", type=int, default=5, help="rounds; every side once in each (default: 5)")
    parser.add_argument(
        "--template-share",
        type=int,
        default=1,
        metavar="N",
        help="apply_chat_template renders one conversation in N only (default: all)",
    )
    parser.add_argument("--skip", action="append", default=[], choices=[*BUILDS, *LOOPS], help="leave a side out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every run there")
    parser.add_argument("--side", choices=LOOPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_loop(arguments)
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit("prctl(PR_SET_CHILD_SUBREAPER) failed: CPU time of workers could not be counted")

    plan = make_plan(arguments)
    num_listed = sum(len(planned.positions) for entries in plan.splits.values() for planned in entries)
    num_rows = len(distinct_positions(plan))
    texts = [json.dumps(messages) for messages in conversations_in_memory(plan)]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; {arguments.recipe.name}:")
    print(f"{num_rows:,} distinct rows of {num_listed:,}, {len(set(texts)):,} distinct conversations among them")
    if arguments.template_share > 1:
        print(f"apply_chat_template renders one conversation in {arguments.template_share}")
    sides = [side for side in (*BUILDS, *LOOPS) if side not in arguments.skip]
    if "build warm" in sides and sides[0] != "build":
        parser.error("--skip build goes with --skip 'build warm'")
    rounds = []
    with tempfile.TemporaryDirectory(prefix="chatdata-bench-") as folder:
        run_round(argparse.Namespace(**{**vars(arguments), "limit": 20}), sides, Path(folder))
        for number in range(arguments.runs):
            rounds.append(run_round(arguments, sides, Path(folder)))
            seconds = ", ".join(f"{side} {found['cpu_s']:.1f}" for side, found in rounds[-1].items())
            print(f"round {number + 1}, CPU-seconds: {seconds}", file=sys.stderr, flush=True)
    comparable = [side for side in (*BUILDS, "bare loop", "datasets loop") if side in sides]
    counted = {r[side]["tokens"] for r in rounds for side in comparable}
    assert len(counted) == 1, f"the sides made different numbers of tokens: {counted}"
    (tokens,) = counted
    encoder = rounds[0].get("build", {}).get("encoder")
    results = {"tokens": tokens, "rows": num_rows, "encoder": encoder, **summarize(rounds, tokens)}

    print(f"{tokens:,} tokens in distinct rows; --encoder auto is {encoder}; medians of {arguments.runs}")
    print(f"{'':<20} {'CPU s':>8} {'fixed':>7} {'wall s':>8} {'fixed':>7}  million tokens per CPU-second beyond fixed")
    for side, row in results["sides"].items():
        times = f"{row['cpu_s']:>8.2f} {row['fixed_cpu_s']:>7.2f} {row['wall_s']:>8.2f} {row['fixed_wall_s']:>7.2f}"
        print(f"{side:<20} {times}  {row['tokens_per_cpu_s'] / 1e6:>8.2f}")
    for name, value in results["ratios"].items():
        print(f"{value:>8.3f}  {name}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**results, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
