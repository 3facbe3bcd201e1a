"""Results for people: every number in 80 columns, inert Markdown, a picture if matplotlib is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chateval.results.figures import Results
from chateval.results.report import draw_scores, markdown_report, show_results, write_report
from chateval.results.run_file import write_run
from chateval.results.tables import escape_markdown


@pytest.fixture(scope="module")
def six_and_more(task_of) -> dict[str, Any]:
    return {
        "arc_challenge": task_of(1172, "categorical", 0.25),
        "mmlu": task_of(14042, "categorical", 0.25),
        "gsm8k": task_of(1319),
        "simple_spelling_of_a_user": task_of(256, "code"),
    }


@pytest.fixture(scope="module")
def some_results(item, compute, six_and_more) -> Results:
    answers = [
        item("mmlu", str(i), "categorical", correct=i % 3 > 0, subject=f"subject|{i % 4}", gold_nats=3.0, gold_bytes=1)
        for i in range(14042)
    ]
    answers += [item("arc_challenge", str(i), "categorical") for i in range(1172)]
    answers += [item("gsm8k", str(i), correct=False, ending="a|<b>`") for i in range(119)]
    return compute(six_and_more, *answers)


def rendered(renderable: Any) -> list[str]:
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text().splitlines()


def test_the_table_fits_80_columns_with_every_number(some_results) -> None:
    lines = rendered(show_results(some_results))
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert lines[2].split() == ["mmlu", "14042", "66.7", "65.9–67.4", "25.0", "–", "4.328"]
    assert lines[3].split() == ["gsm8k", "119/1319", "0.0", "0.0–3.1", "–", "100.0", "–"]
    text = " ".join(lines)
    assert "gsm8k is incomplete: 119 of 1319 items" in text
    assert "No ChatCORE: without arc_easy, gsm8k, humaneval, spelling_bee" in text


def test_the_report_has_subjects_by_accuracy_and_nothing_alive(run_of, some_results, six_and_more) -> None:
    results = msgspec.structs.replace(some_results, checkpoint="d4 | <script>\n# x")
    report = markdown_report(run_of(six_and_more), results)
    assert report.startswith("# Scores of d4 \\| \\<script\\>⏎\\# x, step 120\n")
    assert "No picture: matplotlib is not installed" in report and "![scores]" not in report
    assert "![scores](scores.png)" in markdown_report(run_of(six_and_more), results, picture=True)
    assert "**gsm8k is incomplete: 119 of 1319 items**" in report
    assert "- endings: a\\|\\<b\\>\\` 119" in report
    subjects = [line for line in report.splitlines() if line.startswith("| subject\\|")]
    assert len(subjects) == 4
    shares = [float(line.split(" | ")[2]) for line in subjects]
    assert shares == sorted(shares, reverse=True)
    assert "- temperature: 0.0" in report


def test_several_draws_show_pass_at_k(item, task_of, run_of, compute) -> None:
    tasks = {"gsm8k": task_of(2, draws=4), "mmlu": task_of(1, "categorical", 0.25)}
    answers = [item(name=name, draw=draw, correct=name == "a" and draw == 3) for name in "ab" for draw in range(4)]
    results = compute(tasks, *answers, item("mmlu", "c", "categorical"))
    expected = [["12.5", "0.7–73.6"], ["25.0", "2.7–80.2"], ["50.0", "9.5–90.5"]]
    rows = [["gsm8k", f"pass@{k}", "2", *cells] for k, cells in zip((1, 2, 4), expected, strict=True)]
    assert [line.split() for line in rendered(show_results(results)) if "pass@" in line] == rows
    report = markdown_report(run_of(tasks), results)
    assert "## At least one of k draws is right (pass@k)\n\n| draws |  | items | right % | 95 % |" in report
    assert "| gsm8k | pass\\@4 | 2 | 50.0 | 9.5–90.5 |" in report and "mmlu | pass" not in report
    assert results.to_json()["tasks"]["gsm8k"]["pass_at"][4]["accuracy"] == 0.5


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


def test_report_and_picture_are_written(item, task_of, run_of, write_items, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: uv sync --extra plot")
    write_run(tmp_path, run_of({"gsm8k": task_of(3), "mmlu": task_of(2, "categorical", 0.25), "none": task_of(4)}))
    write_items(tmp_path / "items.jsonl", item(name="a"), item("mmlu", "b", "categorical"))
    write_report(tmp_path)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "![scores](scores.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["none"]["accuracy"] is None


def test_without_matplotlib_there_is_no_picture_and_the_report_says_so(
    item, task_of, run_of, write_items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
