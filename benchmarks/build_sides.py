"""What `build.py` compares a build with: each loop in a process of its own, by the name of its side.

    python benchmarks/build_sides.py "bare loop" --shared ../shared/data

Prints what the loop alone took, and the tokens it made, as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatdata.build.plan import BuildPlan
    from chatdata.sources.source import Source

RECIPE = Path(__file__).parent.parent / "tests" / "chatdata" / "recipes" / "shared_mid.toml"


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


def add_template_share(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template-share",
        type=int,
        default=1,
        metavar="N",
        help="apply_chat_template renders one conversation in N only (default: all)",
    )


def make_build_plan(arguments: argparse.Namespace) -> BuildPlan:
    from chatdata.build import plan
    from chatdata.recipe import load_recipe
    from chatdata.sources.find import Locations
    from chatdata.tasks import load_tasks
    from chatdata.tokenizer.files import load_tokenizer

    shared, tasks = arguments.shared, load_tasks()
    recipe = load_recipe(str(arguments.recipe), tasks)
    if recipe.max_tokens is not None or recipe.zero_supervised != "keep":
        sys.exit(f"{arguments.recipe}: the other sides cut and drop nothing; give a recipe that keeps whole documents")
    locations = Locations(
        recipe.folder, shared / "hub", shared / "identity_conversations.jsonl", str(shared / "words_alpha.txt")
    )
    tokenizer = load_tokenizer(shared / "tokenizer" / "tokenizer.pkl")
    return plan.make_build_plan(recipe, tasks, tokenizer, locations, arguments.limit)


def distinct_positions(plan: BuildPlan) -> list[tuple[Source, int]]:
    """(source, position) of every row of the mixture in its order, once."""
    from chatdata.build.plan import mixture_order

    found: dict[tuple[int, int], tuple[Source, int]] = {}
    for split, entries in plan.splits.items():
        pairs = [(planned.source, position) for planned in entries for position in planned.task_positions]
        lengths = [len(planned.task_positions) for planned in entries]
        order = mixture_order(lengths, plan.recipe.seed, plan.recipe.shuffle[split])
        for source, position in (pairs[i] for i in order.tolist()):
            found.setdefault((id(source), position), (source, position))
    return list(found.values())


def wanted_rows(plan: BuildPlan) -> Iterator[tuple[Source, Any]]:
    """Every source with bool [num_rows]: which of its rows the mixture holds."""
    from chatdata.build.plan import number_documents

    for source, row_map in number_documents(plan).items():
        yield source, row_map.document_of >= 0


def conversations_in_memory(plan: BuildPlan) -> list[list[dict[str, Any]]]:
    from chatdata.conversation import parse_conversation

    found = []
    for source, wanted in wanted_rows(plan):
        for _, row in source.read(wanted):
            found.append(parse_conversation(source.task.to_conversation(row))["messages"])
    return found


def plain_render(plan: BuildPlan) -> Callable[[Any], tuple[list[int], list[int]]]:
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
    plan = make_build_plan(arguments)
    conversations, render = conversations_in_memory(plan), plain_render(plan)
    return lambda: sum(len(render(messages)[0]) for messages in conversations)


def datasets_loop(arguments: argparse.Namespace, folder: Path) -> Callable[[], int]:
    from datasets import Dataset

    plan = make_build_plan(arguments)
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

    from chatdata.tokenizer.files import save_tokenizer

    plan = make_build_plan(arguments)
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
    from chatdata.build.units import MAX_CHARS, pieces_of_rows
    from chatdata.tokenizer.encoders import find_encoder

    plan = make_build_plan(arguments)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=LOOPS)
    add_inputs(parser)
    add_template_share(parser)
    arguments = parser.parse_args()
    run_loop(arguments)


if __name__ == "__main__":
    main()
