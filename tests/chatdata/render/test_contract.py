"""A build replays its tool calls, and holds every document to the contract before it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.errors import BuildError
from chatdata.recipe import load_recipe
from chatdata.render import batch
from chatdata.render.format import NANOCHAT
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer


def tool(call: str, *outputs: str) -> list[dict[str, str]]:
    return [{"type": "python", "text": call}, *({"type": "python_output", "text": text} for text in outputs)]


RECIPE = "stage = 'mid'\nmax_tokens = 40\noverflow = 'truncate'\n[[train]]\ntask = 'conversations'\npath = 'c.jsonl'\n"


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: Tokenizer) -> Callable[[str], dict]:
    """Builds conversations of one answer each; gives report.json."""
    answers = [
        [*tool("1+1", "2"), *tool("2+2", "4.0")],  # one mismatch
        "no tools",
        [*tool("3*3")],  # no output, though the next conversation begins with one in its own answer
        [{"type": "python_output", "text": "9"}, {"type": "text", "text": "x" * 60}, *tool("5*5", "26")],
    ]
    lines = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in answers]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "r.toml").write_text(RECIPE)

    def run(name: str) -> dict:
        tasks = load_tasks()
        recipe = load_recipe(str(tmp_path / "r.toml"), tasks)
        build(make_build_plan(recipe, tasks, byte_tokenizer, Locations(recipe.folder)), tmp_path / name)
        return json.loads((tmp_path / name / "report.json").read_text())

    return run


def test_a_build_counts_and_lists_them(run: Callable[[str], dict]) -> None:
    for name, cached in (("cold", 0), ("warm", 1)):  # a unit in the cache keeps what its calls gave
        report = run(name)
        assert report["units"]["cached"] == cached
        found = report["tool_calls"]["train"]
        counts = {"task": "conversations", "calls": 4, "point_zero": 1, "different": 1, "no_output": 1}
        assert found["entries"] == {"0": counts}
        assert found["mismatches"] == 3
        listed = {
            (line["row"], line["kind"], line["call"], line["recorded"], line["computed"]) for line in found["listed"]
        }
        assert listed == {
            (0, "point_zero", "2+2", "4.0", "4"),
            (2, "no_output", "3*3", "", ""),
            (3, "different", "5*5", "26", "25"),
        }


def test_gsm8k(golden_mid: Path) -> None:
    """7,473 rows: of 23,716 calls, as `shared/` says, none but those written in another way."""
    found = json.loads((golden_mid / "report.json").read_text())["tool_calls"]["train"]
    assert found["entries"] == {"2": {"task": "gsm8k", "calls": 23_716, "format": 667}}
    assert (found["mismatches"], len(found["listed"])) == (667, 667)


@pytest.mark.parametrize(
    ("role", "problem"),  # whose mask the batch renderer turns round
    [
        ("output", "output_start supervised, position"),
        ("user", "user_start supervised, position 1"),
        ("text", "unsupervised token inside assistant text, position"),
    ],
)
def test_a_renderer_that_breaks_the_contract_writes_nothing(
    run: Callable[[str], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, problem: str
) -> None:
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    span = getattr(NANOCHAT, role)
    broken = replace(NANOCHAT, **{role: replace(span, supervised=not span.supervised)})
    monkeypatch.setattr(batch, "NANOCHAT", broken)
    with pytest.raises(BuildError, match=rf"^c.jsonl line \d: {problem}.*: a defect of chatdata, please report it$"):
        run("broken")
    assert not (tmp_path / "broken").exists()
