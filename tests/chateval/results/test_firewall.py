"""`chateval run --firewall`: items that a build's documents hold are scored apart; the answers stay as they are."""

from __future__ import annotations

import hashlib
import json

import pytest

from chatdata.disk import file_sha256
from chateval.errors import ScoringError
from chateval.results.firewall import read_firewall


@pytest.fixture(scope="module")
def checkpoint(save_random, tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("run") / "checkpoints").parent.parent


def firewall_file(path, run, flagged, **changed):
    """A firewall file that flags `flagged` (set → items) of the sets of `run` that it names."""
    checked = {name: {"items": 8, "source": run["tasks"][name]["source"]} for name in flagged}
    items = [{"set": name, "item": item, "rows": [{}]} for name, some in flagged.items() for item in some]
    listed = {"format": "chatdata-firewall", "version": 1, "build_id": "ab" * 32, "checked": checked, "items": items}
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


def test_files_that_do_not_fit(tmp_path) -> None:
    def source(sha):
        return {"name": "cais/mmlu all test", "revision": None, "files": [{"name": "a", "bytes": 1, "sha256": sha}]}

    run = {"tasks": {"mmlu": {"source": source("11")}}}
    path = tmp_path / "f.json"
    elsewhere = {"mmlu": {"source": source("11") | {"revision": "c0ffee", "name": "from the Hub"}}}
    fits = read_firewall(firewall_file(path, run, {"mmlu": ["mmlu all test row 3"]}), elsewhere)
    assert fits["flagged"] == {"mmlu": ["mmlu all test row 3"]}
    with pytest.raises(ScoringError, match="its mmlu was read from other files"):
        read_firewall(path, {"mmlu": {"source": source("22")}})
    with pytest.raises(ScoringError, match="checked mmlu, but none of gsm8k"):
        read_firewall(path, {"gsm8k": {"source": source("11")}})
    firewall_file(path, run, {"mmlu": []}, version=2)
    with pytest.raises(ScoringError, match="chatdata-firewall 2, not chatdata-firewall 1"):
        read_firewall(path, run["tasks"])
    for text in ("{}", "[]", "not JSON", '{"format": "chatdata-firewall", "version": 1, "checked": 3}'):
        path.write_text(text)
        with pytest.raises(ScoringError, match="not a firewall file"):
            read_firewall(path, run["tasks"])
