"""What a task is, and finding tasks: the shipped ones and those of `--task-file`.

A task file defines `TASK = Task(...)`. Rows come from a source (Hub dataset, `--data-dir`, a path) or are generated;
`to_conversation(row)` turns one into the common form of conversation.py. docs/add_a_task.md builds one in 30 lines.
"""

import hashlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from chatdata.errors import ChatdataError, TaskError
from chatdata.grading import Grade


@dataclass(frozen=True)
class Option:
    """A recipe key that a task adds: its type, its default, and whether it names a file (resolved like a path)."""

    type: type
    default: Any = None
    is_file: bool = False
    required: bool = False


@dataclass(frozen=True)
class ScoredSet:
    """The rows of a task that checkpoints are scored on, under their own name.

    chance: accuracy of blind guessing. rows: how many, for a generated task. options: task options set for scoring.
    """

    split: str = "test"
    subset: str = ""
    chance: float = 0.0
    rows: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """How an answer to a row is graded. Exactly one of `letters`, `grade` and `program` is given.

    sets: name for `chateval run --tasks` → its rows.
    letters: row → the letters to choose from (multiple choice: the letter with the highest logit is the answer).
    grade: (row, generated text without tool calls) → Grade.
    program: (row, generated text) → a Python program that ends without an error if the answer is right.
    subject_key: the row's key by which figures are also given separately.
    word: row → the word it is about. A training row about a scored word is contaminated, whatever its question.
    """

    sets: Mapping[str, ScoredSet]
    letters: Callable[[Any], Sequence[str]] | None = None
    grade: Callable[[Any, str], Grade] | None = None
    program: Callable[[Any, str], str] | None = None
    subject_key: str | None = None
    word: Callable[[Any], str] | None = None

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.letters, self.grade, self.program)) != 1:
            raise TaskError("Scoring(...): give exactly one of letters, grade and program")


@dataclass(frozen=True)
class Task:
    """A task: what the recipe key `task = "name"` means.

    to_conversation: raw row → conversation in the common form (for kind "text": row → str). It raises TaskError
        naming the key when a row does not fit.
    hub: dataset on the Hub, `owner/name`; None if rows are generated or come from a path.
    splits: subset → split → rows in the full dataset on the Hub (0 where it varies). The subset "" is the folder
        `data/`. Without a subset in the recipe, the first one is used.
    generate: (split, options) → (position → raw row), for tasks that make their rows.
    permuted: rows are ordered by `numpy.random.default_rng(42).permutation(n)` before anything is selected.
    scored_only: the scorer uses it; a build refuses it.
    scoring: how chateval grades answers to its rows, if it does.
    kind: "conversation", or "text" for plain text (stage base).
    rows_are_conversations: `to_conversation` returns the row as it is, so that Parquet is rendered column by column.
    """

    name: str
    summary: str
    licence: str
    to_conversation: Callable[[Any], Any]
    splits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    hub: str | None = None
    generate: Callable[[str, Mapping[str, Any]], Callable[[int], Any]] | None = None
    permuted: bool = False
    scored_only: bool = False
    scoring: Scoring | None = None
    kind: str = "conversation"
    rows_are_conversations: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    # only for a user's own task file: its content is part of the build
    code_sha256: str | None = None
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("conversation", "text"):
            raise TaskError(f'task "{self.name}": kind is {self.kind!r}, must be "conversation" or "text"')
        for name, scored in self.scoring.sets.items() if self.generate and self.scoring else ():
            if scored.rows is None:
                right = f'ScoredSet "{name}" must say how many, rows = N'
                raise TaskError(f'task "{self.name}": rows are generated; {right}')

    def __reduce__(self) -> tuple[Any, ...]:
        """A task is sent to a worker by name: its functions need not be importable there."""
        return _task_again, (self.name, self.file, self.code_sha256)


def _task_again(name: str, file: Path | None, code_sha256: str | None) -> Task:
    if file is None:
        return load_tasks()[name]
    task = _load_task_file(file)
    if task.code_sha256 != code_sha256:
        raise TaskError(f"{file}: not the file the build started with")
    return task


def one_turn(question: str, answer: Any) -> dict[str, Any]:
    """The conversation of a question and its answer, a text or parts."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def call_task(task: Task, function: Callable[..., Any], row: Any, *arguments: Any) -> Any:
    """Call one of a task's functions on a row. Anything that goes wrong is a ChatdataError: tasks are users' code.

    A row that could not be read is the ChatdataError that says why.
    """
    if isinstance(row, ChatdataError):
        raise row
    try:
        return function(row, *arguments)
    except ChatdataError:
        raise
    except Exception as error:
        reason = f'no key "{error.args[0]}"' if isinstance(error, KeyError) else f"{type(error).__name__} {error}"
        raise TaskError(f'the row does not fit task "{task.name}": {reason}') from error


def load_tasks(task_files: tuple[Path, ...] = ()) -> dict[str, Task]:
    """All shipped tasks by name, in alphabetical order, then those of `task_files`.

    Raises TaskError if a file does not define TASK, cannot be imported, or repeats a name.
    """
    names = (name for _, name, _ in pkgutil.iter_modules([str(Path(__file__).parent)]))
    shipped = (import_module(f"chatdata.tasks.{name}") for name in names)
    tasks = {module.TASK.name: module.TASK for module in shipped if hasattr(module, "TASK")}
    for path in task_files:
        task = _load_task_file(path)
        if task.name in tasks:
            raise TaskError(f'{path}: the task name "{task.name}" is taken; choose another')
        tasks[task.name] = task
    return tasks


def _load_task_file(path: Path) -> Task:
    if not path.is_file():
        raise TaskError(f"{path}: no such task file")
    spec = importlib.util.spec_from_file_location(f"chatdata_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path}: a task file is a Python file ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TaskError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise TaskError(f"{path}: defines no TASK = chatdata.tasks.Task(...)")
    return replace(task, code_sha256=hashlib.sha256(path.read_bytes()).hexdigest(), file=path.resolve())
