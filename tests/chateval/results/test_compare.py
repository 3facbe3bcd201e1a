"""Two runs on the same items: pairing, refusals, what is counted, what is shown."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatdata.disk import convert
from chateval.errors import ResultsError
from chateval.results.compare import compare
from chateval.results.items import append_item, open_items
from chateval.results.report import markdown_comparison, show_comparison
from chateval.results.run_file import Run, write_run

SETTINGS = {"temperature": 0.0, "max_new_tokens": 512}


def folder(
    path: Path,
    tasks: dict[str, dict[str, str]],
    weights: str = "a",
    expected: int = 1000,
    draws: int = 1,
    settings: dict[str, Any] = SETTINGS,
    outputs: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """A results folder. tasks: {task: {item: "1" right or "0" wrong, one figure a draw}}."""
    task = {"scoring": "code", "chance": 0.0, "items": expected, "draws": draws, "source": {}}
    run = {"format": "chateval-run", "version": 1, "weights_sha256": weights * 64, "checkpoint": f"runs/{weights}"}
    run |= {"step": 7, "settings": settings, "tasks": dict.fromkeys(tasks, task)}
    write_run(path, convert(run, Run, "run.json", ResultsError))
    with open_items(path / "items.jsonl") as file:
        for name, items in tasks.items():
            for item, figures in items.items():
                for draw, figure in enumerate(figures):
                    record = {"task": name, "item": item, "subject": None, "draw": draw, "gold": "5"}
                    ending = "passed" if figure == "1" else "failed"
                    record |= {"prompt_sha256": f"sha {item}", "correct": figure == "1", "ending": ending}
                    record |= {"output": (outputs or {}).get(item, f"output {draw}"), "extracted": None}
                    record |= {"num_prompt_tokens": 1, "num_tokens": 1, "gold_nats": None, "gold_bytes": None}
                    append_item(file, {**record, **changes})
    return path


def numbered(figures: str) -> dict[str, str]:
    return {f"test {i}": figure for i, figure in enumerate(figures)}


def shown(comparison: Any) -> str:
    from rich.console import Console

    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        console = Console(width=80, record=True, file=nowhere)
        console.print(show_comparison(comparison))
        return console.export_text()


def test_what_turned_right_and_wrong(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"gsm8k": numbered("1111100000" + "1" * 20)})
    b = folder(tmp_path / "b", {"gsm8k": numbered("1111011111" + "1" * 20)}, weights="b")
    task = compare(a, b, examples=3).tasks["gsm8k"]
    assert (task.items, task.turned_right, task.turned_wrong) == (30, 5, 1)
    assert (task.accuracy_a, task.accuracy_b, task.difference) == pytest.approx((25 / 30, 29 / 30, 4 / 30))
    assert task.p == 0.21875  # scipy.stats.binomtest(1, 6).pvalue
    assert task.interval is not None and task.interval[0] <= 0 < 4 / 30 < task.interval[1]
    assert len(task.examples_right) == 3 and [e.item for e in task.examples_wrong] == ["test 4"]
    assert {e.item for e in task.examples_right} < {f"test {i}" for i in range(5, 10)}
    back = compare(b, a).tasks["gsm8k"]
    assert (back.turned_right, back.turned_wrong, back.p, back.difference) == (1, 5, task.p, -task.difference)


@given(figures=st.text("01", min_size=1, max_size=40))
def test_a_run_compared_with_itself(tmp_path_factory: pytest.TempPathFactory, figures: str) -> None:
    a = folder(tmp_path_factory.mktemp("same") / "a", {"gsm8k": numbered(figures)})
    task = compare(a, a).tasks["gsm8k"]
    assert (task.p, task.interval, task.difference) == (1.0, (0.0, 0.0), 0.0)
    assert (task.turned_right, task.turned_wrong, task.only_in_a, task.only_in_b) == (0, 0, 0, 0)
    assert task.items == len(figures) and task.accuracy_a == figures.count("1") / len(figures)


def test_items_are_paired_by_name_and_not_by_line(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"gsm8k": {"x": "1", "y": "0", "z": "1"}})
    b = folder(tmp_path / "b", {"gsm8k": {"z": "1", "y": "0", "x": "1"}}, weights="b")
    task = compare(a, b).tasks["gsm8k"]
    assert (task.turned_right, task.turned_wrong) == (0, 0)


def test_items_and_tasks_in_one_run_only_are_counted_and_shown(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"gsm8k": numbered("10101"), "mmlu": numbered("1"), "late": numbered("1")})
    b = folder(tmp_path / "b", {"gsm8k": {"test 0": "1", "other": "1"}, "arc_easy": {}, "late": {}}, expected=2)
    comparison = compare(a, b)
    task = comparison.tasks["gsm8k"]
    assert (task.items, task.only_in_a, task.only_in_b, task.accuracy_a) == (1, 4, 1, 1.0)  # over the shared item
    assert list(comparison.tasks) == ["gsm8k", "late"]
    assert (comparison.a.other_tasks, comparison.b.other_tasks) == (("mmlu",), ("arc_easy",))
    late = comparison.tasks["late"]
    assert (late.items, late.accuracy_a, late.difference, late.interval, late.p) == (0, None, None, None, None)
    for text in (shown(comparison), markdown_comparison(comparison)):
        assert "gsm8k: 4 items only in A, not compared" in text and "gsm8k: 1 items only in B, not compared" in text
        assert "tasks only in A, not compared: mmlu" in text and "tasks only in B, not compared: arc_easy" in text
        assert "A: No ChatCORE: without arc_easy, arc_challenge" in text


def test_several_draws(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"gsm8k": {"x": "100", "y": "111", "z": "010", "cut": "11"}}, draws=3)
    b = folder(tmp_path / "b", {"gsm8k": {"x": "011", "y": "011", "z": "001", "cut": "111"}}, weights="b", draws=3)
    task = compare(a, b).tasks["gsm8k"]
    assert task.p is None and (task.items, task.only_in_b, task.draws) == (3, 1, 3)
    assert (task.accuracy_a, task.accuracy_b) == (pytest.approx(5 / 9), pytest.approx(5 / 9))
    assert (task.turned_right, task.turned_wrong) == (1, 1)  # z has as many right in both
    assert (task.examples_right[0].item, task.examples_wrong[0].item) == ("x", "y")
    assert task.examples_right[0].draw == 1  # right in B and wrong in A, though draw 0 is the other way round
    assert task.interval is not None and task.interval[0] < 0 < task.interval[1]
    passes = {k: (pair.accuracy_a, pair.accuracy_b, pair.difference) for k, pair in task.pass_at.items()}
    assert passes[2] == pytest.approx((7 / 9, 8 / 9, 1 / 9)) and passes[3] == (1, 1, 0)
    assert passes[1] == pytest.approx((5 / 9, 5 / 9, 0))
    assert "gsm8k pass@2 77.8 88.9 +11.1" in " ".join(shown(compare(a, b)).split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {**SETTINGS, "temperature": 0.7}},
            "cannot be compared: settings differ: temperature is 0.0, not",
        ),
        ({"settings": {"temperature": 0.0}}, "settings differ: max_new_tokens is gone"),
        ({"prompt_sha256": "another"}, "gsm8k item 'x': its prompt_sha256 differs between the two runs"),
        ({"gold": "6"}, "gsm8k item 'x': its gold differs between the two runs"),
        ({"tasks": {"mmlu": {"x": "1"}}}, "have no task in common: they scored gsm8k and mmlu"),
        ({"tasks": {}}, "have no task in common: they scored gsm8k and nothing"),
        ({"tasks": {"gsm8k": {"y": "1"}}}, "have no finished item in common, in gsm8k"),
        ({"draws": 2, "tasks": {"gsm8k": {"x": "11"}}}, "cannot be compared: gsm8k.draws is 1, not 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    a = folder(tmp_path / "a", {"gsm8k": {"x": "1"}})
    b = folder(tmp_path / "b", **{"tasks": {"gsm8k": {"x": "1"}}, "weights": "b", **changes})
    with pytest.raises(ResultsError, match=re.escape(message)) as error:
        compare(a, b)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"not a results folder"):
        compare(tmp_path / "a", tmp_path / "b")


def test_the_table_fits_80_columns_with_every_number(tmp_path: Path) -> None:
    figures = {
        "arc_challenge": "01" * 700 + "0" * 8642,
        "simple_spelling": "01",
        "a_task_of_a_user_with_a_long_name": "1",
    }
    swapped = str.maketrans("01", "10")
    a = folder(tmp_path / "a", {name: numbered(each) for name, each in figures.items()}, expected=10042)
    b = folder(
        tmp_path / "b", {name: numbered(each.translate(swapped)) for name, each in figures.items()}, "b", expected=10042
    )
    text = shown(compare(a, b))
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if line.startswith("arc_challenge"))
    assert re.fullmatch(
        r"arc_challenge +10042 +7\.0 +93\.0 +\+86\.1 +\+8[45]\.\d to \+8[67]\.\d +<0\.001 +9342 +700", row
    )


def test_a_models_text_is_inert_in_markdown_and_on_the_terminal(tmp_path: Path) -> None:
    hostile = "| x |\n# head `code` <script>alert(1)</script> \x1b[2J [link](http://x.y) "
    a = folder(tmp_path / "a", {"gsm8k": {"x|y": "0"}}, outputs={"x|y": hostile})
    b = folder(tmp_path / "b", {"gsm8k": {"x|y": "1"}}, "b", outputs={"x|y": "w" * 500 + "#### 5"})
    comparison = compare(a, b)
    example = comparison.tasks["gsm8k"].examples_right[0]
    assert example.output_a == hostile and len(example.output_b) == 200 and example.output_b.endswith("w#### 5")
    text = markdown_comparison(comparison)
    assert "## gsm8k: turned right in B (1 of 1)" in text
    row = text.splitlines()[-1]
    assert row.startswith("| x\\|y | 5 | none | none | \\| x \\|⏎\\# head \\`code\\` \\<script\\>")
    assert len(re.findall(r"(?<!\\)\|", row)) == 7 and "\x1b" not in text and "\\[link\\](http\\://x.y)" in row
    assert "\x1b" not in shown(comparison)


def test_json_is_plain_data(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"gsm8k": numbered("101")})
    record = json.loads(json.dumps(compare(a, folder(tmp_path / "b", {"gsm8k": numbered("110")}, "b")).to_json()))
    assert (record["format"], record["version"]) == ("chateval-comparison", 1)
    assert record["a"]["weights_sha256"] == "a" * 64 and record["b"]["checkpoint"] == "runs/b"
    task = record["tasks"]["gsm8k"]
    assert (task["accuracy_a"], task["p"], task["turned_right"], task["turned_wrong"]) == (2 / 3, 1.0, 1, 1)
    assert set(task["examples_right"][0]) >= {"item", "gold", "extracted_a", "extracted_b", "output_a", "output_b"}
