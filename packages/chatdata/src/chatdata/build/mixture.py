"""Which rows, in which order: permutation within a task, selection within an entry, one shuffle over the mixture."""

from __future__ import annotations

import random
from array import array

import numpy as np

from chatdata.errors import RecipeError


def permutation(num_rows: int) -> np.ndarray:
    """position → raw row (int64), as `datasets` shuffles with seed 42 (karpathy/nanochat@790f3be:tasks/*.py)."""
    return np.random.default_rng(42).permutation(num_rows)


def select(num_rows: int, start: int | None, stop: int | None, rows: int | None, limit: int | None) -> range:
    """Positions an entry takes: [start, stop) (negative counts from the end), then the first `rows`, then `limit`.

    Raises RecipeError if the recipe asks for rows that are not there: a mixture is never silently smaller.
    """
    low, high = (_from_end(bound, num_rows) for bound in (start or 0, num_rows if stop is None else stop))
    for key, bound, value in (("start", low, start), ("stop", high, stop)):
        if not 0 <= bound <= num_rows:
            raise RecipeError(f"{key} = {value} is outside the source's {num_rows:,} rows")
    if high <= low:
        raise RecipeError(f"start = {start}, stop = {stop} selects no rows of {num_rows:,}")
    if rows is not None:
        if rows > high - low:
            raise RecipeError(f"rows = {rows:,}, but only {high - low:,} are there")
        high = low + rows
    if limit is not None:
        high = min(high, low + limit)
    return range(low, high)


def mixture_order(lengths: list[int], seed: int, shuffle: bool) -> np.ndarray:
    """Order of all (entry, place in entry) pairs, as indices into their concatenation (int32 [sum(lengths)]).

    `random.Random(seed).shuffle` moves places, not values, so shuffling indices gives the order of the pairs
    (karpathy/nanochat@790f3be:tasks/common.py, TaskMixture).
    """
    order = array("i", range(sum(lengths)))  # a list of Python's integers takes ten times the memory
    if shuffle:
        random.Random(seed).shuffle(order)
    return np.frombuffer(order, dtype=np.int32)


def _from_end(bound: int, num_rows: int) -> int:
    return bound + num_rows if bound < 0 else bound
