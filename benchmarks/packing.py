"""Packing 850,000 lengths resampled from a build's own, and how full the real ones come out.

uv run python benchmarks/packing.py BUILD
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from chatdata.packing.epoch import document_targets
from chatdata.packing.layouts import pack
from chatdata.shards.read import open_build

NUM_DOCUMENTS, SEQ_LEN, RUNS = 850_000, 2048, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    split = open_build(parser.parse_args().build)["train"]
    lengths, num_targets = np.diff(split.offsets), document_targets(split, "apply", SEQ_LEN)[0]
    real = pack(lengths, num_targets, SEQ_LEN, 42)
    print(f"{len(lengths):,} documents at T = {SEQ_LEN}: {real.num_sequences:,} sequences, {real.fill:.3%} full")
    chosen = np.random.default_rng(0).integers(0, len(lengths), NUM_DOCUMENTS)
    durations_s = []
    for _ in range(RUNS):
        started = time.perf_counter()
        many = pack(lengths[chosen], num_targets[chosen], SEQ_LEN, 42)
        durations_s.append(time.perf_counter() - started)
    print(f"{NUM_DOCUMENTS:,} resampled: {statistics.median(durations_s):.2f} s, {many.fill:.3%} full")


if __name__ == "__main__":
    main()
