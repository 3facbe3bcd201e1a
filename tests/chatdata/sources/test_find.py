"""Where files of a recipe are looked for: names with any characters, and files that are not what they seem."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from chatdata.errors import MissingSource, SourceError
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations, resolve
from chatdata.sources.source import Source
from chatdata.tasks import load_tasks

LINE = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]\n'
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 146946961\n"


def source_of(folder: Path, entry: str, **locations: object) -> Source:
    """The source of the one entry of a recipe in `folder`."""
    (folder / "r.toml").write_text(f'stage = "sft"\n[[train]]\n{entry}\n', encoding="utf-8")
    tasks = load_tasks()
    recipe = load_recipe(str(folder / "r.toml"), tasks)
    (entry,) = recipe.splits["train"]
    return resolve(entry, tasks[entry.task], Locations(folder, **locations))  # type: ignore[arg-type]


def names(source: Source) -> list[str]:
    return [file.name for file in source.files]


def conversations(path: str) -> str:
    return f'task = "conversations"\npath = {json.dumps(path)}'


def test_only_a_star_in_the_file_name_is_a_wildcard(tmp_path: Path) -> None:
    folder = tmp_path / "d [1] *"
    folder.mkdir()
    for name in (
        "a[1].jsonl",
        "a1.jsonl",
        "b[2]-x.jsonl",
        "b[2]-y.jsonl",
        "b2-z.jsonl",
        "c?.jsonl",
        "c1.jsonl",
        "d e.jsonl",
    ):
        (folder / name).write_text(LINE)
    for path, expected in (
        ("a[1].jsonl", ["a[1].jsonl"]),
        ("b[2]-*.jsonl", ["b[2]-x.jsonl", "b[2]-y.jsonl"]),
        ("c?.jsonl", ["c?.jsonl"]),
        ("d e.jsonl", ["d e.jsonl"]),
    ):
        assert names(source_of(folder, conversations(path))) == expected
    assert names(source_of(tmp_path, conversations("d [1] */a[1].jsonl"))) == ["d [1] */a[1].jsonl"]


def test_home_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest names such a file without its folder, as any file outside the recipe's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "data").mkdir(parents=True)
    (tmp_path / "home" / "data" / "a.jsonl").write_text(LINE)
    (tmp_path / "home" / "words.txt").write_text("cat\ndog\n")
    source = source_of(tmp_path, conversations("~/data/a.jsonl"))
    assert names(source) == ["a.jsonl"] and source.files[0].path == tmp_path / "home" / "data" / "a.jsonl"
    spelling = 'task = "simple_spelling"\nrows = 2'
    source = source_of(tmp_path, f'{spelling}\nwords = "~/words.txt"')
    assert source.option_files["words"].path == tmp_path / "home" / "words.txt"


def test_a_folder_among_the_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "y.jsonl").write_text(LINE)
    with pytest.raises(MissingSource, match=rf"{tmp_path}/x\.jsonl: a folder; {tmp_path}/\*\.jsonl takes files only$"):
        source_of(tmp_path, conversations("*.jsonl"))
    with pytest.raises(
        MissingSource, match=rf"{tmp_path}/x\.jsonl: a folder; name a file, or {tmp_path}/x\.jsonl/\*\.jsonl"
    ):
        source_of(tmp_path, conversations("x.jsonl"))
    with pytest.raises(MissingSource, match=rf"{tmp_path}/z\*\.jsonl: no such file$"):
        source_of(tmp_path, conversations("z*.jsonl"))


def test_a_pointer_of_git_lfs_is_not_data(tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "openai" / "gsm8k" / "main"
    hub.mkdir(parents=True)
    paths = [tmp_path / name for name in ("a.jsonl", "a.parquet", "words.txt")]
    for path in (*paths, hub / "train-00000-of-00001.parquet"):
        path.write_text(POINTER)
    for entry, given in (
        (conversations("a.jsonl"), {}),
        (conversations("a.parquet"), {}),
        ('task = "simple_spelling"\nrows = 2', {"words": str(tmp_path / "words.txt")}),
        ('task = "gsm8k"', {"data_dir": tmp_path / "hub"}),
    ):
        with pytest.raises(
            SourceError, match="a Git LFS pointer, not the file itself; run `git lfs pull` where you cloned"
        ):
            source_of(tmp_path, entry, **given)


def test_a_name_that_no_manifest_can_hold(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/b\xff.jsonl"
    with open(path, "w") as file:  # noqa: PTH123 - a name in bytes
        file.write(LINE)
    with pytest.raises(SourceError, match=r"'b\\udcff\.jsonl': the name is not UTF-8; rename the file$"):
        source_of(tmp_path, conversations("*.jsonl"))


@pytest.fixture
def cloned(tmp_path: Path) -> Path:
    """A folder of clones: a chat dataset with two subsets."""
    folder = tmp_path / "hub" / "me" / "chats"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        (folder / name / "data.jsonl").write_text('{"messages": ' + LINE.strip() + "}\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/data.jsonl\n" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return tmp_path / "hub"


CHATS = 'task = "conversations"\nrepo = "me/chats"'


def test_a_missing_subset_names_those_there_are(cloned: Path, tmp_path: Path) -> None:
    for entry in (CHATS, f'{CHATS}\nsubset = "three"'):
        with pytest.raises(SourceError, match=r"""me/chats: key "subset": must be one of 'one', 'two'$"""):
            source_of(tmp_path, entry, data_dir=cloned)


def test_data_dir_with_brackets(cloned: Path, tmp_path: Path) -> None:
    """`datasets` would take them for a pattern. Rows that it reads itself are read too."""
    hub = tmp_path / "h[1] *?" / "hub"
    shutil.copytree(cloned, hub)
    source = source_of(tmp_path, f'{CHATS}\nsubset = "two"', data_dir=hub)
    assert [(file.name, file.path) for file in source.files] == [
        ("two/data.jsonl", hub / "me" / "chats" / "two" / "data.jsonl")
    ]
    (hub / "me" / "own").mkdir()
    (hub / "me" / "own" / "data.json").write_text(json.dumps([{"messages": json.loads(LINE)}] * 2))
    source = source_of(tmp_path, CHATS.replace("chats", "own"), data_dir=hub)
    assert source.num_rows == 2 and source.dataset[1]["messages"][1]["content"] == "Yo"


def test_rows_of_different_keys_are_refused_for_that_reason(cloned: Path, tmp_path: Path) -> None:
    (cloned / "me" / "own").mkdir()
    rows = [{"messages": json.loads(LINE), "meta": {"a": 1}}, {"messages": json.loads(LINE), "meta": {"b": "1"}}]
    (cloned / "me" / "own" / "data.json").write_text(json.dumps(rows))
    with pytest.raises(
        SourceError, match="rows differ in keys or types, which `datasets` does not keep exactly; convert"
    ):
        source_of(tmp_path, CHATS.replace("chats", "own"), data_dir=cloned)


def test_hidden_files_match_no_pattern_that_does_not_ask_for_them(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("d/a.jsonl", "d/.a.jsonl", "d/b.jsonl", ".hidden/c.jsonl"):
        (tmp_path / name).write_text(LINE)
    (tmp_path / "d/._a.jsonl").write_bytes(b"\0\5\26\7 Mac OS X")
    assert names(source_of(tmp_path, conversations("d/*.jsonl"))) == ["d/a.jsonl", "d/b.jsonl"]
    assert names(source_of(tmp_path, conversations("d/.a.jsonl"))) == ["d/.a.jsonl"]
    assert names(source_of(tmp_path, conversations("d/.a*.jsonl"))) == ["d/.a.jsonl"]
    assert names(source_of(tmp_path, conversations(".hidden/*.jsonl"))) == [".hidden/c.jsonl"]
    (tmp_path / "d/a.jsonl").unlink(), (tmp_path / "d/b.jsonl").unlink()
    with pytest.raises(MissingSource, match="no such file"):
        names(source_of(tmp_path, conversations("d/*.jsonl")))
