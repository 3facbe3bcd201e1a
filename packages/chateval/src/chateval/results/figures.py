"""Every figure of a results folder, computed from its items: scores with intervals per task, and ChatCORE.

`write_report` (report.py) writes them to results.json.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct, to_builtins

from chateval.errors import ResultsError
from chateval.results.intervals import CHAT_CORE_CHANCE, chat_core, pass_scores, wilson_interval
from chateval.results.items import Item
from chateval.results.run_file import RUN_NAME, Run, RunTask

Answers = dict[str, list[Item]]  # the draws of each item of a task
RESULTS_NAME, RESULTS_FORMAT, VERSION = "results.json", "chateval-results", 1

# Fields that the items of one kind of scoring must have
SCORING_FIELDS = {"categorical": ("tie", "margin", "letter_mass"), "code": ()}
SCORING_FIELDS |= {"generative": ("flexible_correct", "tool_calls", "tool_failures")}


class Score(Struct, frozen=True):
    """Right answers among finished items. With several draws, an item's score is their mean."""

    items: int
    correct: float  # sum of item scores
    accuracy: float | None  # mean of item scores; None for no items
    interval: tuple[float, float]  # Wilson, 95 %


class TaskResult(Struct, frozen=True, kw_only=True):
    """Figures of one task over its finished items, those with all their draws. None: does not apply, or no items."""

    scoring: str
    chance: float
    draws: int
    expected: int  # items to be answered
    unfinished: int  # items with only some of their draws, in no figure
    score: Score
    pass_at: dict[int, Score]  # k → pass@k, see `pass_scores`
    clean: Score | None = None  # if a firewall file checked the task: items that no training document holds,
    flagged: Score | None = None  # and items that one holds
    subjects: dict[str, Score]
    flexible: Score | None = None  # generative: graded by the last number anywhere
    endings: dict[str, int]  # number of draws per ending
    ties: int | None = None  # categorical: draws in which several letters shared the best logit
    mean_margin: float | None = None  # categorical: best letter logit - second best
    mean_letter_mass: float | None = None  # categorical: probability of all letters together
    tool_calls: int | None = None  # generative
    tool_failures: int | None = None
    bits_per_byte: float | None  # of the gold answers
    bits_per_byte_answers: int  # that it was measured on
    mean_generated_tokens: float | None

    @property
    def complete(self) -> bool:
        return self.score.items == self.expected

    def to_json(self) -> dict[str, Any]:
        record = to_builtins(self)
        return {"complete": self.complete, **record.pop("score"), **record}


class Results(Struct, frozen=True):
    """Figures of a run, with its tasks in the run's order."""

    weights_sha256: str
    checkpoint: str
    step: int | None
    tasks: dict[str, TaskResult]
    chat_core: float | None
    chat_core_missing: tuple[str, ...]  # ChatCORE tasks that are not scored completely

    def to_json(self) -> dict[str, Any]:
        """Plain data, floats not rounded."""
        tasks = {name: task.to_json() for name, task in self.tasks.items()}
        return {"format": RESULTS_FORMAT, "version": VERSION, **to_builtins(self), "tasks": tasks}


def compute_results(run: Run, items: Iterable[Item]) -> Results:
    """Compute every figure from the items, in any order.

    With several draws, an item's score is the mean over its draws, accuracy the mean of item scores, and the interval
    Wilson's with n = items. That is conservative: a mean of draws in 0..1 varies at most as much as one right-or-wrong
    answer with the same expectation, p(1 − p), so the true interval is narrower. Counting draws as n would be too
    narrow, because draws of one item are not independent. All this holds for pass@k as well.
    Raises ResultsError for items that the run does not list.
    """
    finished, unfinished = finished_items(run, items)
    flagged = run.firewall.flagged if run.firewall else {}
    tasks = {n: _task_result(task, finished[n], unfinished[n], flagged.get(n)) for n, task in run.tasks.items()}
    # under a limit a task may be complete, but it is not what ChatCORE means
    whole = {name for name, task in run.tasks.items() if task.rows in (None, task.items)}
    accuracy = {n: t.score.accuracy for n, t in tasks.items() if n in whole and t.complete and t.score.items}
    missing = tuple(name for name in CHAT_CORE_CHANCE if name not in accuracy)
    return Results(run.weights_sha256, run.checkpoint, run.step, tasks, chat_core(accuracy), missing)


def finished_items(run: Run, items: Iterable[Item]) -> tuple[dict[str, Answers], dict[str, int]]:
    """Per task: the draws of each finished item in order, and the number of unfinished items.

    Raises ResultsError for items that the run does not list, or without a field that their scoring needs.
    """
    grouped: dict[str, dict[str, dict[int, Item]]] = {name: {} for name in run.tasks}
    for item in items:
        task = run.tasks.get(item.task)
        if task is None:
            raise ResultsError(f"item {item.item!r} is of task {item.task}, which {RUN_NAME} does not list")
        if not 0 <= item.draw < task.draws:
            raise ResultsError(f"{item.task} item {item.item!r}: draw {item.draw} of a task with {task.draws} draws")
        for name in SCORING_FIELDS[task.scoring]:
            if getattr(item, name) is None:
                raise ResultsError(f"{item.task} item {item.item!r}: no {name}, and the task is {task.scoring}")
        grouped[item.task].setdefault(item.item, {})[item.draw] = item
    finished, unfinished = {}, {}
    for name, task in run.tasks.items():
        if len(grouped[name]) > task.items:
            raise ResultsError(f"{name}: {len(grouped[name])} items, but {RUN_NAME} lists {task.items}")
        whole = {item: draws for item, draws in grouped[name].items() if len(draws) == task.draws}
        finished[name] = {item: [draws[draw] for draw in range(task.draws)] for item, draws in whole.items()}
        unfinished[name] = len(grouped[name]) - len(finished[name])
    return finished, unfinished


def _task_result(task: RunTask, items: Answers, unfinished: int, flagged: Sequence[str] | None) -> TaskResult:
    """`flagged`: items that training documents hold; None if that was not checked."""
    answers = [answer for draws in items.values() for answer in draws]
    by_subject = defaultdict(list)
    for answer in answers:
        by_subject[answer.subject].append(answer)
    held = None if flagged is None else set(flagged)
    gold = [answer for answer in answers if None not in (answer.gold_nats, answer.gold_bytes)]
    gold_bytes = sum(_values(gold, "gold_bytes"))
    passes = pass_scores([sum(_values(draws, "correct")) for draws in items.values()], task.draws)
    asked = {"scoring": task.scoring, "chance": task.chance, "draws": task.draws, "expected": task.items}
    return TaskResult(
        **asked,
        unfinished=unfinished,
        score=_score(answers, task.draws),
        pass_at={k: _mean_score(math.fsum(scores), len(scores)) for k, scores in passes.items()},
        subjects={subject: _score(by_subject[subject], task.draws) for subject in sorted(by_subject.keys() - {None})},
        endings=dict(sorted(Counter(answer.ending for answer in answers).items())),
        bits_per_byte=math.fsum(_values(gold, "gold_nats")) / (math.log(2) * gold_bytes) if gold_bytes else None,
        bits_per_byte_answers=len(gold),
        mean_generated_tokens=_mean(answers, "num_tokens"),
        clean=None if held is None else _score([each for each in answers if each.item not in held], task.draws),
        flagged=None if held is None else _score([each for each in answers if each.item in held], task.draws),
        **_scoring_figures(answers, task),
    )


def _scoring_figures(answers: Sequence[Item], task: RunTask) -> dict[str, Any]:
    """The figures that only one kind of scoring has."""
    if task.scoring == "categorical":
        means = {f"mean_{field}": _mean(answers, field) for field in ("margin", "letter_mass")}
        return {"ties": sum(_values(answers, "tie")), **means}
    if task.scoring == "generative":
        calls = {field: sum(_values(answers, field)) for field in ("tool_calls", "tool_failures")}
        return {"flexible": _score(answers, task.draws, "flexible_correct"), **calls}
    return {}


def _score(answers: Sequence[Item], draws: int, field: str = "correct") -> Score:
    """Score of whole items with `draws` answers each: the sum over all draws ÷ draws is the sum of item means."""
    num_items, num_correct = len(answers) // draws, sum(_values(answers, field))
    total = num_correct / draws if num_correct % draws else num_correct // draws  # 812, not 812.0
    return _mean_score(total, num_items)


def _mean_score(total: float, num_items: int) -> Score:
    return Score(num_items, total, total / num_items if num_items else None, wilson_interval(total, num_items))


def _values(answers: Sequence[Item], field: str) -> list[Any]:
    return [getattr(answer, field) for answer in answers]


def _mean(answers: Sequence[Item], field: str) -> float | None:
    # fsum does not depend on the order of the lines
    return math.fsum(_values(answers, field)) / len(answers) if answers else None
