"""The results folder: items that survive a kill, runs that are not mixed, figures that follow from the items."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chateval.errors import ChatevalError, ResultsError
from chateval.results.figures import compute_results, differences, read_run, require_same_run, write_json, write_run
from chateval.results.items import append_item, open_items, parse_item, read_items
from chateval.results.report import draw_scores, escape_markdown, markdown_report, show_results, write_report

KINDS = {
    "categorical": {"tie": False, "margin": 1.5, "letter_mass": 0.75, "ending": "letter"},
    "generative": {"flexible_extracted": "5", "flexible_correct": True, "tool_calls": 2, "tool_failures": 1},
    "code": {"ending": "passed"},
}


def item(task: str = "gsm8k", name: str = "main test 0", kind: str = "generative", **changes: Any) -> dict[str, Any]:
    record = {
        "task": task,
        "item": name,
        "subject": None,
        "draw": 0,
        "prompt_sha256": f"sha of {name}",
        "output": "#### 5",
        "extracted": "5",
        "gold": "5",
        "correct": True,
        "ending": "assistant_end",
        "num_prompt_tokens": 40,
        "num_tokens": 6,
        "gold_nats": None,
        "gold_bytes": None,
    }
    return {**record, **KINDS[kind], **changes}


def task_of(items: int, scoring: str = "generative", chance: float = 0.0, draws: int = 1) -> dict[str, Any]:
    return {"scoring": scoring, "chance": chance, "items": items, "draws": draws, "source": {"revision": "abc"}}


def run_of(tasks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    run = {
        "format": "chateval-run",
        "version": 1,
        "weights_sha256": "a" * 64,
        "checkpoint": "runs/d4",
        "step": 120,
        "settings": {"temperature": 0.0, "seed": 42, "stop": ["x", 1]},
        "tasks": tasks,
    }
    return {**run, **changes}


def write_items(path: Path, *items: dict[str, Any]) -> None:
    with open_items(path) as file:
        for record in items:
            append_item(file, record)


def compute(tasks: dict[str, Any], *items: dict[str, Any]):
    return compute_results(run_of(tasks), [parse_item(record) for record in items])


# items


def test_items_come_back_from_several_files_in_any_order(tmp_path: Path) -> None:
    texts = ['a "quoted"\nline\u2028and\x85more', "ünïcode 日本 🙂", "lone \ud800 surrogate", ""]
    records = [item(name=f"main test {i}", output=text) for i, text in enumerate(texts)]
    write_items(tmp_path / "items-00001.jsonl", records[3], records[0])
    write_items(tmp_path / "items.jsonl", records[2], records[1])
    found = {read.item: read for read in read_items(tmp_path)}
    assert {name: read.output for name, read in found.items()} == {r["item"]: r["output"] for r in records}
    assert found["main test 1"] == parse_item(records[1]) and found["main test 1"].gold_nats is None
    assert read_items(tmp_path / "nowhere") == []


def test_a_line_cut_anywhere_is_no_item_and_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    write_items(path, item(name="first"), item(name="second", output="日本"))
    whole = path.read_bytes()
    first_end = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        names = ["first"] * (end >= first_end) + ["second"] * (end == len(whole))
        assert [read.item for read in read_items(tmp_path)] == names
        if end % 50 == 0 or end >= len(whole) - 1:
            write_items(path, item(name="third"))
            assert [read.item for read in read_items(tmp_path)] == [*names, "third"]
            assert path.read_bytes().startswith(whole[:first_end] if names else b'{"task"')


def test_kill_9_loses_no_item_that_was_appended(tmp_path: Path) -> None:
    write_items(tmp_path / "items.jsonl", item(name="before"))
    program = (
        "import json, sys; from pathlib import Path; from chateval.results.items import append_item, open_items\n"
        "record = json.loads(sys.argv[2])\n"
        "with open_items(Path(sys.argv[1])) as file:\n"
        "    for i in range(10**9):\n"
        "        append_item(file, {**record, 'item': f'test {i}'}); print(i, flush=True)\n"
    )
    arguments = [sys.executable, "-c", program, tmp_path / "items.jsonl", json.dumps(item(output="x" * 300))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        told = 20 + len(process.stdout.read().splitlines())
    names = [read.item for read in read_items(tmp_path)]
    assert names[0] == "before" and names[1:] == [f"test {i}" for i in range(len(names) - 1)]
    assert len(names) - 1 in (told - 1, told, told + 1)  # the last number told may be cut, the last item untold
    write_items(tmp_path / "items.jsonl", item(name="after"))
    assert [read.item for read in read_items(tmp_path)] == [*names, "after"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"task": "gsm8k", "it', "line 2: damaged, not JSON"),
        (b"", "line 2: damaged, not JSON"),
        (b"\xff\xfe", "line 2: damaged, not JSON"),
        (b"[1]", "line 2: an item is an object, not list"),
        (json.dumps({**item(), "correct": 1}).encode(), "line 2: correct is 1: it must be bool"),
        (json.dumps({**item(), "draw": True}).encode(), "line 2: draw is True: it must be int"),
        (json.dumps({**item(), "gold": None}).encode(), "line 2: gold is None: it must be str"),
        (json.dumps({**item(), "gold_nats": math.nan}).encode(), "line 2: gold_nats is nan: it must be a finite"),
        (json.dumps({k: v for k, v in item().items() if k != "ending"}).encode(), "line 2: no field 'ending'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    good = [json.dumps(item(name=str(i))).encode() for i in range(2)]
    (tmp_path / "items.jsonl").write_bytes(b"\n".join([good[0], line, good[1], b""]))
    with pytest.raises(ResultsError, match=f"items.jsonl {message}") as error:
        read_items(tmp_path)
    assert isinstance(error.value, ChatevalError) and "\n" not in str(error.value)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with open_items(tmp_path / "items.jsonl") as file:
        with pytest.raises(ResultsError, match=r"mmlu item 'all test 812': margin is nan: it must be a finite number"):
            append_item(file, item("mmlu", "all test 812", "categorical", margin=math.nan))
        with pytest.raises(ResultsError, match=r"margin is '1': it must be float or null"):
            append_item(file, item(kind="categorical", margin="1"))
        append_item(file, item(kind="categorical", margin=1, unknown_field=[1]))
    assert read_items(tmp_path)[0].margin == 1


def test_an_item_twice_counts_once_if_equal_and_is_refused_if_not(tmp_path: Path) -> None:
    write_items(tmp_path / "items.jsonl", item(name="a"), item(name="b"), item(name="a"), item(name="a", draw=1))
    write_items(tmp_path / "items-00001.jsonl", item(name="b"))
    assert sorted(read.key for read in read_items(tmp_path)) == [
        ("gsm8k", "a", 0),
        ("gsm8k", "a", 1),
        ("gsm8k", "b", 0),
    ]
    write_items(tmp_path / "items.jsonl", item(name="c"), item(name="b", correct=False))
    with pytest.raises(
        ResultsError,
        match=r"items-00001.jsonl line 1 and items.jsonl line 6 are both gsm8k item 'b' draw 0, and differ",
    ):
        read_items(tmp_path)


def test_two_runs_cannot_append_to_one_file(tmp_path: Path) -> None:
    with (
        open_items(tmp_path / "items.jsonl"),
        pytest.raises(ResultsError, match=r"items.jsonl: another run is writing there; use another --out"),
    ):
        open_items(tmp_path / "items.jsonl")
    open_items(tmp_path / "items.jsonl").close()


# run.json


def test_a_run_comes_back_and_begins_only_once_with_the_same(tmp_path: Path) -> None:
    out, run = tmp_path / "new" / "out", run_of({"gsm8k": task_of(3)})
    require_same_run(out, run)
    write_run(out, run)
    assert read_run(out) == run
    assert sorted(path.name for path in out.iterdir()) == ["run.json"]
    require_same_run(out, {**run, "checkpoint": "the same weights elsewhere", "step": 121})
    require_same_run(out, {**run, "settings": {**run["settings"], "stop": ("x", 1)}})  # a tuple is JSON's list


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_sha256": "d" * 64}, "its items are of weights aaaaaaaaaaaa…, not dddddddddddd…; use another --out"),
        (
            {"settings": {"temperature": 0.7, "stop": ["x", 1], "top_k": 5}},
            "its items are of other settings: temperature is 0.0, not 0.7; seed is gone; top_k is added; use another",
        ),
        ({"tasks": {"mmlu": task_of(3)}}, "its items are of other tasks: gsm8k is gone; mmlu is added; use another"),
        (
            {"tasks": {"gsm8k": {**task_of(5), "source": {"revision": "def"}}}},
            'its items are of other tasks: gsm8k.items is 3, not 5; gsm8k.source.revision is "abc", not "def"; use',
        ),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = run_of({"gsm8k": task_of(3)})
    write_run(tmp_path, run)
    with pytest.raises(ResultsError) as error:
        require_same_run(tmp_path, {**run, **changes})
    assert str(error.value).startswith(f"{tmp_path}: {message}")


def test_items_without_a_run_are_refused(tmp_path: Path) -> None:
    write_items(tmp_path / "items-00001.jsonl", item())
    with pytest.raises(ResultsError, match=r"items without run.json, so of unknown weights; use another --out"):
        require_same_run(tmp_path, run_of({}))
    with pytest.raises(ResultsError, match=r"not a results folder \(no run.json\)"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "chatdata"}, "not a chateval-run"),
        ({"version": 2}, "version 2; this chateval reads version 1"),
        ({"settings": None}, "settings is None: it must be dict"),
        ({"step": "1"}, "step is '1': it must be int | None"),
        ({"tasks": {"gsm8k": 1}}, "task gsm8k is 1: it must be an object"),
        ({"tasks": {"gsm8k": {**task_of(3), "scoring": "guess"}}}, "must be one of categorical, generative, code"),
        ({"tasks": {"gsm8k": {**task_of(3), "items": True}}}, "task gsm8k: items is True: it must be int"),
        ({"tasks": {"gsm8k": {**task_of(3), "draws": 0}}}, "needs draws >= 1"),
        ({"tasks": {"gsm8k": {**task_of(3), "chance": 1}}}, "0 <= chance < 1"),
        ({"tasks": {"gsm8k": {"scoring": "code"}}}, "task gsm8k: no field 'chance'"),
    ],
)
def test_a_run_that_says_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = {**run_of({"gsm8k": task_of(3)}), **changes}
    with pytest.raises(ResultsError) as error:
        write_run(tmp_path / "out", run)
    assert message in str(error.value) and not (tmp_path / "out").exists()
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ResultsError) as error:
        read_run(tmp_path)
    assert message in str(error.value) and str(tmp_path / "run.json") in str(error.value)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResultsError, match=r"run.json: damaged, not JSON"):
        read_run(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": 2, "b": math.nan})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": 2, "b": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=3),
        lambda x: st.dictionaries(st.text(max_size=2), x, max_size=3),
        max_leaves=6,
    )
)
def test_nothing_differs_from_itself(value: Any) -> None:
    assert differences(value, json.loads(json.dumps(value))) == []


# figures


def test_figures_of_a_categorical_task() -> None:
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


def test_figures_of_a_generative_task() -> None:
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


def test_an_incomplete_task_is_flagged_and_gives_no_chat_core() -> None:
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


def test_several_draws_are_averaged_per_item_and_part_of_them_is_no_item() -> None:
    right = {("a", 0): True, ("a", 1): False, ("a", 2): True, ("b", 2): True, ("b", 1): True, ("b", 0): True}
    answers = [item(name=name, draw=draw, correct=correct) for (name, draw), correct in right.items()]
    answers += [item(name="c", draw=draw, correct=False) for draw in (0, 2)]
    task = compute({"gsm8k": task_of(3, draws=3)}, *answers).tasks["gsm8k"]
    assert (task.score.items, task.unfinished, task.complete) == (2, 1, False)
    assert task.score.correct == pytest.approx(5 / 3) and task.score.accuracy == pytest.approx(5 / 6)
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
def test_items_that_the_run_does_not_list_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultsError) as error:
        compute({"gsm8k": task_of(1)}, item(), {**item(), **changes})
    assert str(error.value) == message


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from(["x", "y"]), st.floats(0, 9)), max_size=30),
    st.sampled_from([1, 2, 3]),
    st.randoms(use_true_random=False),
)
def test_figures_do_not_depend_on_the_order_and_intervals_hold_them(
    drawn: list[tuple[bool, bool, str, float]], draws: int, shuffle: random.Random
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


def test_results_are_recomputed_from_the_items(tmp_path: Path) -> None:
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


# for people


SIX_AND_MORE = {
    "arc_challenge": task_of(1172, "categorical", 0.25),
    "mmlu": task_of(14042, "categorical", 0.25),
    "gsm8k": task_of(1319),
    "simple_spelling_of_a_user": task_of(256, "code"),
}


def some_results():
    answers = [
        item("mmlu", str(i), "categorical", correct=i % 3 > 0, subject=f"subject|{i % 4}", gold_nats=3.0, gold_bytes=1)
        for i in range(14042)
    ]
    answers += [item("arc_challenge", str(i), "categorical") for i in range(1172)]
    answers += [item("gsm8k", str(i), correct=False, ending="a|<b>`") for i in range(119)]
    return compute(SIX_AND_MORE, *answers)


def rendered(renderable: Any) -> list[str]:
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text().splitlines()


def test_the_table_fits_80_columns_with_every_number() -> None:
    lines = rendered(show_results(some_results()))
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert lines[2].split() == ["mmlu", "14042", "66.7", "65.9–67.4", "25.0", "–", "4.328"]
    assert lines[3].split() == ["gsm8k", "119/1319", "0.0", "0.0–3.1", "–", "100.0", "–"]
    text = " ".join(lines)
    assert "gsm8k is incomplete: 119 of 1319 items" in text
    assert "No ChatCORE: without arc_easy, gsm8k, humaneval, spelling_bee" in text


def test_the_report_has_subjects_by_accuracy_and_nothing_alive() -> None:
    results = dataclasses.replace(some_results(), checkpoint="d4 | <script>\n# x")
    report = markdown_report(run_of(SIX_AND_MORE), results)
    assert report.startswith("# Scores of d4 \\| \\<script\\>⏎\\# x, step 120\n")
    assert "No picture: matplotlib is not installed" in report and "![scores]" not in report
    assert "![scores](scores.png)" in markdown_report(run_of(SIX_AND_MORE), results, picture=True)
    assert "**gsm8k is incomplete: 119 of 1319 items**" in report
    assert "- endings: a\\|\\<b\\>\\` 119" in report
    subjects = [line for line in report.splitlines() if line.startswith("| subject\\|")]
    assert len(subjects) == 4
    shares = [float(line.split(" | ")[2]) for line in subjects]
    assert shares == sorted(shares, reverse=True)
    assert "- temperature: 0.0" in report


@given(st.text())
def test_escaped_text_is_one_inert_line(text: str) -> None:
    escaped = escape_markdown(text)
    assert len(escaped.splitlines()) <= 1 and escaped.isprintable()
    bare = escaped.replace("\\\\", "")
    assert all(bare[i - 1] == "\\" for i, c in enumerate(bare) if c in "|`<>*[]&~#$@!")
    assert "://" not in escaped.replace("\\://", "") and "www." not in escaped
    escaped.encode("utf-8")


def test_escaping_by_example() -> None:
    assert escape_markdown("a|b\r\n`c` <i>x</i>\x1b[31m \\| http://x.y www.z") == (
        "a\\|b⏎\\`c\\` \\<i\\>x\\</i\\>␣\\[31m \\\\\\| http\\://x.y www\\.z"
    )
    assert escape_markdown("#### 3.5, 25% (of -1)") == "\\#\\#\\#\\# 3.5, 25% (of -1)"
    assert escape_markdown("arc_easy _a_ b__c é_d") == "arc_easy \\_a\\_ b\\_\\_c é\\_d"


def test_report_and_picture_are_written(tmp_path: Path) -> None:
    write_run(tmp_path, run_of({"gsm8k": task_of(3), "mmlu": task_of(2, "categorical", 0.25), "none": task_of(4)}))
    write_items(tmp_path / "items.jsonl", item(name="a"), item("mmlu", "b", "categorical"))
    write_report(tmp_path)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "![scores](scores.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["none"]["accuracy"] is None


def test_without_matplotlib_there_is_no_picture_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_run(tmp_path, run_of({"gsm8k": task_of(1)}))
    write_items(tmp_path / "items.jsonl", item())
    assert draw_scores(write_report(tmp_path), tmp_path / "x.png") is None
    assert "No picture: matplotlib is not installed" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == []


def test_results_are_read_without_torch_or_matplotlib() -> None:
    imports = "import sys, chateval.results.compare, chateval.results.report"
    program = f"{imports}; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
