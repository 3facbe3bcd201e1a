"""Coverage of chateval's intervals and false positives of its tests, by simulation, as Markdown tables.

uv run python benchmarks/interval_coverage.py
"""

from __future__ import annotations

from functools import cache

import numpy as np

from chateval.results.intervals import mcnemar_exact, paired_bootstrap, wilson_interval
from chateval.results.tables import markdown_table

RATES, SIZES, DISCORDANCE = (0.02, 0.1, 0.25, 0.5, 0.9), (20, 100, 1000), (0.02, 0.1, 0.3, 0.6)
RUNS, BOOTSTRAP_RUNS, BOOTSTRAP_DRAWS = 100_000, 1000, 1000


def main() -> None:
    rng = np.random.default_rng(0)
    sizes = [f"n = {n:,}" for n in SIZES]
    print(f"Wilson, 95 %: share of {RUNS:,} simulated scores whose interval contains the true rate, %\n")
    rows = [[f"p = {rate}", *(f"{100 * wilson_coverage(rng, rate, n):.2f}" for n in SIZES)] for rate in RATES]
    print(markdown_table(["", *sizes], rows))
    print(f"\nMcNemar, exact: share of {RUNS:,} comparisons of equals with p < 0.05, %\n")
    rows = [
        [f"{share:.0%} disagree", *(f"{100 * mcnemar_rate(rng, share, n):.2f}" for n in SIZES)] for share in DISCORDANCE
    ]
    print(markdown_table(["", *sizes], rows))
    print(f"\nPaired bootstrap, 95 %: share of {BOOTSTRAP_RUNS:,} comparisons of equals whose interval excludes 0, %\n")
    rows = [
        [f"{share:.0%} disagree", *(f"{100 * bootstrap_rate(rng, share, n):.1f}" for n in SIZES)]
        for share in DISCORDANCE
    ]
    print(markdown_table(["", *sizes], rows))


def wilson_coverage(rng: np.random.Generator, rate: float, n: int) -> float:
    low, high = np.array([wilson_interval(correct, n) for correct in range(n + 1)]).T
    correct = rng.binomial(n, rate, RUNS)
    return float(((low[correct] <= rate) & (rate <= high[correct])).mean())


def disagreements(rng: np.random.Generator, share: float, n: int, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that only a, and only b, got right, if both are equally good and disagree on `share` of the items."""
    num_disagree = rng.binomial(n, share, runs)
    only_a = rng.binomial(num_disagree, 0.5)
    return only_a, num_disagree - only_a


def mcnemar_rate(rng: np.random.Generator, share: float, n: int) -> float:
    pairs, times = np.unique(disagreements(rng, share, n, RUNS), axis=1, return_counts=True)
    p_of = cache(mcnemar_exact)
    found = np.array([p_of(min(a, b), max(a, b)) < 0.05 for a, b in pairs.T.tolist()])
    return float(times[found].sum() / RUNS)


def bootstrap_rate(rng: np.random.Generator, share: float, n: int) -> float:
    found = 0
    for run, (only_a, only_b) in enumerate(zip(*disagreements(rng, share, n, BOOTSTRAP_RUNS), strict=True)):
        differences = np.repeat([-1.0, 0.0, 1.0], [only_a, n - only_a - only_b, only_b])
        low, high = paired_bootstrap(np.zeros(n), differences, BOOTSTRAP_DRAWS, seed=run)
        found += not low <= 0 <= high
    return found / BOOTSTRAP_RUNS


if __name__ == "__main__":
    main()
