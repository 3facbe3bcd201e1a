"""run.json: what a results folder belongs to; runs that are not mixed; the firewall file added to one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import to_builtins

from chatdata.disk import convert, file_sha256
from chateval.errors import ResultsError, ScoringError
from chateval.results.run_file import RunTask, changes, read_firewall, read_run, require_same_run, write_json, write_run

TASK = {"scoring": "generative", "chance": 0.0, "items": 3, "draws": 1, "source": {"revision": "abc"}}


def test_a_run_comes_back_and_begins_only_once_with_the_same(run_of, tmp_path: Path) -> None:
    out, run = tmp_path / "new" / "out", run_of({"gsm8k": TASK})
    require_same_run(out, run)
    write_run(out, run)
    assert read_run(out) == run
    assert json.loads((out / "run.json").read_text())["tasks"] == {"gsm8k": TASK}
    assert sorted(path.name for path in out.iterdir()) == ["run.json"]
    require_same_run(out, run_of({"gsm8k": TASK}, checkpoint="the same weights elsewhere", step=121))
    run.settings["stop"] = ("x", 1)  # a tuple is JSON's list
    require_same_run(out, run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights_sha256": "d" * 64}, "its items are of weights aaaaaaaaaaaa…, not dddddddddddd…; use another --out"),
        (
            {"settings": {"temperature": 0.7, "stop": ["x", 1], "top_k": 5}},
            "its items are of other settings: temperature is 0.0, not 0.7; seed is gone; top_k is added; use another",
        ),
        ({"tasks": {"mmlu": TASK}}, "its items are of other tasks: gsm8k is gone; mmlu is added; use another"),
        (
            {"tasks": {"gsm8k": {**TASK, "items": 5, "source": {"revision": "def"}}}},
            'its items are of other tasks: gsm8k.items is 3, not 5; gsm8k.source.revision is "abc", not "def"; use',
        ),
    ],
)
def test_a_folder_of_another_run_is_refused(run_of, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    write_run(tmp_path, run_of({"gsm8k": TASK}))
    with pytest.raises(ResultsError) as error:
        require_same_run(tmp_path, run_of(**{"tasks": {"gsm8k": TASK}, **changed}))
    assert str(error.value).startswith(f"{tmp_path}: {message}")


def test_items_without_a_run_are_refused(run_of, tmp_path: Path) -> None:
    (tmp_path / "items-00001.jsonl").touch()
    with pytest.raises(ResultsError, match=r"items without run.json, so of unknown weights; use another --out"):
        require_same_run(tmp_path, run_of({}))
    with pytest.raises(ResultsError, match=r"not a results folder \(no run.json\)"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "chatdata"}, ', key "format": "chatdata"; valid: chateval-run'),
        ({"version": 2}, ', key "version": must be 1, not 2'),
        ({"settings": None}, ', key "settings": must be a table, not null'),
        ({"step": "1"}, ', key "step": must be an integer of at least 0 and'),
        ({"tasks": {"gsm8k": 1}}, ', key "tasks.gsm8k": must be a table, not 1'),
        (
            {"tasks": {"gsm8k": {**TASK, "scoring": "guess"}}},
            ', key "tasks.gsm8k.scoring": "guess"; valid: categorical, generative, code',
        ),
        ({"tasks": {"gsm8k": {**TASK, "items": True}}}, ', key "tasks.gsm8k.items": must be an integer of at least 0'),
        ({"tasks": {"gsm8k": {**TASK, "draws": 0}}}, ', key "tasks.gsm8k.draws": must be an integer of at least 1'),
        ({"tasks": {"gsm8k": {**TASK, "chance": 1}}}, ', key "tasks.gsm8k.chance": must be a number from 0 to below 1'),
        ({"tasks": {"gsm8k": {"scoring": "code"}}}, ', key "tasks.gsm8k": no key "chance"'),
    ],
)
def test_a_run_that_says_something_else_is_refused(
    run_of, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    run = run_of({"gsm8k": TASK})
    for name, value in changed.items():
        setattr(run, name, value)
    with pytest.raises(ResultsError) as error:
        write_run(tmp_path / "out", run)
    assert message in str(error.value) and not (tmp_path / "out").exists()
    (tmp_path / "run.json").write_text(json.dumps(to_builtins(run)))
    with pytest.raises(ResultsError) as error:
        read_run(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'run.json'}{message}") and "\n" not in str(error.value)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResultsError, match=r"run.json: not valid JSON"):
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
    assert changes(value, json.loads(json.dumps(value))) == []


@pytest.fixture(scope="module")
def checkpoint(save_random, tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("run") / "checkpoints").parent.parent


def firewall_file(path, run, flagged, **changed):
    """A firewall file that flags `flagged` (set → items) of the sets of `run` that it names."""
    checked = {name: {"items": 8, "flagged": 1, "rows": 1, "source": run["tasks"][name]["source"]} for name in flagged}
    row = {"source": "c", "file": None, "row": 1, "source_row": 1, "method": "exact", "share": 1.0}
    items = [{"set": name, "item": item, "rows": [row]} for name, some in flagged.items() for item in some]
    listed = {"format": "chatdata-firewall", "version": 1, "build_id": "ab" * 32, "checked": checked, "items": items}
    listed |= {"not_checked": {}, "flagged_rows": 1}
    path.write_text(json.dumps(listed | changed))
    return path


def test_clean_and_flagged_items_apart(chateval, checkpoint, words, tmp_path) -> None:
    out = tmp_path / "scores"
    common = ["run", "--checkpoint", checkpoint, "--tasks", "demo_choice,simple_spelling", "--words", words]
    common += ["--limit", 8, "--max-new-tokens", 5, "--out", out]
    assert chateval(*common).returncode == 0
    answers = (out / "items.jsonl").read_bytes()
    before = json.loads((out / "results.json").read_text())["tasks"]["demo_choice"]
    assert (before["clean"], before["flagged"]) == (None, None)
    items = [json.loads(line) for line in answers.splitlines()]
    held = [item for item in items if item["task"] == "demo_choice"][:3]
    run = json.loads((out / "run.json").read_text())
    path = firewall_file(tmp_path / "f.json", run, {"demo_choice": [item["item"] for item in held]})
    result = chateval(*common, "--firewall", path)  # the folder is finished: only its figures are new
    assert result.returncode == 0, result.stderr
    assert "firewall: not checked: simple_spelling" in result.stdout and "flagged" in result.stdout
    assert (out / "items.jsonl").read_bytes() == answers
    run = json.loads((out / "run.json").read_text())
    assert run["firewall"]["sha256"] == file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    after = tasks["demo_choice"]
    assert (after["items"], after["correct"]) == (before["items"], before["correct"])
    assert (after["clean"]["items"], after["flagged"]["items"]) == (5, 3)
    assert after["flagged"]["correct"] == sum(item["correct"] for item in held)
    assert after["clean"]["correct"] + after["flagged"]["correct"] == after["correct"]
    assert after["flagged"]["interval"][0] < after["flagged"]["interval"][1]
    assert tasks["simple_spelling"]["clean"] is None
    assert "| demo_choice | flagged | 3 |" in (out / "report.md").read_text()


def test_firewall_files_that_do_not_fit(tmp_path) -> None:
    def tasks(task, sha, **changed):
        source = {"name": "cais/mmlu all test", "revision": None, "files": [{"name": "a", "bytes": 1, "sha256": sha}]}
        return {task: convert(TASK | {"source": source | changed}, RunTask, "", ResultsError)}

    mmlu = tasks("mmlu", "11" * 32)
    run = {"tasks": {"mmlu": {"source": mmlu["mmlu"].source}}}
    path = tmp_path / "f.json"
    elsewhere = tasks("mmlu", "11" * 32, revision="c0ffee", name="from the Hub")
    fits = read_firewall(firewall_file(path, run, {"mmlu": ["mmlu all test row 3"]}), elsewhere)
    assert fits.flagged == {"mmlu": ["mmlu all test row 3"]}
    with pytest.raises(ScoringError, match="its mmlu was read from other files"):
        read_firewall(path, tasks("mmlu", "22" * 32))
    with pytest.raises(ScoringError, match="checked mmlu, but none of gsm8k"):
        read_firewall(path, tasks("gsm8k", "11" * 32))
    for text, message in (
        (path.read_text().replace('"version": 1', '"version": 2'), 'key "version": must be 1, not 2'),
        ("{}", 'no key "format"; it must be chatdata-firewall'),
        ("[]", "must be a table, not []"),
        ("not JSON", "not valid JSON"),
        ('{"format": "chatdata-firewall", "version": 1, "checked": 3}', 'key "checked": must be a table, not 3'),
        (path.read_text().replace("11" * 32, "11"), 'key "checked.mmlu.source.files[0].sha256"'),
    ):
        path.write_text(text)
        with pytest.raises(ScoringError, match=re.escape(message)):
            read_firewall(path, mmlu)
