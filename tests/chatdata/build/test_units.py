"""Work units: cut, named by content, rendered by anyone, found again; a build is the same whoever rendered it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.build import engines as engine
from chatdata.build import units
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.build.units import RENDERING_CODE, Renderer, code_sha256, cut_units, render_unit, take_unit
from chatdata.disk import cache_folder
from chatdata.errors import BuildError, ConversationError, SourceError, TaskError, TokenizerError
from chatdata.recipe import load_recipe
from chatdata.sources import file, jsonl
from chatdata.sources.file import SourceFile
from chatdata.sources.find import Locations
from chatdata.sources.source import Source
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer

PACKAGE = Path(units.__file__).parents[1]
NUM_UNITS = 40  # of the recipe below, in units of about 2 kB
RECIPE = """
stage = "sft"
max_tokens = 60
overflow = "truncate"
zero_supervised = "drop"
[[train]]
task = "conversations"
path = "chats.jsonl"
[[train]]
task = "simple_spelling"
rows = 300
words = "words.txt"
[[val]]
task = "conversations"
path = "chats.jsonl"
stop = 10
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of 300 conversations of every kind and 300 words, in a folder of its own."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(300):
            parts = [{"type": "text", "text": "é" * (i % 50)}, {"type": "python", "text": f"{i}+1"}]
            parts.append({"type": "python_output", "text": str(i + 1)})
            answer: Any = parts if i % 3 else f"answer {i} " * (i % 7)
            messages = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps(messages[: 1 + (i % 11 > 0)]) + "\n" * (1 + (i % 5 == 0)))
    (folder / "words.txt").write_text("apple\nbanana\ncherry\n")
    (folder / "mine.toml").write_text(RECIPE)
    return folder / "mine.toml"


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Units of about 2 kB, workers for any amount of work, and a cache of this test's own."""
    for module in (jsonl, file, units):
        monkeypatch.setattr(module, "SEGMENT_BYTES", 2_000)
    monkeypatch.setattr(engine, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr("chatdata.sources.source.ROWS_PER_SEGMENT", 64)
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))


def run(
    recipe: Path, tokenizer: Tokenizer, out: Path, task_files: tuple[Path, ...] = (), **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and report of a build."""
    tasks = load_tasks(task_files)
    loaded = load_recipe(str(recipe), tasks)
    plan = make_build_plan(loaded, tasks, tokenizer, Locations(loaded.folder))
    manifest = build(plan, out, **options)
    return manifest, json.loads((out / "report.json").read_text())


def test_any_worker_count_gives_the_same_bytes(recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifests = {}
    for workers in (1, 2, 5):
        units.prune(cache_folder("units"), 0)
        manifests[workers], report = run(recipe, byte_tokenizer, tmp_path / f"out{workers}", workers=workers)
        assert report["units"] == {"rendered": NUM_UNITS, "cached": 0, "damaged": 0}
        assert report["workers"] == workers
    assert manifests[1] == manifests[2] == manifests[5]
    train = manifests[1]["splits"]["train"]
    assert (train["documents"], train["tokens"], train["supervised"]) == (572, 26_961, 14_707)


def test_a_warm_cache_gives_the_same_bytes(recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    cold, _ = run(recipe, byte_tokenizer, tmp_path / "cold")
    warm, report = run(recipe, byte_tokenizer, tmp_path / "warm")
    assert report["units"] == {"rendered": 0, "cached": NUM_UNITS, "damaged": 0}
    assert warm == cold


def test_little_text_is_encoded_by_tiktoken(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little, report = run(recipe, byte_tokenizer, tmp_path / "little")
    assert report["encoder"]["name"] == "tiktoken"
    units.prune(cache_folder("units"), 0)
    monkeypatch.setattr("chatdata.build.run.FAST_ENCODER_BYTES", 0)
    more, report = run(recipe, byte_tokenizer, tmp_path / "more")
    assert report["encoder"]["name"] == "gigatoken"
    assert more == little


def test_changing_one_entry_renders_only_its_rows(recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    run(recipe, byte_tokenizer, tmp_path / "a")
    recipe.write_text(RECIPE.replace("rows = 300", "rows = 256").replace("max_tokens = 60", "max_tokens = 50"))
    _, report = run(recipe, byte_tokenizer, tmp_path / "b")
    assert report["units"] == {"rendered": 0, "cached": NUM_UNITS - 1, "damaged": 0}
    recipe.write_text(RECIPE.replace("rows = 300", "rows = 310"))
    _, report = run(recipe, byte_tokenizer, tmp_path / "c")
    assert report["units"] == {"rendered": 1, "cached": NUM_UNITS - 1, "damaged": 0}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_unit_is_rendered_again(recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, damage: str) -> None:
    whole, _ = run(recipe, byte_tokenizer, tmp_path / "a")
    unit = units.cached_units(cache_folder("units"))[7].path
    data = bytearray(unit.read_bytes())
    data[len(data) // 2] ^= 1
    unit.write_bytes({"flip": data, "cut": data[: len(data) // 2], "empty": b""}[damage])
    again, report = run(recipe, byte_tokenizer, tmp_path / "b")
    assert report["units"] == {"rendered": 1, "cached": NUM_UNITS - 1, "damaged": 1}
    assert again == whole


def renderer_of(source: Source, tokenizer: Tokenizer, folder: Path) -> Renderer:
    folder.mkdir(exist_ok=True)
    return Renderer((source,), tokenizer, "tiktoken", folder)


def source_of(recipe: Path) -> Source:
    file = recipe.parent / "chats.jsonl"
    return Source("chats", load_tasks()["conversations"], (SourceFile(file, file.name),))


def test_a_key_is_content_and_nothing_else(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(source: Source, tokenizer: Tokenizer = byte_tokenizer, drop: int = 0) -> list[str]:
        wanted = np.ones(300, dtype=bool)
        wanted[:drop] = False
        return [unit.key for unit in cut_units(0, source, tokenizer, wanted)]

    first = keys(source_of(recipe))
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes((recipe.parent / "chats.jsonl").read_bytes())
    source = source_of(recipe)
    assert keys(Source("other name", source.task, (SourceFile(moved, "other"),))) == first
    assert keys(source, drop=1)[0] != first[0] and keys(source, drop=1)[1:] == first[1:]
    other = Tokenizer(byte_tokenizer.ranks, r"\s+|\S+", byte_tokenizer.special_ids, "other pattern")
    assert not set(keys(source, tokenizer=other)) & set(first)
    monkeypatch.setattr(units, "code_sha256", lambda package: "another version")
    assert not set(keys(source_of(recipe))) & set(first)
    monkeypatch.undo()
    with moved.open("a") as file:
        file.write(" ")
    assert not set(keys(Source("chats", source.task, (SourceFile(moved, "chats"),)))) & set(first)


def test_a_key_covers_the_code_that_renders_and_no_other(tmp_path: Path) -> None:
    package = tmp_path / "chatdata"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_sha256(package)
    for name in ("look/report/page.py", "check/diff.py", "cli/app.py", "build/run.py", "errors.py"):
        assert hash_after_an_edit(package, name) == before
    for name in ("render/batch.py", "tokenizer/bpe.py", "tasks/gsm8k.py", "tasks/texts/names.txt", "calculator.py"):
        assert hash_after_an_edit(package, name) != before


def hash_after_an_edit(package: Path, name: str) -> str:
    """code_sha256 with another line in the file; the file is then put back."""
    text = (package / name).read_text()
    (package / name).write_text(text + "# a typo fixed\n")
    code_sha256.cache_clear()
    found = code_sha256(package)
    (package / name).write_text(text)
    return found


def test_what_the_renderer_imports_is_in_its_keys() -> None:
    """Every module that build/units.py imports, directly or not, decides what it renders or is named here."""
    decide_nothing = {
        *("errors.py", "disk.py"),  # messages; how files are written
        "recipe.py",  # which rows: the wanted rows are in the key
        *("grading.py",),  # of answers
    }
    found, waiting = set[str](), ["build/units.py"]
    while waiting:
        name = waiting.pop()
        if name in found or name in decide_nothing:
            continue
        found.add(name)
        for module in re.findall(r"^ *(?:from|import) chatdata\.?([\w.]*)", (PACKAGE / name).read_text(), re.M):
            path = PACKAGE / module.replace(".", "/")
            waiting += [
                str(p.relative_to(PACKAGE)) for p in (path.with_suffix(".py"), *path.glob("*.py")) if p.is_file()
            ]
    covered = {n for n in found if any(n == part or n.startswith(f"{part}/") for part in RENDERING_CODE)}
    assert found - covered == set()
    assert all((PACKAGE / name).exists() for name in (*RENDERING_CODE, *decide_nothing))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 3_000), st.data())
@settings(deadline=None, max_examples=50)
def test_units_hold_each_wanted_row_once(lengths: list[int], row_bytes: int, data: st.DataObject) -> None:
    class Segmented(Source):
        def segments(self, num_rows: int) -> list[tuple[int, int]]:
            return [(length, length * row_bytes) for length in lengths]

        def content(self, first: int, num_rows: int) -> Any:
            return [first, num_rows]

    source = Segmented("x", load_tasks()["conversations"])
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))), dtype=bool)
    tokenizer = type("T", (), {"sha256": "t"})()
    found = cut_units(0, source, tokenizer, wanted)  # type: ignore[arg-type]
    rows = np.concatenate([np.flatnonzero(unit.wanted) + unit.first for unit in found]) if found else []
    assert list(rows) == np.flatnonzero(wanted).tolist()
    assert len({unit.key for unit in found}) == len(found)
    assert all(unit.num_rows for unit in found)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceFile]:
    """100 rows {"n": 0 … 99} in each form a file can have."""
    folder = tmp_path_factory.mktemp("numbered")
    table = pa.table({"n": list(range(100)), "pad": ["x" * 200] * 100})
    for name, group in (("one", 100), ("many", 7)):
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=group, use_dictionary=False)
    lines = [json.dumps({"n": n, "pad": "x" * 200}) + ("\n \n" if n % 9 == 0 else "\n") for n in range(100)]
    (folder / "lines.jsonl").write_text("\n" + "".join(lines).rstrip("\n"))
    return {name: SourceFile(folder / name, name) for name in ("one.parquet", "many.parquet", "lines.jsonl")}


def numbers_of(source: Source, first: int, wanted: np.ndarray) -> list[tuple[int, int]]:
    return [
        (row, record["n"])
        for rows, raw in source.read_batches(first, wanted)
        for row, record in zip(rows.tolist(), raw if isinstance(raw, list) else raw.to_pylist(), strict=True)
    ]


@given(st.sampled_from(["one.parquet", "many.parquet", "lines.jsonl"]), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=80)
def test_any_range_of_a_file_is_read_alone(
    numbered: dict[str, SourceFile], name: str, first: int, data: st.DataObject
) -> None:
    file = numbered[name]
    assert file.num_rows == 100
    assert len(file.segments) > 5
    size = data.draw(st.integers(1, 100 - first))
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool)
    found = numbers_of(Source("one", load_tasks()["conversations"], (file,)), first, wanted)
    assert found == [(row, row) for row in (np.flatnonzero(wanted) + first).tolist()]


def test_a_source_of_several_files_reads_across_them(numbered: dict[str, SourceFile]) -> None:
    source = Source("all", load_tasks()["conversations"], tuple(numbered.values()))
    wanted = np.ones(150, dtype=bool)
    found = numbers_of(source, 75, wanted)
    assert found == [(row, row % 100) for row in range(75, 225)]
    assert [row for row, _ in source.read(np.arange(300) % 50 == 0)] == [0, 50, 100, 150, 200, 250]
    assert source.where(199) == "many.parquet row 99"
    assert source.where(201) == "lines.jsonl line 4"


TASK_FILE = """
import os, signal
from multiprocessing import parent_process
from pathlib import Path
from chatdata.tasks import Task
def to_conversation(row):
    if {when}:
        {action}
    return row
TASK = Task(name="mine", summary="", licence="", to_conversation=lambda row: to_conversation(row))
"""


AT_ROW_150 = 'row[0]["content"] == "question 150"'


def with_task(recipe: Path, action: str, when: str = AT_ROW_150) -> list[str]:
    """A task file that does something at row 150 (or when it is said); the arguments to build with it."""
    (recipe.parent / "task.py").write_text(TASK_FILE.format(action=action, when=when))
    text = RECIPE if when == AT_ROW_150 else RECIPE.partition('[[train]]\ntask = "simple')[0]
    recipe.write_text(text.replace('"conversations"', '"mine"'))
    return ["build", "--recipe", str(recipe), "--task-file", str(recipe.parent / "task.py"), "--workers", "2"]


def run_small(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own, with units as small as in this file."""
    program = (
        "from chatdata.build import engines as engine, units\nfrom chatdata.sources import file, jsonl, source\n"
        "source.ROWS_PER_SEGMENT = 64\n"
        "jsonl.SEGMENT_BYTES = file.SEGMENT_BYTES = units.SEGMENT_BYTES = 2_000; engine.BYTES_PER_WORKER = 1\n"
        "from chatdata.cli import main\nmain()"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def tokenizer_file(byte_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    from chatdata.tokenizer.files import save_tokenizer

    save_tokenizer(byte_tokenizer, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_killed_worker_is_named_and_its_units_are_kept(recipe: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    some_there = f"parent_process() and len(list(Path({str(cache_folder('units'))!r}).iterdir())) > 6"
    command = with_task(recipe, "os.kill(os.getpid(), signal.SIGKILL)", when=some_there)
    process = run_small([*command, "--tokenizer", str(tokenizer_file), "--out", str(tmp_path / "out")])
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("Error: a worker was killed (out of memory?)")
    assert not (tmp_path / "out").exists()
    assert len(list(cache_folder("units").glob("*.arrow"))) >= 5  # of more than six names two may be half-written


def test_an_error_in_a_worker_names_the_row(recipe: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    command = with_task(recipe, "raise KeyError('content')")
    process = run_small([*command, "--tokenizer", str(tokenizer_file), "--out", str(tmp_path / "out")])
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    expected = 'Error: chats.jsonl line 181: the row does not fit task "mine": no key "content"'
    assert errors.strip().splitlines()[-1] == expected
    # the command's own process is a worker too; now one of the others meets it
    command = with_task(recipe, "raise KeyError('content')", when="parent_process()")
    process = run_small([*command, "--tokenizer", str(tokenizer_file), "--out", str(tmp_path / "out")])
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    expected = r'Error: chats\.jsonl line \d+: the row does not fit task "mine": no key "content"'
    assert re.fullmatch(expected, errors.strip().splitlines()[-1])


def test_caches_of_two_machines_are_merged_by_copying(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, chats, words, validation = re.split(r"(?=\[\[)", RECIPE)
    merged = tmp_path / "cache" / "units"
    merged.mkdir(parents=True)
    for part, text in (("first", chats + validation), ("second", words)):
        monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / part))
        (recipe.parent / "part.toml").write_text(head + text)
        run(recipe.parent / "part.toml", byte_tokenizer, tmp_path / f"out-{part}")
        shutil.copytree(cache_folder("units"), merged, dirs_exist_ok=True)
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    _, report = run(recipe, byte_tokenizer, tmp_path / "out")
    assert report["units"] == {"rendered": 0, "cached": NUM_UNITS, "damaged": 0}


def test_ray_gives_the_same_bytes_though_a_worker_is_killed(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="builds with Ray: uv sync")
    marker = tmp_path / "killed"
    with_task(recipe, f"Path({str(marker)!r}).exists() or (Path({str(marker)!r}).touch(), os.kill(os.getpid(), 9))")
    marker.touch()
    alone, _ = run(recipe, byte_tokenizer, tmp_path / "alone", task_files=(recipe.parent / "task.py",))
    units.prune(cache_folder("units"), 0)
    marker.unlink()
    options = {"engine": "ray", "task_files": (recipe.parent / "task.py",)}
    by_ray, report = run(recipe, byte_tokenizer, tmp_path / "ray", **options)
    assert marker.exists()  # the worker that came to row 150 first was killed there, and Ray ran its unit again
    assert by_ray == alone
    assert report["units"] == {"rendered": NUM_UNITS, "cached": 0, "damaged": 0}


def test_without_ray_the_extra_is_named(recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(BuildError, match=r"^--engine ray needs Ray: `uv sync --extra ray` installs it$"):
            run(recipe, byte_tokenizer, tmp_path / "out", engine="ray")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_workers_and_goes_on(
    recipe: Path, tokenizer_file: Path, byte_tokenizer: Tokenizer, tmp_path: Path, sent: signal.Signals
) -> None:
    marker = tmp_path / "reached"
    action = f"Path({str(marker)!r}).exists() or (Path({str(marker)!r}).write_text(str(os.getpid())), signal.pause())"
    command = [*with_task(recipe, action), "--tokenizer", str(tokenizer_file), "--out"]
    process = run_small([*command, str(tmp_path / "out")])
    try:
        wait_for(lambda: marker.exists() and marker.read_text())
        wait_for(
            lambda: len(list(cache_folder("units").glob("*.arrow"))) == NUM_UNITS - 1
        )  # all but the one that waits
        process.send_signal(sent)
        assert process.wait(60) == (-9 if sent == signal.SIGKILL else 130)
        wait_for(lambda: not Path("/proc", marker.read_text()).exists())  # its worker ended with it
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "out").exists()
    for out, rendered in (("out", 1), ("alone", NUM_UNITS)):
        if out == "alone":
            units.prune(cache_folder("units"), 0)
        process = run_small([*command, str(tmp_path / out)])
        assert process.wait(60) == 0, process.communicate()
        process.communicate()
        report = json.loads((tmp_path / out / "report.json").read_text())
        assert report["units"] == {"rendered": rendered, "cached": NUM_UNITS - rendered, "damaged": 0}
    manifests = [(tmp_path / out / "manifest.json").read_bytes() for out in ("out", "alone")]
    assert manifests[0] == manifests[1]


def wait_for(reached: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.02)


def test_tasks_and_sources_travel_to_workers(recipe: Path, tmp_path: Path) -> None:
    with_task(recipe, "pass")
    tasks = load_tasks((recipe.parent / "task.py",))
    for name in ("smoltalk", "mine", "simple_spelling"):
        assert pickle.loads(pickle.dumps(tasks[name])).name == name
    loaded = load_recipe(str(recipe), tasks)
    words = {"words": recipe.parent / "words.txt", "holdout": False}
    source = Source("s", tasks["simple_spelling"], split="train", options=words)
    assert source.make_row is not None
    rows = [source.make_row(i) for i in range(5)]
    again = pickle.loads(pickle.dumps(source))
    (recipe.parent / "words.txt").unlink()  # the words travel; they are not read again
    assert [again.make_row(i) for i in range(5)] == rows
    assert loaded.splits["train"][0].task == "mine"
    travelling = pickle.dumps(tasks["mine"])
    (recipe.parent / "task.py").write_text("# changed\n" + TASK_FILE.format(action="pass", when="True"))
    with pytest.raises(TaskError, match="not the file the build started with"):
        pickle.loads(travelling)


def test_a_text_the_encoder_gives_up_on_is_named(recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = (recipe.parent / "chats.jsonl").read_text().splitlines()
    lines[20] = json.dumps([{"role": "user", "content": " " * 1_000_000}])
    (recipe.parent / "chats.jsonl").write_text("\n".join(lines))
    source = source_of(recipe)
    renderer = renderer_of(source, byte_tokenizer, tmp_path / "units")
    with pytest.raises(TokenizerError, match=r"^chats.jsonl line 21: bytes: the split pattern gives up on a text of "):
        for unit in cut_units(0, source, byte_tokenizer, np.ones(source.num_rows, dtype=bool)):
            render_unit(renderer, unit)
    assert not list((tmp_path / "units").glob("*.tmp"))


@pytest.mark.parametrize(("policy", "error"), [("overflow", BuildError), ("zero_supervised", ConversationError)])
def test_policies_name_the_row(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, policy: str, error: type[Exception]
) -> None:
    changed = RECIPE.replace(f'{policy} = "{"truncate" if policy == "overflow" else "drop"}"', f'{policy} = "error"')
    recipe.write_text(changed)
    where = "line 9: 69 tokens, over" if policy == "overflow" else "line 1: no supervised token"
    with pytest.raises(error, match=f"^chats.jsonl {where}"):
        run(recipe, byte_tokenizer, tmp_path / "out")


def test_the_cache_command(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, chatdata: Callable[..., Any]
) -> None:
    run(recipe, byte_tokenizer, tmp_path / "out")
    found = units.cached_units(cache_folder("units"))
    old = time.time() - 3 * 86_400
    for unit in found[:10]:
        os.utime(unit.path, (old, old))
    (cache_folder("units") / "abc.host-1.tmp").write_bytes(b"left by a killed build")
    os.utime(cache_folder("units") / "abc.host-1.tmp", (old, old))
    shown = json.loads(chatdata("cache", "--json").stdout)
    assert shown["units"] == NUM_UNITS + 1 and shown["bytes"] == sum(unit.num_bytes for unit in found) + 22
    removed = json.loads(chatdata("cache", "--prune", "2", "--json").stdout)
    assert (removed["removed_units"], removed["units"]) == (11, NUM_UNITS - 10)
    _, report = run(recipe, byte_tokenizer, tmp_path / "again")
    assert report["units"] == {"rendered": 10, "cached": NUM_UNITS - 10, "damaged": 0}
    result = chatdata("cache", "--prune", "0")
    assert "0 work units, 0.0 MB" in result.stdout and f"removed: {NUM_UNITS} work units" in result.stdout


def test_only_abandoned_half_written_units_are_removed(recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, old = cache_folder("units"), time.time() - 2 * 86_400
    folder.mkdir(parents=True)
    left = {
        f"killed.{units.MACHINE}-0.tmp": b"half a unit",
        "old.other-machine-0.tmp": b"half a unit",
        f"growing.{units.MACHINE}-0.tmp": b"half a unit",
        f"new.{units.MACHINE}-0.tmp": b"",  # not locked yet
        "growing.other-machine-0.tmp": b"half a unit",  # its lock may not be seen here
        "suspended.other-machine-0.tmp": b"half a unit",
    }
    for name, content in left.items():
        (folder / name).write_bytes(content)
    for name in ("old.other-machine-0.tmp", "suspended.other-machine-0.tmp"):
        os.utime(folder / name, (old, old))
    with (
        (folder / f"growing.{units.MACHINE}-0.tmp").open("rb") as growing,
        (folder / "suspended.other-machine-0.tmp").open("rb") as suspended,
    ):
        fcntl.flock(growing, fcntl.LOCK_EX)
        fcntl.flock(suspended, fcntl.LOCK_EX)
        run(recipe, byte_tokenizer, tmp_path / "out")
        units.prune(folder, 0)
    assert sorted(path.name for path in folder.glob("*.tmp")) == sorted(list(left)[2:])


def test_a_unit_is_locked_while_it_grows_and_no_two_processes_share_a_name(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, names = source_of(recipe), list[str]()
    renderer = renderer_of(source, byte_tokenizer, tmp_path / "units")
    unit = cut_units(0, source, byte_tokenizer, np.ones(source.num_rows, dtype=bool))[0]
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers

    def look(num_rows: int) -> None:
        names.extend(path.name for path in renderer.folder.glob("*.tmp"))
        assert not units.prune(renderer.folder, 9)  # by another build at the same time

    paths = [render_unit(renderer, unit, look).path for _ in range(2)]
    assert len(set(names)) == 2 and paths[0] == paths[1] and paths[0].is_file()


def test_units_with_exchanged_names_are_rendered_again(recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest, _ = run(recipe, byte_tokenizer, tmp_path / "out")
    one, other = (unit.path for unit in units.cached_units(cache_folder("units"))[:2])
    contents = one.read_bytes(), other.read_bytes()
    (key, content), (other_key, other_content) = one.stem.split("-"), other.stem.split("-")
    one.unlink(), other.unlink()
    one.with_name(f"{key}-{other_content}.arrow").write_bytes(contents[1])
    one.with_name(f"{other_key}-{content}.arrow").write_bytes(contents[0])
    again, report = run(recipe, byte_tokenizer, tmp_path / "again")
    assert report["units"] == {"rendered": 2, "cached": NUM_UNITS - 2, "damaged": 2}
    assert again == manifest


@pytest.mark.parametrize("workers", [1, 2])
def test_a_source_that_changes_during_a_build_fails_it_and_leaves_no_unit_of_other_rows(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    expected, _ = run(recipe, byte_tokenizer, tmp_path / "expected")
    units.prune(cache_folder("units"), 0)
    chats = recipe.parent / "chats.jsonl"
    before = chats.read_bytes()

    def change(name: str, done: int, total: int, unit: str, note: str = "", *, part: bool = False) -> None:
        chats.write_bytes(before.upper().replace(b"ROLE", b"role")[: len(before)])

    with pytest.raises(SourceError, match=r"^chats.jsonl: changed while it was read; build again$"):
        run(recipe, byte_tokenizer, tmp_path / "out", workers=workers, progress=change)
    assert not (tmp_path / "out").exists()
    chats.write_bytes(before)
    assert run(recipe, byte_tokenizer, tmp_path / "out")[0] == expected


def test_a_full_disk_for_the_firewall_list_leaves_no_build(
    recipe: Path, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatdata.disk import write_json

    def full(path: Path, value: Any) -> None:
        if "firewall" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr("chatdata.build.run.write_json", full)
    with pytest.raises(BuildError, match="no space left on the disk; nothing was written there"):
        run(recipe, byte_tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("chatdata.build.run.write_json", write_json)
    run(recipe, byte_tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_a_unit_that_may_not_be_read_is_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "key-hash.arrow").touch()
    monkeypatch.setattr("chatdata.build.units.file_sha256", refuse)
    assert not take_unit(tmp_path / "key-hash.arrow")
