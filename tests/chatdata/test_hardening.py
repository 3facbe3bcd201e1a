"""What a new user broke once, each with the check that would have caught it (LOG.md, 2026-11-21)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import chatdata as library
from chatdata.build.cache import take_unit
from chatdata.build.publish import check_out, partial_folder, publish
from chatdata.errors import BuildError, ConversationError, SourceError, TokenizerError
from chatdata.render.specification import render_text
from chatdata.sources.hub import check_complete
from chatdata.sources.training_texts import read_texts
from chatdata.tasks import spelling_bee
from chatdata.tasks.words import read_words
from chatdata.tokenizer.bpe import Tokenizer, append_special_tokens, train_tokenizer
from chatdata.tokenizer.files import read_json, save_tokenizer

BYTES = {bytes([byte]): byte for byte in range(256)}
SPECIALS = append_special_tokens(BYTES)
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("pattern", [r"\w+", r"[^\x00]+", r"\S+", "", "a*", "(?=a)"])
def test_a_pattern_that_loses_text_is_refused(pattern: str) -> None:
    with pytest.raises(TokenizerError, match=r"the split pattern (loses text|gives up|does not compile)"):
        Tokenizer(BYTES, pattern, SPECIALS, "lossy")


def test_training_with_a_bad_pattern() -> None:
    for pattern in (r"\w+", "[a-z", ""):
        with pytest.raises(TokenizerError):
            train_tokenizer(iter(["some text here, and there " * 50]), 300, pattern)


def test_a_text_the_pattern_gives_up_on_names_file_and_line(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable
) -> None:
    with pytest.raises(TokenizerError, match=r"gives up on a text of 1,000,001 characters"):
        byte_tokenizer.encode_ordinary(" " * 1_000_000 + "x")
    result = build_of(tmp_path, byte_tokenizer, chatdata, [HI, [{"role": "user", "content": " " * 1_000_000 + "x"}]])
    assert result.stderr.splitlines()[-1].startswith("Error: c.jsonl line 2: ") and "Traceback" not in result.stderr


def build_of(tmp_path: Path, tokenizer: Tokenizer, chatdata: Callable, lines: list, *arguments: object) -> object:
    save_tokenizer(tokenizer, tmp_path / "t")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "r.toml").write_text('stage = "mid"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    command = ["build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", tmp_path / "out"]
    return chatdata(*command, *arguments)


def test_tokenizer_json_that_means_something_else(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    save_tokenizer(train_tokenizer(iter(["the cat and the hat, " * 60]), 272), tmp_path)
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    split, byte_level = good["pre_tokenizer"]["pretokenizers"]
    path = tmp_path / "x.json"

    def read(**changes: object) -> None:
        path.write_text(json.dumps({**good, **changes}))
        read_json(path)

    def with_split(**changes: object) -> dict:
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**split, **changes}, byte_level]}}

    read()
    merges = good["model"]["merges"]
    hello = {**good["added_tokens"][0], "content": "hello", "id": 999, "special": False}
    for changes, message in [
        (with_split(behavior="Removed"), "its Split must be Isolated"),
        (with_split(behavior="MergedWithNext"), "tiktoken cannot do MergedWithNext"),
        (with_split(invert=True), "its Split must be Isolated, not inverted"),
        (with_split(pattern={"String": " "}), "with a Regex"),
        (with_split(pattern={"Regex": r"\w+"}), "the split pattern loses text"),
        ({"model": {**good["model"], "dropout": 0.5}}, "its model has dropout = 0.5"),
        ({"model": {**good["model"], "ignore_merges": False, "merges": merges[:3]}}, "no merge makes the token"),
        ({"added_tokens": [*good["added_tokens"], hello]}, "'hello' is added but not special"),
    ]:
        with pytest.raises(TokenizerError, match=message):
            read(**changes)


def test_force_never_takes_more_than_a_build(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    out = tmp_path / "out"
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI]).returncode == 0
    (out / "checkpoints").mkdir()
    with pytest.raises(BuildError, match=r"holds more than a build \(checkpoints\); --force would delete it too"):
        check_out(out, force=True)
    (out / "checkpoints").rmdir()
    check_out(out, force=True)
    mine = tmp_path / ".out.partial"
    mine.mkdir()
    (mine / "thesis").write_text("precious")
    with pytest.raises(BuildError, match="in the way and not a build's"), partial_folder(out):
        pass
    assert (mine / "thesis").read_text() == "precious"
    (mine / "thesis").unlink()
    old = tmp_path / ".out.old"
    old.mkdir()
    (old / "thesis").write_text("precious")
    result = build_of(tmp_path, byte_tokenizer, chatdata, [HI], "--force")
    assert "in the way" in result.stderr and (old / "thesis").exists() and library.open_build(out)


def test_an_interruption_while_replacing_brings_the_old_build_back(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI]).returncode == 0
    before = (out / "manifest.json").read_bytes()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), partial_folder(out) as partial:
        publish(partial, out)
    monkeypatch.undo()
    assert (out / "manifest.json").read_bytes() == before
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


DIE = """
import os, shutil
from pathlib import Path
from chatdata.build import publish
place, rename, remove, sync, unlink = {place!r}, Path.rename, publish._remove, publish.sync, Path.unlink
def dying_sync(path):
    if place == ("synced" if path.name.endswith(".partial") else "renamed"): os._exit(137)
    sync(path)
def dying_rename(self, to):
    if place == "between" and self.name.endswith(".partial"): os._exit(137)
    return rename(self, to)
def dying_unlink(self, missing_ok=False):
    unlink(self, missing_ok)
    if place == "removing" and self.parent.name.endswith(".old") and self.name == "manifest.json": os._exit(137)
publish.sync, Path.rename, Path.unlink = dying_sync, dying_rename, dying_unlink
from chatdata.cli import main
main()
"""


@pytest.mark.parametrize("place", ["synced", "between", "renamed", "removing"])
def test_killed_at_any_place_of_publishing_the_next_build_goes_on(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable, place: str
) -> None:
    out = tmp_path / "out"
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI]).returncode == 0
    before = (out / "manifest.json").read_bytes()
    flags = ["--max-tokens", "3", "--overflow", "truncate", "--force"]
    again = ["build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", out, *flags]
    killed = subprocess.run([sys.executable, "-c", DIE.format(place=place), *map(str, again)], capture_output=True)
    assert killed.returncode == 137, killed.stderr
    if place != "between":  # and then it is beside it, and comes back
        assert library.open_build(out).manifest
        assert ((out / "manifest.json").read_bytes() == before) == (place == "synced")
    with partial_folder(out):
        assert library.open_build(out).manifest
        assert ((out / "manifest.json").read_bytes() == before) == (place in ("synced", "between"))
    result = chatdata(*again)
    assert result.returncode == 0, result.stderr
    assert (out / "manifest.json").read_bytes() != before
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
    assert chatdata("verify", out, "--level", "full").returncode == 0


def test_links_are_followed_and_kept(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    (tmp_path / "big" / "a").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "big" / "a")
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI]).returncode == 0
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI], "--force").returncode == 0
    assert (tmp_path / "out").is_symlink() and sorted(os.listdir(tmp_path / "big")) == ["a", "a-firewall.json"]
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert "a link to nowhere" in build_of(tmp_path, byte_tokenizer, chatdata, [HI]).stderr


def test_too_many_entries_for_the_index(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    result = build_of(tmp_path, byte_tokenizer, chatdata, [HI])
    recipe = (tmp_path / "r.toml").read_text() + "epochs = 40000\n"
    (tmp_path / "r.toml").write_text(recipe)
    result = chatdata("build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", tmp_path / "o")
    assert "more than 32,768 entries in a split" in result.stderr and result.returncode == 1


def test_resharded_clones_are_refused() -> None:
    for names, message in [
        (
            ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            "mixes files",
        ),
        (["train-00000-of-00001.parquet", "train-backup.parquet"], "has train-backup.parquet beside numbered files"),
        (["train-00001-of-00002.parquet"], "is incomplete: 1 of 2 files missing"),
    ]:
        with pytest.raises(SourceError, match=message):
            check_complete([Path(name) for name in names], "here")
    check_complete([Path("train-00000-of-00001.parquet")], "here")
    check_complete([Path("a.parquet"), Path("b.parquet")], "here")


def test_validation_of_the_demo_is_not_its_training_data(tmp_path: Path, chatdata: Callable) -> None:
    assert chatdata("build", "--stage", "mid", "--demo", "--out", tmp_path / "mid").returncode == 0
    build = library.open_build(tmp_path / "mid")
    trained = set(build["train"].index["digest"].to_list())
    repeated = sum(digest in trained for digest in build["val"].index["digest"].to_list())
    assert repeated <= 0.01 * len(build["val"])


def test_the_limit_is_in_the_manifest(demo_mid: Path) -> None:
    assert library.open_build(demo_mid).manifest["recipe"]["limit"] == 300


def test_word_lists(tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_bytes(b"\xef\xbb\xbfapple\r\nkiwi\r\n")
    assert read_words(path) == ["apple", "kiwi"]
    path.write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"^w.txt: not UTF-8 at byte 3$"):
        read_words(path)
    path.write_text("don't\n")
    with pytest.raises(SourceError, match=r'^w.txt: the word "don\'t" cannot stand in the tool call'):
        spelling_bee.generate("train", {"words": path, "holdout": False, "phrasings": spelling_bee.PHRASINGS})


def test_content_is_never_left_out_in_silence(byte_tokenizer: Tokenizer) -> None:
    part = {"type": "text", "text": "Hello", "train": False}
    for record, message in [
        ([HI[0], {"role": "assistant", "content": [part]}], 'part 0, key "train": not understood'),
        ({"messages": HI, "system": "Speak French"}, 'key "system" beside "messages": would be left out'),
        ({"messages": HI, "tools": [{}]}, 'key "tools" beside "messages"'),
        ({"messages": HI, "conversations": HI}, 'key "conversations" beside "messages"'),
    ]:
        with pytest.raises(ConversationError, match=message):
            library.render_conversation(byte_tokenizer, record)
    with pytest.raises(ConversationError, match="lone surrogate"):
        render_text(byte_tokenizer, "a\ud800b")


def test_rows_that_cannot_be_read(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    column = pa.array([b"ok", b"\xff\xfe"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"question": column, "answer": column}), tmp_path / "g.parquet")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom chatdata.tasks import Task\n"
        "@dataclass\nclass Row:\n    n: int\n"
        "TASK = Task('mine', 's', 'MIT', lambda row: 1 / 0, generate=lambda s, o: lambda i: i, "
        "splits={'': {'train': 0}})\n"
    )
    for entry, error in [
        ("task = 'gsm8k'\npath = 'g.parquet'", "g.parquet row 0 … 1: text that is not UTF-8"),
        ("task = 'conversations'\npath = 'deep.jsonl'", "deep.jsonl line 1: not valid JSON"),
        ("task = 'mine'\nrows = 1", 'mine train row 0: the row does not fit task "mine": ZeroDivisionError'),
    ]:
        (tmp_path / "r.toml").write_text(f"stage = 'mid'\n[[train]]\n{entry}\n")
        command = ["build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", tmp_path / "o"]
        result = chatdata(*command, "--task-file", tmp_path / "mine.py")
        assert result.stderr.splitlines()[-1].startswith(f"Error: {error}"), result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("bad", ["x", 1.5, None, True, -1, 2**32, 2**70])
def test_an_id_that_is_no_number_of_32_bits(tmp_path: Path, byte_tokenizer: Tokenizer, bad: object) -> None:
    save_tokenizer(byte_tokenizer, tmp_path)
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    contents["model"]["vocab"]["a"] = bad
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(TokenizerError, match=rf"tokenizer.json: id {bad!r} does not fit uint32 shards; ids must"):
        read_json(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000])
def test_a_tokenizer_json_that_python_cannot_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: not valid JSON: "):
        read_json(tmp_path / "tokenizer.json")


def test_a_training_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"latin.txt: not UTF-8; save it as UTF-8$"):
        train_tokenizer(read_texts((tmp_path / "latin.txt",)), 300)


def test_a_unit_that_may_not_be_read_is_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "key-hash.arrow").touch()
    monkeypatch.setattr("chatdata.build.cache.file_sha256", refuse)
    assert not take_unit(tmp_path / "key-hash.arrow")
