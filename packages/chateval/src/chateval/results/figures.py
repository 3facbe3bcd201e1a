"""A results folder: run.json (what is scored), items*.jsonl (one line per item and draw), results.json (the figures).

The items are the primary result, appended line by line (see items.py); every figure is computed from them.

    OUT/run.json        weights, settings and tasks: {"format": "chateval-run", "version": 1, ...}
    OUT/items.jsonl     in the tasks' order once all are answered; until then in any, and further ranks' in files apart
    OUT/results.json    compute_results(read_run(OUT), read_items(OUT)), by write_report
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatdata.disk import naming, write_whole
from chateval.errors import ResultsError
from chateval.results.intervals import CHAT_CORE_CHANCE, chat_core, wilson_interval
from chateval.results.items import Item

RUN_FORMAT, RESULTS_FORMAT, VERSION = "chateval-run", "chateval-results", 1
RUN_NAME, RESULTS_NAME = "run.json", "results.json"

RUN_FIELDS = {"weights_sha256": str, "checkpoint": str, "step": int | None, "settings": dict, "tasks": dict}
TASK_FIELDS = {"scoring": str, "chance": int | float, "items": int, "draws": int, "source": dict}
# What only items of one kind of scoring have, and must have
SCORING_FIELDS = {
    "categorical": ("tie", "margin", "letter_mass"),
    "generative": ("flexible_correct", "tool_calls", "tool_failures"),
    "code": (),
}


@dataclass(frozen=True)
class Score:
    """Right answers among finished items. With several draws an item's score is its mean over them."""

    items: int
    correct: float  # sum of item scores
    accuracy: float | None  # mean of item scores; None for no items
    interval: tuple[float, float]  # Wilson, 95 %


@dataclass(frozen=True)
class TaskResult:
    """Figures of one task, over its finished items: those with all their draws. None: does not apply, or no items."""

    scoring: str
    chance: float
    draws: int
    expected: int  # items the run is to answer
    unfinished: int  # items with only some of their draws, in no figure
    score: Score
    # where a firewall file checked the set: items that no training document holds, and those that one holds
    clean: Score | None
    flagged: Score | None
    subjects: dict[str, Score]
    flexible: Score | None  # generative: any last number counts, whatever stands around it
    endings: dict[str, int]  # draws by why they ended
    ties: int | None  # categorical: draws where several letters shared the best logit
    mean_margin: float | None  # categorical: best letter logit - second best
    mean_letter_mass: float | None  # categorical: probability of all letters together
    tool_calls: int | None
    tool_failures: int | None
    bits_per_byte: float | None  # of the gold answers
    bits_per_byte_answers: int  # it was measured on
    mean_generated_tokens: float | None

    @property
    def complete(self) -> bool:
        return self.score.items == self.expected

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        return {"complete": self.complete, **record.pop("score"), **record}


@dataclass(frozen=True)
class Results:
    """Figures of a run, task by task in the run's order."""

    weights_sha256: str
    checkpoint: str
    step: int | None
    tasks: dict[str, TaskResult]
    chat_core: float | None
    chat_core_missing: tuple[str, ...]  # tasks of ChatCORE not scored completely

    def to_json(self) -> dict[str, Any]:
        """Plain data, floats not rounded."""
        tasks = {name: task.to_json() for name, task in self.tasks.items()}
        return {"format": RESULTS_FORMAT, "version": VERSION, **asdict(self), "tasks": tasks}


def write_run(out: Path, run: Mapping[str, Any]) -> None:
    """Write run.json, making the folder. Raises ResultsError for a run that read_run would refuse."""
    _check_run(run, RUN_NAME)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RUN_NAME, run)


def read_run(out: Path) -> dict[str, Any]:
    """Read run.json. Raises ResultsError when it is not there, damaged or of an unknown version."""
    path = out / RUN_NAME
    if not path.is_file():
        raise ResultsError(f"{out}: not a results folder (no {RUN_NAME}); give the --out of a chateval run")
    try:
        run = json.loads(path.read_bytes())
    except ValueError as error:
        raise ResultsError(f"{path}: damaged, not JSON: {error}") from None
    _check_run(run, str(path))
    return run


def require_same_run(out: Path, run: Mapping[str, Any]) -> None:
    """Raise ResultsError if `out` already holds items of other weights, other settings or other tasks.

    A folder without run.json and without items is fine. The checkpoint's label may differ: the weights are what counts.
    """
    if not (out / RUN_NAME).exists():
        if any(out.glob("items*.jsonl")):
            raise ResultsError(f"{out}: items without {RUN_NAME}, so of unknown weights; use another --out")
        return
    old, new = read_run(out), json.loads(json.dumps(run))
    if old["weights_sha256"] != new["weights_sha256"]:
        had, asked = old["weights_sha256"][:12], new["weights_sha256"][:12]
        raise ResultsError(f"{out}: its items are of weights {had}…, not {asked}…; use another --out")
    for part in ("settings", "tasks"):
        if changed := differences(old[part], new[part]):
            raise ResultsError(f"{out}: its items are of other {part}: {'; '.join(changed)}; use another --out")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Name what differs between two plain-data values, keys joined by dots: ["gsm8k.draws is 1, not 4"]."""
    if isinstance(old, dict) and isinstance(new, dict):
        missing = object()
        pairs = ((key, old.get(key, missing), new.get(key, missing)) for key in {**old, **new})
        found = []
        for key, was, now in pairs:
            path = f"{name}.{key}" if name else key
            if was is missing or now is missing:
                found.append(f"{path} is {'added' if was is missing else 'gone'}")
            else:
                found += differences(was, now, path)
        return found
    return [] if old == new else [f"{name} is {json.dumps(old)}, not {json.dumps(new)}"]


def write_json(path: Path, value: Any) -> None:
    """Write plain data, whole or not at all."""
    with naming(path):
        write_whole(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Plain data as write_json writes it."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def compute_results(run: Mapping[str, Any], items: Iterable[Item]) -> Results:
    """Compute every figure from the items, whatever their order.

    Several draws: an item's score is the mean over its draws, accuracy the mean of item scores, and the interval is
    Wilson's with n = items. That is conservative: a mean of draws in 0..1 varies at most as much as one right-or-wrong
    answer with the same expectation, p(1 − p), so the true interval is narrower. Counting draws as n would be too
    narrow instead: draws of one item are not independent.
    Raises ResultsError for items that the run does not list.
    """
    finished, unfinished = finished_items(run, items)
    flagged = run.get("firewall", {}).get("flagged", {})
    tasks = {
        name: _task_result(task, finished[name], unfinished[name], flagged.get(name))
        for name, task in run["tasks"].items()
    }
    # under a limit a task may be complete, but it is not the task that ChatCORE means
    whole = {name for name, task in run["tasks"].items() if task.get("rows", task["items"]) == task["items"]}
    accuracy = {n: t.score.accuracy for n, t in tasks.items() if n in whole and t.complete and t.score.items}
    return Results(
        weights_sha256=run["weights_sha256"],
        checkpoint=run["checkpoint"],
        step=run["step"],
        tasks=tasks,
        chat_core=chat_core(accuracy),  # type: ignore[arg-type]
        chat_core_missing=tuple(name for name in CHAT_CORE_CHANCE if name not in accuracy),
    )


def finished_items(
    run: Mapping[str, Any], items: Iterable[Item]
) -> tuple[dict[str, dict[str, list[Item]]], dict[str, int]]:
    """Group items by task and item: the draws of each finished item in order, and how many are unfinished per task.

    Raises ResultsError for items that the run does not list, or without a field that their scoring needs.
    """
    grouped: dict[str, dict[str, dict[int, Item]]] = {name: {} for name in run["tasks"]}
    for item in items:
        task = run["tasks"].get(item.task)
        if task is None:
            raise ResultsError(f"item {item.item!r} is of task {item.task}, which {RUN_NAME} does not list")
        if not 0 <= item.draw < task["draws"]:
            raise ResultsError(f"{item.task} item {item.item!r}: draw {item.draw} of a task with {task['draws']} draws")
        for name in SCORING_FIELDS[task["scoring"]]:
            if getattr(item, name) is None:
                raise ResultsError(f"{item.task} item {item.item!r}: no {name}, and the task is {task['scoring']}")
        grouped[item.task].setdefault(item.item, {})[item.draw] = item
    finished, unfinished = {}, {}
    for name, task in run["tasks"].items():
        if len(grouped[name]) > task["items"]:
            raise ResultsError(f"{name}: {len(grouped[name])} items, but {RUN_NAME} lists {task['items']}")
        every_draw = range(task["draws"])
        finished[name] = {
            item: [draws[draw] for draw in every_draw]
            for item, draws in grouped[name].items()
            if len(draws) == len(every_draw)
        }
        unfinished[name] = len(grouped[name]) - len(finished[name])
    return finished, unfinished


def _task_result(
    task: Mapping[str, Any], items: Mapping[str, list[Item]], unfinished: int, flagged: Sequence[str] | None
) -> TaskResult:
    """`flagged`: items that training documents hold, None if that is not known."""
    answers = [answer for draws in items.values() for answer in draws]
    by_subject: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.subject is not None:
            by_subject.setdefault(answer.subject, []).append(answer.correct)
    categorical, generative = task["scoring"] == "categorical", task["scoring"] == "generative"
    gold = [(a.gold_nats, a.gold_bytes) for a in answers if a.gold_nats is not None and a.gold_bytes is not None]
    gold_bytes = sum(num_bytes for _, num_bytes in gold)
    draws = task["draws"]
    held = frozenset(flagged or ())
    apart = {side: [answer.correct for answer in answers if (answer.item in held) is side] for side in (False, True)}
    return TaskResult(
        scoring=task["scoring"],
        chance=task["chance"],
        draws=draws,
        expected=task["items"],
        unfinished=unfinished,
        score=_score([answer.correct for answer in answers], draws),
        clean=_score(apart[False], draws) if flagged is not None else None,
        flagged=_score(apart[True], draws) if flagged is not None else None,
        subjects={subject: _score(by_subject[subject], draws) for subject in sorted(by_subject)},
        flexible=_score([bool(answer.flexible_correct) for answer in answers], draws) if generative else None,
        endings=dict(sorted(Counter(answer.ending for answer in answers).items())),
        ties=sum(bool(answer.tie) for answer in answers) if categorical else None,
        mean_margin=_mean([answer.margin for answer in answers]) if categorical else None,
        mean_letter_mass=_mean([answer.letter_mass for answer in answers]) if categorical else None,
        tool_calls=sum(answer.tool_calls or 0 for answer in answers) if generative else None,
        tool_failures=sum(answer.tool_failures or 0 for answer in answers) if generative else None,
        bits_per_byte=math.fsum(nats for nats, _ in gold) / (math.log(2) * gold_bytes) if gold_bytes else None,
        bits_per_byte_answers=len(gold),
        mean_generated_tokens=_mean([answer.num_tokens for answer in answers]),
    )


def _score(correct: Sequence[bool], draws: int) -> Score:
    """Score of whole items, `draws` answers each: their sum over draws ÷ draws is the sum of item means."""
    num_items, num_correct = len(correct) // draws, sum(correct)
    total = num_correct / draws if num_correct % draws else num_correct // draws  # 812, not 812.0
    return Score(num_items, total, total / num_items if num_items else None, wilson_interval(total, num_items))


def _mean(values: Sequence[Any]) -> float | None:
    return math.fsum(values) / len(values) if values else None  # fsum: the same whatever the order of the lines


def _check_run(run: Any, where: str) -> None:
    """Raise ResultsError unless `run` is a run.json of this version, every field of its type."""
    if not isinstance(run, Mapping) or run.get("format") != RUN_FORMAT:
        raise ResultsError(f"{where}: not a {RUN_FORMAT}")
    if run.get("version") != VERSION:
        raise ResultsError(f"{where}: version {run.get('version')!r}; this chateval reads version {VERSION}")
    _check_fields(run, RUN_FIELDS, where)
    firewall = run.get("firewall", {"flagged": {}})
    if not isinstance(firewall, dict) or not isinstance(firewall.get("flagged"), dict):
        raise ResultsError(f"{where}: firewall is {firewall!r}: it must be an object with `flagged`")
    for name, task in run["tasks"].items():
        if not isinstance(task, Mapping):
            raise ResultsError(f"{where}: task {name} is {task!r}: it must be an object")
        _check_fields(task, TASK_FIELDS, f"{where}: task {name}")
        if task["scoring"] not in SCORING_FIELDS:
            known = ", ".join(SCORING_FIELDS)
            raise ResultsError(f"{where}: task {name}: scoring is {task['scoring']!r}: it must be one of {known}")
        if task["draws"] < 1 or task["items"] < 0 or not 0 <= task["chance"] < 1:
            raise ResultsError(f"{where}: task {name}: needs draws >= 1, items >= 0 and 0 <= chance < 1")


def _check_fields(record: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    for name, kind in types.items():
        if name not in record:
            raise ResultsError(f"{where}: no field {name!r}")
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise ResultsError(f"{where}: {name} is {record[name]!r}: it must be {getattr(kind, '__name__', kind)}")
