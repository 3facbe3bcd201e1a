"""`chatdata build` against what people do without it, side by side in one run: tokens per CPU-second.

    uv run python benchmarks/build.py --shared ../shared/data --runs 5
    uv run python benchmarks/build.py --shared ../shared/data --runs 9 --against ../other-checkout

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
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from build_sides import (
    LOOPS,
    add_inputs,
    add_template_share,
    conversations_in_memory,
    distinct_positions,
    make_build_plan,
)

SIDES_FILE = Path(__file__).parent / "build_sides.py"
BUILDS = {  # side → options of the command; "warm" follows "build" and finds its units
    "build": ["--workers", "1"],
    "build warm": ["--workers", "1"],
    "build 2 workers": ["--workers", "2"],
    "build fastokens": ["--workers", "1", "--encoder", "fastokens"],
    "build tiktoken": ["--workers", "1", "--encoder", "tiktoken"],
    "build with firewall": ["--workers", "1", "--decontaminate", "report"],
}
PR_SET_CHILD_SUBREAPER = 36
PAD_BYTES = 8 << 20  # of a row of the fixed recipe: a second worker is started for the second 8 MiB only


def build_command(
    arguments: argparse.Namespace, out: Path, *more: str, recipe: Path | None = None, python: str = sys.executable
) -> list[str]:
    """The command that builds `--recipe`, or `recipe`, which has no identity entry."""
    shared: Path = arguments.shared
    command = [python, "-c", "from chatdata.cli import main; main()", "build", "--json", "--out", str(out)]
    command += ["--recipe", str(recipe or arguments.recipe), "--data-dir", str(shared / "hub")]
    command += ["--tokenizer", str(shared / "tokenizer" / "tokenizer.pkl")]
    text = (recipe or arguments.recipe).read_text()
    for task, option, name in (
        ("spelling", "--words", "words_alpha.txt"),
        ("identity", "--identity", "identity_conversations.jsonl"),
    ):
        command += [option, str(shared / name)] if task in text else []
    command += ["--limit", str(arguments.limit)] if arguments.limit and not recipe else []
    return [*command, "--decontaminate", "off", *more]


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
        own = [sys.executable, str(SIDES_FILE), side, "--template-share", str(arguments.template_share)]
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


def compare_checkouts(arguments: argparse.Namespace, folder: Path) -> None:
    """One worker, gigatoken: this checkout's build and the other's in turn, and the ratio within each round."""
    pythons = {"this": sys.executable, "other": str(arguments.against.resolve() / ".venv" / "bin" / "python")}
    fixed, rounds = fixed_recipe(arguments, folder, 1), []
    hashes: dict[str, list[str]] = {}  # of tokens and mask: the format may have changed between the two
    for number in range(arguments.runs + 1):
        times: dict[str, tuple[float, float]] = {}
        for name in sorted(pythons, reverse=bool(number % 2)):
            measured = []
            for kind, recipe in (("fixed", fixed), ("full", None)):
                cache, out = folder / f"cache-{kind}-{name}", folder / f"out-{kind}"
                shutil.rmtree(cache, ignore_errors=True)
                options = (*BUILDS["build"], "--encoder", "gigatoken")
                command = build_command(arguments, out, *options, recipe=recipe, python=pythons[name])
                cpu_s, wall_s, printed = measure(command, cache)
                shards = [shard for split in json.loads(printed)["splits"].values() for shard in split["shards"]]
                written = [shard["files"][kind]["sha256"] for shard in shards for kind in ("tokens", "mask")]
                measured.append((cpu_s, wall_s, written))
                shutil.rmtree(out)
            times[name] = measured[1][0] - measured[0][0], measured[1][1]
            hashes[name] = measured[1][2]
        if number:  # the first round compiles bytecode
            rounds.append({name: {"cpu_s": cpu_s, "wall_s": wall_s} for name, (cpu_s, wall_s) in times.items()})
            print(f"round {number}: " + ", ".join(f"{name} {s[0]:.2f} CPU-s" for name, s in times.items()), flush=True)
    assert hashes["this"] == hashes["other"], f"the checkouts write different tokens or masks: {hashes}"
    for key, what in (("cpu_s", "CPU-seconds beyond fixed cost"), ("wall_s", "wall seconds of the command")):
        for name in pythons:
            values = sorted(found[name][key] for found in rounds)
            print(f"{what}, {name}: median {statistics.median(values):.2f}, {values[0]:.2f} to {values[-1]:.2f}")
        ratios = sorted(found["this"][key] / found["other"][key] for found in rounds)
        print(f"{what}, this / other: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"sha256": hashes["this"], "rounds": rounds}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser)
    parser.add_argument("--runs", type=int, default=5, help="rounds; every side once in each (default: 5)")
    add_template_share(parser)
    parser.add_argument("--skip", action="append", default=[], choices=[*BUILDS, *LOOPS], help="leave a side out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every run there")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="only compare with the build of another checkout (its .venv)"
    )
    arguments = parser.parse_args()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit("prctl(PR_SET_CHILD_SUBREAPER) failed: CPU time of workers could not be counted")
    if arguments.against:
        with tempfile.TemporaryDirectory(prefix="chatdata-bench-") as folder:
            compare_checkouts(arguments, Path(folder))
        return

    plan = make_build_plan(arguments)
    num_listed = sum(len(planned.task_positions) for entries in plan.splits.values() for planned in entries)
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
