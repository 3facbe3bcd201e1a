"""The order of a mixture at growing sizes: seconds, and peak memory per document.

    uv run python benchmarks/mixture_growth.py --documents 1_000_000 --times 1 16 64

Two permuted sources of equal size make the split. What is measured is what a build does before any row is read
(`number_documents`, `rows_in_order`) and `mixture_order` alone, each in a process of its own; the memory is the peak
of that process less what it had after its imports. `--list` also measures a Python list of all (task, row) pairs,
shuffled, as karpathy/nanochat@790f3be:tasks/common.py makes it, and checks that both give one order.
"""

import argparse
import resource
import subprocess
import sys
import time
from types import SimpleNamespace as Fake
from typing import Any

SEED = 42


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def two_sources(num_documents: int) -> Any:
    """As much of a build plan as the order needs."""
    import numpy as np

    half, entries = num_documents // 2, []
    for number in range(2):
        source = Fake(task=Fake(generate=None, permuted=True), num_rows=half, name=f"source {number}")
        entries.append(Fake(source=source, taken=range(half), task_positions=np.arange(half, dtype=np.int32)))
    sources = {id(entry.source): entry.source for entry in entries}
    recipe = Fake(seed=SEED, shuffle={"train": True})
    # sources are keys of a dict, which a namespace cannot be
    hashable = {key: Hashable(source) for key, source in sources.items()}
    for entry in entries:
        entry.source = hashable[id(entry.source)]
    return Fake(splits={"train": entries}, sources=tuple(hashable.values()), recipe=recipe)


class Hashable:
    def __init__(self, source: Any) -> None:
        self.__dict__.update(source.__dict__)


def measure(what: str, num_documents: int) -> None:
    """In a process of its own: print seconds and bytes."""
    from chatdata.build.plan import mixture_order, number_documents, rows_in_order

    plan = two_sources(num_documents)
    before, started = peak_bytes(), time.perf_counter()
    if what == "order":
        mixture_order([num_documents // 2] * 2, SEED, True)
    elif what == "rows":
        rows_in_order(plan, "train", number_documents(plan))
    else:
        import random

        pairs = [(task, row) for task in range(2) for row in range(num_documents // 2)]
        random.Random(SEED).shuffle(pairs)
    seconds, num_bytes = time.perf_counter() - started, peak_bytes() - before
    if what == "list":
        order = mixture_order([num_documents // 2] * 2, SEED, True).tolist()
        assert [divmod(i, num_documents // 2) for i in order] == pairs, "the orders differ"
    print(seconds, num_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents at ×1")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--list", action="store_true", help="also a Python list of all pairs (90 bytes a document)")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "DOCUMENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], int(options.measure[1]))
        return
    print("documents     what    seconds   µs a document   MiB   bytes a document")
    for times in options.times:
        num_documents = times * options.documents
        for what in ("order", "rows", *(["list"] if options.list else [])):
            command = [sys.executable, __file__, "--measure", what, str(num_documents)]
            result = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            seconds, num_bytes = float(result[0]), int(result[1])
            each = f"{1e6 * seconds / num_documents:15.2f} {num_bytes / 2**20:6.0f} {num_bytes / num_documents:8.1f}"
            print(f"{num_documents:>11,}  {what:6} {seconds:8.1f} {each}", flush=True)


if __name__ == "__main__":
    main()
