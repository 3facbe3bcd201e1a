"""Confidence intervals, paired tests and ChatCORE, from counts of right answers."""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from statistics import NormalDist

import numpy as np

# The six tasks of ChatCORE and what guessing scores on each (karpathy/nanochat@790f3be:scripts/chat_eval.py)
CHAT_CORE_CHANCE = dict.fromkeys(("arc_easy", "arc_challenge", "mmlu"), 0.25)
CHAT_CORE_CHANCE |= dict.fromkeys(("gsm8k", "humaneval", "spelling_bee"), 0.0)
CHUNK_COUNTS = 1 << 20  # resampled counts that paired_bootstrap holds at a time: 8 MiB of int64


def wilson_interval(correct: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval for a share of `total` items: the rates that `correct` of them do not contradict.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927) 209–212. Unlike the
    textbook p ± 1.96 · sqrt(p(1 − p)/n) it is meaningful at 0 of n and n of n, and stays within 0..1.
    Not scipy's binomtest, which takes whole counts only: here `correct` may be a sum of per-item means over draws.
    Returns (low, high), both in 0..1, with low <= correct / total <= high; (0.0, 1.0) for no items.
    """
    assert 0 <= correct <= total and 0 < confidence < 1
    if total == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    rate = correct / total
    centre = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (rate * (1 - rate) / total + z2 / (4 * total * total))) / (1 + z2 / total)
    # At 0 of n and n of n an end is exactly 0 or 1, but rounding may put it 1e-17 on the wrong side of the rate.
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def pass_at_k(correct: int, draws: int, k: int) -> float:
    """The chance that at least one of k draws of an item is right, estimated without bias from `draws` of them.

    1 − C(n − c, k) / C(n, k) (Chen et al., "Evaluating large language models trained on code", arXiv:2107.03374,
    section 2.1): the share of all choices of k draws that hold a right one. In whole numbers, so exact to the last bit
    of the float. 1 − (1 − c/n)^k would be too low.
    """
    assert 0 <= correct <= draws and 1 <= k <= draws
    choices = math.comb(draws, k)
    return (choices - math.comb(draws - correct, k)) / choices


def pass_scores(correct: Iterable[int], draws: int) -> dict[int, list[float]]:
    """k → pass@k of each item, for k = 1, 2, 4, … and all draws; nothing with a single draw.

    correct: how many draws of each item are right.
    """
    sizes = sorted({2**power for power in range(draws.bit_length())} | {draws}) if draws > 1 else []
    return {k: [pass_at_k(right, draws, k) for right in correct] for k in sizes}


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p that two scorers of the same items are equally good, from the items on which they disagree.

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947) 153–157, in its exact form: if they are equally good, only_a is binomial with probability
    1/2 given only_a + only_b disagreements.
    Not scipy's binomtest, because importing scipy.stats takes 2 CPU-seconds, three times the rest of `compare`. The sum
    is in whole numbers, exact to the last bit of the float.
    only_a, only_b: items that only a, or only b, got right.
    """
    assert only_a >= 0 and only_b >= 0
    disagreements, fewer = only_a + only_b, min(only_a, only_b)
    # of choosing 0, 1, … of the disagreements
    ways = accumulate(range(1, fewer + 1), lambda n, chosen: n * (disagreements - chosen + 1) // chosen, initial=1)
    return min(1.0, 2 * sum(ways) / 2**disagreements)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, draws: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of mean(b − a) over items resampled with replacement, item by item in pairs.

    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979) 1–26.
    How often each *distinct* difference is drawn is multinomial, so a resample takes one count per distinct difference:
    3 for right-or-wrong items, where scipy.stats.bootstrap draws 14,042 indices (MMLU). Memory is bounded.
    Without any disagreement the interval is [0, 0], because it knows only the items it saw.
    a, b: numbers [items], the scores of the same items in the same order, at least one.
    Returns (low, high) in the unit of the scores.
    """
    assert a.shape == b.shape and a.ndim == 1 and len(a) > 0
    values, counts = np.unique(np.asarray(b, np.float64) - np.asarray(a, np.float64), return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, CHUNK_COUNTS // len(values))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        means[start : start + size] = rng.multinomial(len(a), counts / len(a), size) @ values / len(a)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def chat_core(accuracy: Mapping[str, float]) -> float | None:
    """Mean of (accuracy − chance) / (1 − chance) over the six tasks of ChatCORE; None if one is missing.

    0 is guessing, 1 is everything right. Other tasks in `accuracy` are ignored.
    """
    if not accuracy.keys() >= CHAT_CORE_CHANCE.keys():
        return None
    centred = [(accuracy[task] - chance) / (1 - chance) for task, chance in CHAT_CORE_CHANCE.items()]
    return math.fsum(centred) / len(centred)
