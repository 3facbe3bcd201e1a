"""Intervals and tests against literals from scipy 1.17, and against what they promise."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chateval.results import intervals as stats
from chateval.results.intervals import (
    CHAT_CORE_CHANCE,
    chat_core,
    mcnemar_exact,
    paired_bootstrap,
    pass_at_k,
    pass_scores,
    wilson_interval,
)

# wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "confidence", "expected"),
    [  # scipy.stats.binomtest(correct, total).proportion_ci(confidence, "wilson")
        (0, 10, 0.95, (0.0, 0.27753279986288926)),
        (10, 10, 0.95, (0.7224672001371109, 1.0)),
        (5, 10, 0.95, (0.236593090512564, 0.7634069094874361)),
        (1, 20, 0.95, (0.008881448800795402, 0.23613119344674205)),
        (137, 164, 0.95, (0.7710631895922835, 0.8843171959983442)),
        (37, 1319, 0.95, (0.02041910091780255, 0.03842503214262434)),
        (812, 2376, 0.95, (0.3229489085798654, 0.3610636556971491)),
        (0, 1, 0.95, (0.0, 0.7934506856227626)),
        (30, 100, 0.9, (0.2307049543691453, 0.3798321339441244)),
        (30, 100, 0.99, (0.19746065620990516, 0.427427618876424)),
    ],
)
def test_wilson_equals_scipy(correct: int, total: int, confidence: float, expected: tuple[float, float]) -> None:
    assert wilson_interval(correct, total, confidence) == pytest.approx(expected, rel=1e-12)


def test_wilson_of_no_items_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


# before they are clipped, rounding puts the ends outside at 9 of 9 and 0 of 21, inside at 13 of 13 and 0 of 43
@pytest.mark.parametrize("total", [1, 3, 9, 10, 13, 21, 43, 164, 1319, 14042, 10**6])
def test_wilson_at_the_ends_is_exact_there_and_open_on_the_other_side(total: int) -> None:
    low, high = wilson_interval(0, total)
    assert low == 0.0 and 0 < high < 1
    low, high = wilson_interval(total, total)
    assert 0 < low < 1 and high == 1.0


@given(st.integers(1, 20_000), st.floats(0, 1), st.floats(0.01, 0.999))
def test_wilson_holds_the_accuracy_and_stays_within_0_and_1(total: int, share: float, confidence: float) -> None:
    correct = share * total  # a sum of means over draws need not be whole
    low, high = wilson_interval(correct, total, confidence)
    assert 0 <= low <= correct / total <= high <= 1
    assert low < high


@given(st.integers(1, 2000), st.data())
def test_wilson_is_the_same_read_from_the_other_side(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [  # binom.pmf summed over the counts whose scipy interval holds the rate; n = 20, 100, 1000
        (0.02, (0.9401010214510517, 0.9491695546304996, 0.9466773476325517)),
        (0.1, (0.9568255047155365, 0.9363983902254395, 0.949097842188256)),
        (0.25, (0.9347622074283207, 0.9512948142448161, 0.9471396719480498)),
        (0.5, (0.9586105346679689, 0.9431120663590191, 0.9463221503549901)),
        (0.9, (0.9568255047155363, 0.9363983902254397, 0.9490978421882558)),
    ],
)
def test_exact_coverage_of_wilson(rate: float, expected: tuple[float, ...]) -> None:
    """No simulation: every count of right answers, weighted with its binomial probability."""
    for total, coverage in zip((20, 100, 1000), expected, strict=True):
        held = 0.0
        for correct in range(total + 1):
            low, high = wilson_interval(correct, total)
            if low <= rate <= high:
                held += math.exp(
                    math.lgamma(total + 1)
                    - math.lgamma(correct + 1)
                    - math.lgamma(total - correct + 1)
                    + correct * math.log(rate)
                    + (total - correct) * math.log(1 - rate)
                )
        assert held == pytest.approx(coverage, abs=1e-9)


@pytest.mark.parametrize(
    ("correct", "total", "confidence"), [(-0.5, 10, 0.95), (11, 10, 0.95), (5, 10, 0.0), (5, 10, 1.0)]
)
def test_wilson_refuses_what_is_no_share(correct: float, total: int, confidence: float) -> None:
    with pytest.raises(AssertionError):
        wilson_interval(correct, total, confidence)


# pass_at_k


@pytest.mark.parametrize(
    ("correct", "draws", "k", "expected"),
    [(0, 4, 2, 0.0), (4, 4, 1, 1.0), (2, 5, 1, 0.4), (2, 5, 2, 0.7), (2, 5, 4, 1.0), (1, 100, 10, 0.1)],
)
def test_pass_at_k(correct: int, draws: int, k: int, expected: float) -> None:
    assert pass_at_k(correct, draws, k) == expected


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_draw(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    choices = [any(choice) for choice in combinations(right, k)]
    assert pass_at_k(sum(right), len(right), k) == sum(choices) / len(choices)


@given(st.integers(1, 60), st.floats(0, 1), st.data())
def test_pass_at_k_has_no_bias(draws: int, rate: float, data: st.DataObject) -> None:
    """Draws that are right with probability p: k of them hold a right one with probability 1 − (1 − p)^k."""
    k = data.draw(st.integers(1, draws))
    ways = [math.comb(draws, c) * rate**c * (1 - rate) ** (draws - c) for c in range(draws + 1)]
    expected = math.fsum(way * pass_at_k(c, draws, k) for c, way in enumerate(ways))
    assert expected == pytest.approx(1 - (1 - rate) ** k, abs=1e-12)


@given(st.integers(2, 5000), st.data())
def test_pass_at_k_of_many_draws_grows_with_k_and_stays_within_0_and_1(draws: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, draws))
    scores = [score for (score,) in pass_scores([correct], draws).values()]
    assert scores == sorted(scores) and scores[0] == correct / draws and scores[-1] == (correct > 0)


def test_pass_scores_are_of_powers_of_two_and_of_all_draws() -> None:
    assert pass_scores([0, 1], 1) == {}
    assert list(pass_scores([0, 3], 8)) == [1, 2, 4, 8] and list(pass_scores([], 10)) == [1, 2, 4, 8, 10]
    assert pass_scores([0, 1, 3], 3) == {1: [0, 1 / 3, 1], 2: [0, 2 / 3, 1], 3: [0, 1, 1]}


# mcnemar_exact


@pytest.mark.parametrize(("only_a", "only_b"), [(-1, 3), (3, -1)])
def test_mcnemar_refuses_negative_counts(only_a: int, only_b: int) -> None:
    with pytest.raises(AssertionError):
        mcnemar_exact(only_a, only_b)


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [  # scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 0.0625),
        (5, 5, 1.0),
        (10, 3, 0.09228515625),
        (3, 10, 0.09228515625),
        (2, 9, 0.0654296875),
        (121, 59, 4.4344492637551645e-06),
        (1500, 1400, 0.06598734966518463),
        (6000, 5500, 3.2572139388351413e-06),
        (4000, 100, 0.0),
    ],
)
def test_mcnemar_equals_scipy(only_a: int, only_b: int, expected: float) -> None:
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_a_probability_and_has_no_sides(only_a: int, only_b: int) -> None:
    p = mcnemar_exact(only_a, only_b)
    assert 0 <= p <= 1 and p == mcnemar_exact(only_b, only_a)
    assert p >= mcnemar_exact(only_a, only_b + 1) or only_b < only_a  # further apart is never less surprising


@pytest.mark.parametrize("disagreements", [4, 12, 50, 200])
def test_mcnemar_rejects_equals_no_more_often_than_it_says(disagreements: int) -> None:
    """Exact: given the disagreements, only_a is binomial with probability 1/2 when both are equally good."""
    rejected = sum(
        math.comb(disagreements, only_a) / 2**disagreements
        for only_a in range(disagreements + 1)
        if mcnemar_exact(only_a, disagreements - only_a) <= 0.05
    )
    assert rejected <= 0.05 and (disagreements < 6 or rejected > 0.02)


# paired_bootstrap


@pytest.mark.parametrize(
    ("items", "gained", "confidence", "expected"),
    [  # b alone right on some, never wrong: the bootstrap mean is binomial(items, gained / items) / items; binom.ppf
        (50, 10, 0.95, (0.1, 0.32)),
        (50, 10, 0.9, (0.12, 0.3)),
        (200, 3, 0.9, (0.005, 0.03)),
        (1000, 400, 0.95, (0.37, 0.43)),
    ],
)
def test_bootstrap_equals_its_exact_distribution(
    items: int, gained: int, confidence: float, expected: tuple[float, float]
) -> None:
    b = np.arange(items) < gained
    got = paired_bootstrap(np.zeros(items), b.astype(float), draws=20_000, confidence=confidence)
    assert got == pytest.approx(expected, abs=1.01 / items)  # quantiles of whole counts: at most one count off


def test_bootstrap_of_gains_and_losses_and_of_shares_equals_scipy() -> None:
    # scipy.stats.bootstrap((b - a,), np.mean, n_resamples=400_000, method="percentile")
    a = np.array([0] * 20 + [1] * 8 + [0] * 30 + [1] * 42)
    b = np.array([1] * 20 + [0] * 8 + [0] * 30 + [1] * 42)
    assert paired_bootstrap(a, b, draws=40_000) == pytest.approx((0.02, 0.22), abs=0.0101)
    assert paired_bootstrap(b, a, draws=40_000) == pytest.approx((-0.22, -0.02), abs=0.0101)
    a = np.array([0, 0.25, 0.5, 1, 0.75, 0.25, 0, 0.5, 1, 0.25])
    b = np.array([0.5, 0.25, 0.25, 1, 1, 0.75, 0.25, 0.5, 0.75, 0.5])
    assert paired_bootstrap(a, b, draws=40_000) == pytest.approx((-0.025, 0.275), abs=0.0251)
    assert paired_bootstrap(a, b, draws=40_000, confidence=0.8) == pytest.approx((0.025, 0.225), abs=0.0251)


def test_bootstrap_pairs_the_items() -> None:
    """Scores that vary much but differ by the same amount everywhere: unpaired, the interval would be wide."""
    a = np.linspace(0, 0.5, 65)
    assert paired_bootstrap(a, a + 0.25) == pytest.approx((0.25, 0.25))
    assert paired_bootstrap(a, a) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([0.5], [0.5, 1.0]), ([[0.0, 1.0]], [[1.0, 1.0]])], ids=["none", "unpaired", "a table"]
)
def test_bootstrap_refuses_what_is_not_in_pairs(a: list, b: list) -> None:
    with pytest.raises(AssertionError):
        paired_bootstrap(np.array(a), np.array(b))


def test_bootstrap_depends_on_the_seed_alone_and_not_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(70), rng.random(70)
    whole = paired_bootstrap(a, b, draws=500)
    assert whole == paired_bootstrap(a, b, draws=500) != paired_bootstrap(a, b, draws=500, seed=1)
    assert {type(end) for end in whole} == {float}  # printed and written as plain numbers
    rng, sizes = np.random.default_rng(0), []

    def multinomial(total: int, shares: np.ndarray, size: int) -> np.ndarray:
        sizes.append(size)
        return rng.multinomial(total, shares, size)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: SimpleNamespace(multinomial=multinomial))
    monkeypatch.setattr(stats, "CHUNK_COUNTS", 561)
    assert paired_bootstrap(a, b, draws=500) == pytest.approx(whole, rel=1e-12)
    assert sizes == [8] * 62 + [4]  # 8 draws of 70 different differences are 560 counts


def test_bootstrap_leaves_out_0_for_equals_about_one_time_in_twenty() -> None:
    """A small form of benchmarks/interval_coverage.py: 400 items, 30 % disagreements, no true difference."""
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 1.0], size=(400, 400), p=[0.15, 0.7, 0.15])
    intervals = [paired_bootstrap(np.zeros(400), row, draws=500, seed=i) for i, row in enumerate(differences)]
    outside = sum(not low <= 0 <= high for low, high in intervals)
    assert 8 <= outside <= 36  # 20 expected, standard deviation 4.4


# chat_core


def test_chat_core_is_the_mean_above_chance() -> None:
    perfect = dict.fromkeys(CHAT_CORE_CHANCE, 1.0)
    assert chat_core(perfect) == 1.0
    assert chat_core(dict(CHAT_CORE_CHANCE)) == 0.0
    accuracy = {"arc_easy": 0.625, "arc_challenge": 0.25, "mmlu": 0.4, "gsm8k": 0.1, "humaneval": 0.0}
    # (0.5 + 0 + 0.2 + 0.1 + 0 + 0.4) / 6
    assert chat_core({**accuracy, "spelling_bee": 0.4, "simple_spelling": 0.9}) == pytest.approx(0.2)


@pytest.mark.parametrize("missing", CHAT_CORE_CHANCE)
def test_no_chat_core_without_all_six(missing: str) -> None:
    assert chat_core({task: 1.0 for task in CHAT_CORE_CHANCE if task != missing}) is None
