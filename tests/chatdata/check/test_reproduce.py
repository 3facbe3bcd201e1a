"""chatdata reproduce: a build made again from its manifest, and what is said where it is another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_folders import qwen_folder, trl_template

from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.reproduce import reproduce
from chatdata.errors import BuildError, MissingSource, RecipeError
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.folder import read_folder

SAME = ("equal to the byte", [])


def again(built: Path, recipe: str | None = "r.toml", at: Locations | None = None, **options: Any) -> Any:
    recipe = str(built.parent / recipe) if recipe else None
    return reproduce(built, built.parent / "again", at or Locations(Path()), load_tasks(), recipe, **options)


def files(folder: Path) -> dict[str, bytes]:
    """All files of a build but those that two runs differ in."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name not in ("report.json", "firewall.json")}


def test_the_demo_through_the_command_line(demo_mid: Path, tmp_path: Path, command_line: Callable) -> None:
    result = command_line(f"chatdata reproduce {demo_mid} --out again --workers 1 --json", tmp_path)
    found = {"build": str(demo_mid), "out": "again", "result": SAME[0], "problems": []}
    assert (result.returncode, json.loads(result.stdout)) == (0, found)
    assert files(demo_mid) == files(tmp_path / "again")
    result = command_line(f"chatdata reproduce {demo_mid} --out again", tmp_path)
    assert (result.returncode, result.stderr) == (1, "Error: again: already exists; choose another --out\n")
    result = command_line(f"chatdata reproduce {demo_mid} --sample 0.1", tmp_path)
    assert (result.returncode, result.stdout) == (
        0,
        f"{demo_mid}: equal in sources, order and what was rendered again\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_how_it_is_called(built: Path, tmp_path: Path, command_line: Callable) -> None:
    for wrong in ("", "--out x --sample 1", "--sample 1 --workers 2"):
        result = command_line(f"chatdata reproduce {built} {wrong}", tmp_path)
        message = "Error: give --out FOLDER (with --against, --workers), or --sample SHARE\n"
        assert (result.returncode, result.stderr) == (2, message)
    (tmp_path / "elsewhere").mkdir()
    result = command_line(f"chatdata reproduce {built} --out x", tmp_path / "elsewhere")
    assert result.returncode == 1 and result.stderr.endswith(
        "i.jsonl: no such file; `chatdata identity PERSONA --out FILE` makes one; pass --recipe (paths start "
        "at it), --data-dir, --identity or --words\n"
    )
    assert not (tmp_path / "elsewhere" / "x").exists()


def test_limits_epochs_and_dropped_documents(built: Path) -> None:
    assert again(built) == SAME
    assert files(built) == files(built.parent / "again")
    with pytest.raises(BuildError, match=r"again: already exists; choose another --out$"):
        again(built)


def test_a_changed_row(built: Path, command_line: Callable) -> None:
    source = built.parent / "i.jsonl"
    source.write_text(source.read_text().replace("me 3", "me 7"))
    result = command_line("chatdata reproduce out --out again --workers 1", built.parent)
    assert (result.returncode, result.stdout) == (3, "out: not equal\n")
    lines = result.stderr.splitlines()
    assert "source i.jsonl: i.jsonl has another SHA-256 than the build's" in lines
    assert any(line.startswith("  i.jsonl.files.i.jsonl.sha256: ") for line in lines[lines.index("sources") :])
    first = lines.index("    identity row 3 (a document 0, b document 0): tokens from position 11 on")
    assert lines[first + 2].endswith("⟦me 7<|assistant_end|>⟧ …") and "train documents" in lines[:first]
    result = command_line("chatdata reproduce out --recipe r.toml --sample 0", built.parent)
    assert (result.returncode, result.stdout) == (3, "out: not equal\n")
    assert "source i.jsonl: i.jsonl has another SHA-256 than the build's" in result.stderr
    assert "document 0 (i.jsonl line 4): id at position 11 is 51, but rendered again 55" in result.stderr


def test_a_row_less(built: Path) -> None:
    source = built.parent / "i.jsonl"
    source.write_text("".join(source.read_text().splitlines(keepends=True)[:-1]))
    result, lines = again(built)
    assert result == "not equal" and any(line.startswith("  in another order: ") for line in lines)


def test_another_pyarrow_and_another_name(built: Path, sign: Callable) -> None:
    index = built / "train" / "index-00000.parquet"
    pq.write_table(pq.ParquetFile(index).read(), index, compression="gzip")
    sign(built)
    assert again(built) == ("equal in every value, but not to the byte: another pyarrow wrote the index", [])
    shutil.rmtree(built.parent / "again")
    (built.parent / "i.jsonl").rename(built.parent / "me.jsonl")
    result = again(built, at=Locations(Path(), identity=built.parent / "me.jsonl"))
    assert result[1] == [] and "equal in every value, but not to the byte: sources[1].files[0].name, " in result[0]
    assert result[0].endswith(", another pyarrow wrote the index")


def test_a_forged_ledger_and_a_damaged_file(built: Path, sign: Callable) -> None:
    def more_lines(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["entries"][0]["merged"] = 7

    sign(built, more_lines)
    result, lines = again(built)
    assert result == "not equal" and "  entry 0 (conversations).merged: 7 → 0" in lines
    tokens = built / "train" / "tokens-00000.npy"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"AA")
    shutil.rmtree(built.parent / "again")
    result, lines = again(built)
    assert (result, lines[0]) == ("damaged", f"{tokens}: SHA-256 differs from the manifest's")
    assert not (built.parent / "again").exists()


def test_own_files_that_are_divided_and_options_of_build(
    folder: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a recipe file: what the manifest names is found in the working folder."""
    rows = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}] for i in range(50)]
    (folder / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, ["no conversation"]]))
    entry = '[[train]]\ntask = "conversations"\nname = "own"\npath = "o.jsonl"\nval_share = 0.2\nepochs = 2.5\n'
    (folder / "own.toml").write_text(f'stage = "mid"\nseed = 7\nshuffle = {{val = false}}\n{entry}')
    tasks = load_tasks()
    recipe = load_recipe(str(folder / "own.toml"), tasks, invalid="drop", max_tokens=9, overflow="truncate")
    build(make_build_plan(recipe, tasks, byte_tokenizer, Locations(folder), 30), folder / "out")
    assert again(folder / "out", "own.toml") == SAME
    shutil.rmtree(folder / "again")
    monkeypatch.chdir(folder)
    assert again(folder / "out", None) == SAME
    shutil.rmtree(folder / "again")
    with pytest.raises(RecipeError, match=r"^r is not the recipe of this build: "):
        again(folder / "out", "r.toml")


def test_words_of_ones_own(folder: Path, build_in: Callable, byte_tokenizer: Tokenizer, command_line: Callable) -> None:
    """The phrasings come with chatdata, the words do not."""
    (folder / "w.txt").write_text("alpha\nbravo\ncharlie\n")
    (folder / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "spelling_bee"\nwords = "w.txt"\nrows = 9\n')
    build_in(folder, byte_tokenizer)
    (folder / "elsewhere").mkdir()
    line = "chatdata reproduce ../out --out again --workers 1"
    result = command_line(line, folder / "elsewhere")
    assert result.returncode == 1 and "spelling_bee train: w.txt: no such file; pass --words FILE" in result.stderr
    result = command_line(f"{line} --words ../w.txt", folder / "elsewhere")
    assert (result.returncode, result.stdout) == (0, "../out: equal to the byte\n")


def test_a_chat_format(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Fine."}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": chat, "tools": [tool]}) + "\n")
    (tmp_path / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    qwen_folder(tmp_path / "qwen", trl_template("qwen3_training"))
    tasks = load_tasks()
    recipe = load_recipe(str(tmp_path / "r.toml"), tasks, chat_format="template")
    build(make_build_plan(recipe, tasks, read_folder(tmp_path / "qwen"), Locations(tmp_path)), tmp_path / "out")
    assert again(tmp_path / "out") == SAME


def test_dropped_scored_items(
    tmp_path: Path, build_in: Callable, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sets are searched for: also if there are more by now, and never fewer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub"))
    question = "Mira bakes 24 rolls on Monday, sells 15 of them at the market and freezes the rest. How many are left?"
    another = "A shop has 12 red and 30 blue marbles in a bag, and sells 7 red ones in the morning. How many are in it?"
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": question}))
    (tmp_path / "hub" / "openai" / "gsm8k" / "main").mkdir(parents=True)
    gsm8k = pa.table({"question": [another], "answer": ["35\n#### 35"]})
    pq.write_table(gsm8k, tmp_path / "hub" / "openai" / "gsm8k" / "main" / "test-00000-of-00001.parquet")
    chats = ("Hi", question, another)
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Well."}] for text in chats]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    tasks, exam = load_tasks(), str(tmp_path / "exam.jsonl")
    plan = make_build_plan(load_recipe(str(tmp_path / "r.toml"), tasks), tasks, byte_tokenizer, Locations(tmp_path))
    manifest = build(plan, tmp_path / "out", decontaminate="drop", against=[exam])
    assert manifest["splits"]["train"]["documents"] == 2 and list(manifest["recipe"]["scored"]) == ["exam.jsonl"]
    assert again(tmp_path / "out", at=Locations(Path(), tmp_path / "hub"), against=[exam]) == SAME
    shutil.rmtree(tmp_path / "again")
    message = r"items of exam\.jsonl, which are not here or differ: pass --data-dir with scored sets, --against with"
    with pytest.raises(MissingSource, match=message):
        again(tmp_path / "out")
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": "Another question?"}))
    with pytest.raises(MissingSource, match=message):
        again(tmp_path / "out", against=[exam])
