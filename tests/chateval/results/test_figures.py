"""Figures follow from the items, whatever their order."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chateval.errors import ResultsError
from chateval.results.report import write_report
from chateval.results.run_file import write_run


def test_figures_of_a_categorical_task(item, task_of, compute) -> None:
    answers = [
        item("mmlu", "0", "categorical", subject="law", correct=True, margin=1.0, letter_mass=0.5, tie=True),
        item("mmlu", "1", "categorical", subject="law", correct=False, margin=2.0, letter_mass=0.25),
        item("mmlu", "2", "categorical", subject="art", correct=True, margin=4.5, letter_mass=0.75),
    ]
    answers[0] |= {"gold_nats": math.log(2), "gold_bytes": 1}
    answers[1] |= {"gold_nats": 2 * math.log(2), "gold_bytes": 5}
    task = compute({"mmlu": task_of(3, "categorical", 0.25)}, *answers).tasks["mmlu"]
    assert task.complete and task.unfinished == 0
    assert (task.score.items, task.score.correct, task.score.accuracy) == (3, 2, pytest.approx(2 / 3))
    assert task.score.interval == pytest.approx((0.20765960080204768, 0.9385080552796038))  # scipy
    assert {name: (s.items, s.correct, s.accuracy) for name, s in task.subjects.items()} == {
        "art": (1, 1, 1.0),
        "law": (2, 1, 0.5),
    }
    assert (task.ties, task.mean_margin, task.mean_letter_mass) == (1, 2.5, 0.5)
    assert (task.bits_per_byte, task.bits_per_byte_answers) == (pytest.approx(3 / 6), 2)
    assert task.endings == {"letter": 3} and task.mean_generated_tokens == 6.0
    assert task.flexible is None and task.tool_calls is None and task.tool_failures is None


def test_figures_of_a_generative_task(item, task_of, compute) -> None:
    answers = [
        item(name="0", correct=False, num_tokens=10),
        item(name="1", correct=False, flexible_correct=False, tool_calls=0, tool_failures=0, ending="max_tokens"),
    ]
    task = compute({"gsm8k": task_of(2)}, *answers).tasks["gsm8k"]
    assert task.flexible is not None
    assert (task.score.accuracy, task.flexible.accuracy, task.flexible.correct) == (0.0, 0.5, 1)
    assert task.score.interval[0] == 0.0 and task.flexible.interval[0] > 0
    assert (task.tool_calls, task.tool_failures, task.mean_generated_tokens) == (2, 1, 8.0)
    assert task.endings == {"assistant_end": 1, "max_tokens": 1}
    assert task.ties is None and task.bits_per_byte is None and task.bits_per_byte_answers == 0


def test_an_incomplete_task_is_flagged_and_gives_no_chat_core(item, task_of, compute) -> None:
    six = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee")
    tasks = {name: task_of(2, "code", 0.25 if i < 3 else 0.0) for i, name in enumerate(six)}
    answers = [item(name, str(i), "code", correct=i == 0 or name == "gsm8k") for name in six for i in range(2)]
    whole = compute(tasks, *answers)
    # three tasks at (0.5 − 0.25) / 0.75, two at 0.5, one at 1
    assert whole.chat_core == pytest.approx((3 / 3 + 0.5 + 0.5 + 1) / 6) and whole.chat_core_missing == ()
    less = compute(tasks, *answers[:-1])
    assert not less.tasks["spelling_bee"].complete and less.tasks["humaneval"].complete
    assert less.tasks["spelling_bee"].score.accuracy == 1.0  # what is there is still shown
    assert less.chat_core is None and less.chat_core_missing == ("spelling_bee",)
    limited = compute(tasks | {"mmlu": tasks["mmlu"] | {"rows": 14042}}, *answers)
    assert limited.tasks["mmlu"].complete and limited.chat_core_missing == ("mmlu",)
    none = compute({"mmlu": task_of(0, "code")})
    assert none.chat_core is None and none.chat_core_missing == six
    assert none.tasks["mmlu"].score.accuracy is None and none.tasks["mmlu"].score.interval == (0.0, 1.0)


def test_several_draws_are_averaged_per_item_and_part_of_them_is_no_item(item, task_of, compute) -> None:
    right = {("a", 0): True, ("a", 1): False, ("a", 2): True, ("b", 2): True, ("b", 1): True, ("b", 0): True}
    answers = [item(name=name, draw=draw, correct=correct) for (name, draw), correct in right.items()]
    answers += [item(name="c", draw=draw, correct=False) for draw in (0, 2)]
    task = compute({"gsm8k": task_of(3, draws=3)}, *answers).tasks["gsm8k"]
    assert (task.score.items, task.unfinished, task.complete) == (2, 1, False)
    assert task.score.correct == pytest.approx(5 / 3) and task.score.accuracy == pytest.approx(5 / 6)
    assert task.pass_at[1].accuracy == pytest.approx(5 / 6)
    assert task.pass_at[1].interval == pytest.approx(task.score.interval)
    assert {k: (score.items, score.accuracy) for k, score in task.pass_at.items() if k > 1} == {2: (2, 1), 3: (2, 1)}
    low, high = task.score.interval  # n = 2 items, not 6 draws
    assert high - low > 0.6
    assert sum(task.endings.values()) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "mmlu"}, "item 'main test 0' is of task mmlu, which run.json does not list"),
        ({"draw": 1}, "gsm8k item 'main test 0': draw 1 of a task with 1 draws"),
        ({"flexible_correct": None}, "gsm8k item 'main test 0': no flexible_correct, and the task is generative"),
        ({"item": "another"}, "gsm8k: 2 items, but run.json lists 1"),
    ],
)
def test_items_that_the_run_does_not_list_are_refused(
    item, task_of, compute, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ResultsError) as error:
        compute({"gsm8k": task_of(1)}, item(), {**item(), **changes})
    assert str(error.value) == message


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from(["x", "y"]), st.floats(0, 9)), max_size=30),
    st.sampled_from([1, 2, 3]),
    st.randoms(use_true_random=False),
)
def test_figures_do_not_depend_on_the_order_and_intervals_hold_them(
    item, task_of, compute, drawn: list[tuple[bool, bool, str, float]], draws: int, shuffle: random.Random
) -> None:
    answers = [
        item(name=str(i // draws), draw=i % draws, correct=correct, flexible_correct=flexible, gold_nats=nats)
        | {"subject": "xy"[i // draws % 2], "ending": ending, "gold_bytes": 3}
        for i, (correct, flexible, ending, nats) in enumerate(drawn)
    ]
    tasks = {"gsm8k": task_of(30, draws=draws)}
    results = compute(tasks, *answers)
    shuffle.shuffle(answers)
    assert json.dumps(compute(tasks, *answers).to_json()) == json.dumps(results.to_json())
    task = results.tasks["gsm8k"]
    for score in (task.score, task.flexible, *task.subjects.values()):
        assert score is not None
        assert score.accuracy is None or score.interval[0] <= score.accuracy <= score.interval[1]
    assert sum(score.items for score in task.subjects.values()) == task.score.items == len(drawn) // draws
    assert math.isclose(sum(score.correct for score in task.subjects.values()), task.score.correct)


def test_results_are_recomputed_from_the_items(item, task_of, run_of, write_items, tmp_path: Path) -> None:
    write_run(tmp_path, run_of({"gsm8k": task_of(3)}))
    write_items(tmp_path / "items.jsonl", item(name="a"), item(name="b", correct=False))
    (tmp_path / "results.json").write_text("an older one")
    results = write_report(tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == json.loads(json.dumps(results.to_json()))
    assert (stored["format"], stored["version"], stored["weights_sha256"]) == ("chateval-results", 1, "a" * 64)
    task = stored["tasks"]["gsm8k"]
    assert (task["items"], task["expected"], task["complete"]) == (2, 3, False)
    assert (task["correct"], task["accuracy"]) == (1, 0.5)
    assert task["interval"] == [0.09453120573423074, 0.9054687942657693]  # scipy's, to the last digit: not rounded
