"""The Hub path and word lists by URL, through the command line, against the small server of hub_server.py."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatdata import open_build
from chatdata.errors import MissingSource, SourceError
from chatdata.recipe import Entry
from chatdata.sources import hub as hub_module
from chatdata.sources.find import Locations, check_complete, resolve
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import train_tokenizer
from chatdata.tokenizer.files import save_tokenizer

REFUSED = f"[Errno {errno.ECONNREFUSED}] Connection refused"
GSM8K = "main/train-00000-of-00001.parquet"
SMOLTALK = "HuggingFaceTB/smol-smoltalk"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def gsm8k_rows(first: int, count: int) -> list[dict[str, str]]:
    return [
        {"question": f"How much is {i}+1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
        for i in range(first, first + count)
    ]


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Say {text}."}, {"role": "assistant", "content": text}]


def smoltalk_rows(words: str) -> list[dict[str, Any]]:
    return [{"messages": chat(word), "source": "ours"} for word in words.split()]


@pytest.fixture
def hub() -> Iterator[Any]:
    with hub_server.HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    save_tokenizer(train_tokenizer(["How much is it? Say hello, hello."] * 20, 275), folder)
    return folder


@pytest.fixture(scope="module")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where Python is told to write no bytecode, compiling the libraries in every run would take half of the time."""
    if not sys.dont_write_bytecode:
        return {}
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}


class Result:
    def __init__(self, code: int, stdout: str, stderr: str, seconds: float) -> None:
        self.code, self.stdout, self.stderr, self.seconds = code, stdout, stderr, seconds

    @property
    def error(self) -> str:
        """The one line of a run that failed as a user's mistake should."""
        assert (self.code, self.stdout) == (1, ""), self.stderr
        assert re.fullmatch(r"Error: [^\n]+\n", self.stderr), self.stderr
        return self.stderr.removeprefix("Error: ").removesuffix("\n")


Run = Callable[..., Result]


@pytest.fixture
def run(chatdata: Callable[..., Any], tmp_path: Path, tokenizer: Path, bytecode: dict[str, str]) -> Run:
    """`run(recipe, out, endpoint, *options, **environment)` builds in a process of its own; caches are the test's."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    caches = {"HF_HOME": str(tmp_path / "hf"), "CHATDATA_CACHE": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}

    def build(recipe: str, out: str, endpoint: str, *options: str, **environment: str) -> Result:
        (tmp_path / "recipe.toml").write_text(recipe)
        env = clean | bytecode | caches | {"HF_ENDPOINT": endpoint} | environment
        fixed = ("build", "--recipe", "recipe.toml", "--tokenizer", tokenizer, "--out", out)
        started = time.monotonic()
        done = chatdata(*fixed, *options, env=env, cwd=tmp_path)
        return Result(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    return build


def recipe(*entries: str) -> str:
    """A recipe with these entries: `recipe("task = 'gsm8k'", …)`."""
    return "\n".join(['stage = "mid"', *(f"[[train]]\n{entry}" for entry in entries)])


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def bodies(requests: list[tuple[str, str]]) -> list[str]:
    """File names whose content was asked for, in alphabetical order."""
    return sorted(path.split("/", 6)[-1] for method, path in requests if method == "GET" and "/resolve/" in path)


def fetch_command(repo: str, include: str = "") -> str:
    include = f"--include '{include}' " if include else ""
    return f"hf download {repo} --repo-type dataset {include}--local-dir DIR/{repo}, then --data-dir DIR"


def stored_files(folder: Path) -> list[Path]:
    """What was fetched, or a build left; not the rendered units."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".arrow"]


def progress_names(stderr: str) -> list[str]:
    """What the plain lines of progress speak of, in the order it was finished."""
    lines = [line.split(":") for line in stderr.splitlines()]
    return [name for name, numbers in lines if re.match(r" ([\d,]+) of \1 ", numbers)]


# --- first use, cache, revisions ------------------------------------------------------------------------------------


def test_first_use_downloads_once_and_main_stays_where_it_was(hub: Any, run: Run, tmp_path: Path) -> None:
    train, test = parquet(gsm8k_rows(0, 7)), parquet(gsm8k_rows(50, 3))
    shards = [parquet(smoltalk_rows("one two three")), parquet(smoltalk_rows("four five"))]
    gsm8k = {"README.md": b"card", GSM8K: train, "main/test-00000-of-00001.parquet": test}
    old = hub.push("openai/gsm8k", gsm8k)
    talk = hub.push(SMOLTALK, {f"data/train-{i:05d}-of-00002.parquet": shard for i, shard in enumerate(shards)})
    both = recipe("task = 'gsm8k'", "task = 'smoltalk'")

    first = run(both, "first", hub.url)
    assert first.code == 0, first.stderr
    # nothing of the library's on stderr: only our plain progress lines
    assert progress_names(first.stderr) == [
        "openai/gsm8k main train",
        f"{SMOLTALK} train",
        "all sources",
        "write train",
    ]
    requests = hub.take_requests()
    assert bodies(requests) == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", GSM8K]
    assert all("/openai/gsm8k" in path or f"/{SMOLTALK}" in path for _, path in requests)  # no telemetry
    sources = manifest(tmp_path / "first")["sources"]
    assert [(source["name"], source["revision"]) for source in sources] == [
        ("openai/gsm8k main train", old),
        (f"{SMOLTALK} train", talk),
    ]
    assert sources[0]["files"] == [{"name": GSM8K, "bytes": len(train), "sha256": sha256(train)}]
    assert [file["sha256"] for file in sources[1]["files"]] == [sha256(shard) for shard in shards]

    # the branch moves on: everything of this cache still comes from the commit first seen
    new = hub.push("openai/gsm8k", {**gsm8k, GSM8K: parquet(gsm8k_rows(100, 5))})
    assert new != old
    second = run(both, "second", hub.url)
    assert second.code == 0, second.stderr
    assert hub.take_requests() == []
    assert (tmp_path / "second/manifest.json").read_bytes() == (tmp_path / "first/manifest.json").read_bytes()

    # also files asked for only now; a pinned revision is another one
    pinned = f"task = 'gsm8k'\nrevision = '{new}'"
    third = run(recipe("task = 'gsm8k'\nsplit = 'test'", pinned), "third", hub.url)
    assert third.code == 0, third.stderr
    assert bodies(hub.take_requests()) == ["main/test-00000-of-00001.parquet", GSM8K]
    described = manifest(tmp_path / "third")
    assert [source["revision"] for source in described["sources"]] == [old, new]
    assert [entry["documents"] for entry in described["splits"]["train"]["entries"]] == [3, 5]

    offline = run(both, "offline", hub_server.closed_port(), "--dry-run", "--json", HF_HUB_OFFLINE="1")
    assert offline.code == 0, offline.stderr
    assert [entry["rows"] for entry in json.loads(offline.stdout)["splits"]["train"]] == [7, 5]


def test_reproduce_downloads_the_commit_that_the_build_used(
    hub: Any, run: Run, tmp_path: Path, chatdata: Callable[..., Any], bytecode: dict[str, str]
) -> None:
    hub.push("openai/gsm8k", {GSM8K: parquet(gsm8k_rows(0, 7))})
    assert run(recipe("task = 'gsm8k'"), "first", hub.url).code == 0
    hub.push("openai/gsm8k", {GSM8K: parquet(gsm8k_rows(100, 7))})
    caches = {"HF_HOME": str(tmp_path / "hf2"), "CHATDATA_CACHE": str(tmp_path / "cache2"), "NO_PROXY": "127.0.0.1"}
    env = os.environ | bytecode | caches | {"HF_ENDPOINT": hub.url}
    result = chatdata("reproduce", "first", "--out", "again", "--workers", "1", env=env, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "first: equal to the byte\n"), result.stderr


def test_what_the_hub_does_not_have(hub: Any, run: Run, tmp_path: Path) -> None:
    socratic = "socratic/train-00000-of-00001.parquet"
    gsm8k = hub.push("openai/gsm8k", dict.fromkeys([GSM8K, socratic], parquet(gsm8k_rows(0, 3))))
    arc = hub.push("allenai/ai2_arc", {"README.md": b"card"})
    talk = hub.push(SMOLTALK, {"data/train-00000-of-00002.parquet": parquet(smoltalk_rows("one"))})
    hidden = f"/datasets/openai/gsm8k/resolve/{gsm8k}/{socratic}"
    hub.hidden.add(hidden)

    unknown = "task = 'gsm8k'\nrevision = 'v9'"
    assert run(recipe(unknown), "out", hub.url).error == (
        'gsm8k main train: openai/gsm8k has no revision "v9" on the Hub'
    )
    wrong = [
        unknown,
        "task = 'arc'",
        "task = 'smoltalk'",
        "task = 'mmlu'\nsubset = 'auxiliary_train'",
        "task = 'conversations'\nrepo = 'a/b/c'",
        "task = 'gsm8k'\nsubset = 'socratic'",
    ]
    assert run(recipe("task = 'gsm8k'", *wrong), "out", hub.url).error == (
        "6 sources are missing: "
        '(1) gsm8k main train: openai/gsm8k has no revision "v9" on the Hub; '
        f"(2) arc ARC-Easy train: allenai/ai2_arc at {arc[:12]} has no file ARC-Easy/train-*.parquet; "
        f"(3) smoltalk train: {SMOLTALK} at {talk[:12]} is incomplete: 1 of 2 files missing (number 00001); "
        "(4) mmlu auxiliary_train train: cais/mmlu is not a dataset on the Hub (or is private: `hf auth login`); "
        "(5) conversations train: Repo id must be in the form 'repo_name' or 'namespace/repo_name': 'a/b/c'. "
        "Use `repo_type` argument if needed.; "
        "(6) gsm8k socratic train: openai/gsm8k is not in the Hub's cache and the Hub refused it: 404 Client Error. "
        f"Entry Not Found for url: {hub.url}{hidden}.; {fetch_command('openai/gsm8k', 'socratic/train-*.parquet')}"
    )
    hub.down = True
    assert run(recipe("task = 'mmlu'\nsubset = 'auxiliary_train'"), "out", hub.url).error == (
        "mmlu auxiliary_train train: cais/mmlu is not in the Hub's cache and the Hub refused it: "
        f"Server error '503 Service Unavailable' for url '{hub.url}/api/datasets/cais/mmlu/revision/main'; "
        + fetch_command("cais/mmlu", "auxiliary_train/train-*.parquet")
    )
    assert not (tmp_path / "out").exists()


# --- broken connections ---------------------------------------------------------------------------------------------


def test_connection_cut_half_way(hub: Any, run: Run, tmp_path: Path) -> None:
    content = parquet(gsm8k_rows(0, 40))
    commit = hub.push("openai/gsm8k", {GSM8K: content})
    path = f"/datasets/openai/gsm8k/resolve/{commit}/{GSM8K}"
    (tmp_path / "out").mkdir()

    hub.cuts[path] = hub_server.ALWAYS
    cut = run(recipe("task = 'gsm8k'"), "out", hub.url)
    before, after = (
        f"gsm8k main train: openai/gsm8k is not in the Hub's cache and cannot be downloaded from {hub.url}: ",
        fetch_command("openai/gsm8k", "main/train-*.parquet"),
    )
    assert cut.error.startswith(before)
    assert cut.error.endswith(f"; {after}")
    assert f"received {len(content) // 2} bytes, expected {len(content)}" in cut.error
    assert cut.seconds < 25
    assert list((tmp_path / "out").iterdir()) == []
    assert not list(tmp_path.glob(".out*"))
    assert not [
        file for file in stored_files(tmp_path / "hf") if file.suffix == ".parquet"
    ]  # no truncated file is kept

    hub.cuts[path] = 1
    once = run(recipe("task = 'gsm8k'"), "out", hub.url)
    assert once.code == 0, once.stderr
    assert once.stderr.splitlines()[0] == "openai/gsm8k main train: 40 of 40 rows"
    assert hub.cuts[path] == 0
    assert manifest(tmp_path / "out")["sources"][0]["files"][0]["sha256"] == sha256(content)


def test_no_network(run: Run, tmp_path: Path) -> None:
    entries = ("task = 'gsm8k'\nrevision = 'v1'", "task = 'smoltalk'", "task = 'conversations'\nrepo = 'me/chats'")
    one, closed = recipe("task = 'gsm8k'"), hub_server.closed_port()
    closed_run = run(one, "out", closed)
    assert closed_run.error == (
        f"gsm8k main train: openai/gsm8k is not in the Hub's cache and cannot be downloaded from {closed}: {REFUSED}; "
        "hf download openai/gsm8k --repo-type dataset --include 'main/train-*.parquet' --local-dir DIR/openai/gsm8k, "
        "then --data-dir DIR"
    )
    offline = run(recipe(*entries), "out", closed, HF_HUB_OFFLINE="1")
    gone = "is not in the Hub's cache and HF_HUB_OFFLINE is set"
    assert offline.error == (
        "3 sources are missing: "
        f"(1) gsm8k main train: openai/gsm8k {gone}; hf download openai/gsm8k --repo-type dataset --revision v1 "
        "--include 'main/train-*.parquet' --local-dir DIR/openai/gsm8k, then --data-dir DIR; "
        f"(2) smoltalk train: {SMOLTALK} {gone}; {fetch_command(SMOLTALK, 'data/train-*.parquet')}; "
        f"(3) conversations train: me/chats {gone}; {fetch_command('me/chats')}"
    )
    with hub_server.SilentServer() as silent:
        swallowed = run(recipe(*entries), "out", silent.url, HF_HUB_ETAG_TIMEOUT="1")
        assert swallowed.error.count(f"is not in the Hub's cache and cannot be downloaded from {silent.url}: ") == 3
        assert len(silent.connections) == 1  # one timeout, not one for each source
    assert max(closed_run.seconds, offline.seconds, swallowed.seconds) < 15
    assert not (tmp_path / "out").exists()


def test_the_printed_command_fetches_what_data_dir_needs(hub: Any, run: Run, tmp_path: Path) -> None:
    hub.push("openai/gsm8k", {GSM8K: parquet(gsm8k_rows(0, 4)), "main/test-00000-of-00001.parquet": b"not asked for"})
    closed, data_dir = hub_server.closed_port(), tmp_path / "clones"
    data_dir.mkdir()
    error = run(recipe("task = 'gsm8k'"), "out", closed, "--data-dir", str(data_dir)).error
    looked = f"no main/train-*.parquet in {data_dir / 'openai/gsm8k'}; openai/gsm8k is not in the Hub's cache"
    assert error.startswith(
        f"gsm8k main train: {looked} and cannot be downloaded from {closed}: {REFUSED}; hf download"
    )
    command = re.search(r"; (hf download .*), then --data-dir DIR$", error)[1].replace("DIR", str(data_dir))
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "elsewhere")}
    scripts = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([scripts, environment["PATH"]])
    subprocess.run(command, shell=True, check=True, env=environment, capture_output=True, timeout=60)
    built = run(recipe("task = 'gsm8k'"), "out", closed, "--data-dir", str(data_dir), "--dry-run", "--json")
    assert built.code == 0, built.stderr
    assert json.loads(built.stdout)["splits"]["train"][0]["rows"] == 4


def test_data_dir_with_gaps_or_leftovers_is_refused(tmp_path: Path) -> None:
    tasks, clone = load_tasks(), tmp_path / SMOLTALK
    (clone / "data").mkdir(parents=True)
    rows = parquet(smoltalk_rows("one"))
    talk = Entry("smoltalk", "train", "")
    (clone / "data/train-00001-of-00003.parquet").write_bytes(rows)
    with pytest.raises(MissingSource) as gaps:
        resolve(talk, tasks["smoltalk"], Locations(tmp_path, data_dir=tmp_path))
    assert str(gaps.value) == (
        f"smoltalk train: {clone} is incomplete: 2 of 3 files missing (number 00000, 00002); "
        + fetch_command(SMOLTALK, "data/train-*.parquet")
    )
    (clone / "data/train-00000-of-00001.parquet").write_bytes(rows)
    with pytest.raises(MissingSource) as mixed:
        resolve(talk, tasks["smoltalk"], Locations(tmp_path, data_dir=tmp_path))
    assert str(mixed.value) == (
        f"smoltalk train: {clone} mixes files of different versions (-of-00001 and -of-00003): "
        "train-00000-of-00001.parquet, …, train-00001-of-00003.parquet"
    )
    (clone / "data/train-00001-of-00003.parquet").rename(clone / "data/train-00000-of-00001-0a1b2c.parquet")
    with pytest.raises(MissingSource, match=r"mixes files of different versions \(-of-00001\)"):
        resolve(talk, tasks["smoltalk"], Locations(tmp_path, data_dir=tmp_path))
    (clone / "data/train-00000-of-00001-0a1b2c.parquet").unlink()
    assert resolve(talk, tasks["smoltalk"], Locations(tmp_path, data_dir=tmp_path)).num_rows == 1


# --- any chat dataset, through `datasets` ---------------------------------------------------------------------------

CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: chats/part-*
---
"""


def test_chat_datasets_through_datasets(hub: Any, run: Run, tmp_path: Path) -> None:
    shards = [parquet(smoltalk_rows("one two")), parquet(smoltalk_rows("three"))]
    parts = {f"chats/part-{i:05d}-of-00002.parquet": shard for i, shard in enumerate(shards)}
    chats = hub.push("me/chats", {"README.md": CARD, **parts})
    # strings that look like JSON beside parts: `datasets` would read the first as a number, the second without quotes
    tool = [{"type": "text", "text": "2+3="}, {"type": "python", "text": "2+3"}, {"type": "python_output", "text": "5"}]
    answers = ["0", '"quoted"', "null", tool]
    turns = [[{"from": "human", "value": "Say it."}, {"from": "gpt", "value": answer}] for answer in answers]
    lines = "".join(json.dumps({"conversations": turn}) + "\n" for turn in turns).encode()
    sharegpt = hub.push("me/sharegpt", {"train.jsonl": lines})
    rows = [{"at": "once", **row} for row in smoltalk_rows("four five")]
    array = hub.push("me/array", {"train.json": json.dumps(rows).encode()})  # neither Parquet nor JSONL
    repos = ("me/chats", "me/sharegpt", "me/array")
    all_three = recipe(*(f"task = 'conversations'\nrepo = '{repo}'\nignore = ['at']" for repo in repos))

    first = run(all_three, "first", hub.url)
    assert first.code == 0, first.stderr
    assert progress_names(first.stderr) == [*(f"{repo} train" for repo in repos), "all sources", "write train"]
    assert bodies(hub.take_requests()) == ["README.md", *parts, "train.json", "train.jsonl"]
    described = manifest(tmp_path / "first")
    assert described["sources"] == [
        {
            "name": "me/chats train",
            "revision": chats,
            "files": [{"name": n, "bytes": len(c), "sha256": sha256(c)} for n, c in parts.items()],
        },
        {
            "name": "me/sharegpt train",
            "revision": sharegpt,
            "files": [{"name": "train.jsonl", "bytes": len(lines), "sha256": sha256(lines)}],
        },
        {
            "name": "me/array train",
            "revision": array,
            "files": [],
            "rows_sha256": sha256("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()),
        },
    ]
    spoken = [re.findall(r"_start\|>([^<]+)", document.text()) for document in open_build(tmp_path / "first")["train"]]
    assert sorted(spoken) == sorted(
        [
            *([f"Say {word}.", word] for word in ("one", "two", "three", "four", "five")),
            *(["Say it.", answer] for answer in answers[:3]),
            ["Say it.", "2+3=", "2+3", "5"],
        ]
    )

    # the second run asks for nothing, although the branch has moved
    hub.push("me/chats", {"README.md": CARD, "chats/part-00000-of-00001.parquet": shards[0]})
    second = run(all_three, "second", hub.url)
    assert second.code == 0, second.stderr
    assert hub.take_requests() == []
    assert (tmp_path / "second/manifest.json").read_bytes() == (tmp_path / "first/manifest.json").read_bytes()

    clone = tmp_path / "clones/me/sharegpt"
    clone.mkdir(parents=True)
    (clone / "train.jsonl").write_bytes(lines * 2)
    one, options = recipe("task = 'conversations'\nrepo = 'me/sharegpt'"), ("--dry-run", "--json")
    local = run(one, "out", hub_server.closed_port(), "--data-dir", str(tmp_path / "clones"), *options)
    assert local.code == 0, local.stderr
    assert json.loads(local.stdout)["splits"]["train"][0]["rows"] == 8


def test_chat_datasets_that_cannot_be_read(hub: Any, run: Run, tmp_path: Path) -> None:
    row = {"messages": chat("one")}
    hub.push("me/one", {"README.md": b"a card without metadata", "train.jsonl": json.dumps(row).encode()})
    hub.push("me/broken", {"train.json": b'[{"messages": 1}'})
    gap = hub.push("me/gap", {"README.md": CARD, "chats/part-00001-of-00002.parquet": parquet([row])})
    mixed = [row, {"messages": [row["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}]
    hub.push("me/mixed", {"train.json": json.dumps(mixed).encode()})

    def error_of(repo: str, more: str = "") -> str:
        return run(recipe(f"task = 'conversations'\nrepo = '{repo}'\n{more}"), "out", hub.url).error

    assert error_of("me/gap") == (
        f"conversations train: me/gap at {gap[:12]}: chats/part is incomplete: 1 of 2 files missing (number 00000)"
    )
    assert error_of("me/one", "split = 'nope'") == (
        "conversations nope: me/one: `datasets` cannot load it: Unknown split \"nope\". Should be one of ['train']."
    )
    broken = error_of("me/broken")
    assert broken.startswith("conversations train: me/broken: `datasets` cannot load it: ")
    assert "An error occurred while generating the dataset" not in broken  # but what the error was
    assert error_of("me/mixed") == (
        "conversations train: me/mixed: rows differ in keys or types, which `datasets` does not keep exactly; "
        "convert it to JSONL"
    )
    assert not (tmp_path / "out").exists()


def write_card(folder: Path, data_files: str) -> None:
    (folder / "README.md").write_bytes(CARD.replace(b"chats/part-*", json.dumps(data_files).encode()))


OUTSIDE = r"is outside of the dataset's folder; nothing there is read$"


def test_a_card_reaches_no_file_outside_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = json.dumps(chat("secret")) + "\n"
    (tmp_path / "private").mkdir()
    (tmp_path / "private/s.jsonl").write_text(lines)
    clone = tmp_path / "hub/ev/il"
    (clone / "data").mkdir(parents=True)
    (clone / "data/mine.jsonl").write_text(lines)
    (clone / "data/.mine.jsonl").write_text(lines)
    (clone / "data/link.jsonl").symlink_to(tmp_path / "private/s.jsonl")
    (clone / "inner.jsonl").symlink_to(clone / "data/mine.jsonl")
    reached = (
        "../../../private/s.jsonl",
        str(tmp_path / "private/s.jsonl"),
        "data/link.jsonl",
        "data/../../../*.jsonl",
    )
    addresses = ("https://127.0.0.1:1/s.jsonl", "hf://datasets/me/chats/s.jsonl", "file:///etc/*")
    for name in (*reached, *addresses):
        write_card(clone, name)
        with pytest.raises(SourceError, match=OUTSIDE):
            hub_module.load_split(clone, "", "train")
    for name in ("inner.jsonl", "data/../data/m*.jsonl", "data/.mine.jsonl"):
        write_card(clone, name)
        files, _ = hub_module.load_split(clone, "", "train")
        assert [file.relative_to(clone).name for file in files] == [name.rpartition("/")[2].replace("*", "ine")]
    (clone / "data/link.jsonl").unlink()
    write_card(clone, "data/*.jsonl")
    assert [file.name for file in hub_module.load_split(clone, "", "train")[0]] == ["mine.jsonl"]  # no hidden one
    (clone / ".huggingface.yaml").write_text("configs:\n- config_name: default\n  data_files: &a [*a, ../s.jsonl]\n")
    with pytest.raises(SourceError, match=OUTSIDE):
        hub_module.load_split(clone, "", "train")


def test_links_into_the_hubs_own_cache_are_read(tmp_path: Path) -> None:
    repo = tmp_path / "datasets--me--chats"
    snapshot = repo / "snapshots/0123"
    for folder in (snapshot, repo / "blobs", tmp_path / "blobs/ab"):
        folder.mkdir(parents=True)
    for blob in (repo / "blobs/one", tmp_path / "blobs/ab/two"):  # of this dataset, and shared by all
        blob.write_text(json.dumps(chat("one")) + "\n")
    (snapshot / "one.jsonl").symlink_to("../../blobs/one")
    (snapshot / "two.jsonl").symlink_to("../../../blobs/ab/two")
    write_card(snapshot, "*.jsonl")
    assert hub_module.load_split(snapshot, "", "train") == ([snapshot / "one.jsonl", snapshot / "two.jsonl"], None)
    (tmp_path / "three.jsonl").write_text("[]\n")
    (snapshot / "three.jsonl").symlink_to("../../../three.jsonl")
    with pytest.raises(SourceError, match=f"^three.jsonl {OUTSIDE}"):
        hub_module.load_split(snapshot, "", "train")


# --- word list by URL -----------------------------------------------------------------------------------------------

PASS = "pass --words FILE or set words in the recipe"


def test_word_list_by_url(hub: Any, run: Run, tmp_path: Path) -> None:
    words = b"apple\r\nbanana\r\ncherry\r\n"
    hub.files["lists/words.txt"] = words
    url = f"{hub.url}/files/lists/words.txt?raw=1"
    two = [f"task = '{task}'\nrows = 4\nwords = '{url}'" for task in ("simple_spelling", "spelling_bee")]

    first = run(recipe(*two), "first", hub.url)
    assert first.code == 0, first.stderr
    assert hub.take_requests() == [("GET", "/files/lists/words.txt")]
    sources = manifest(tmp_path / "first")["sources"]
    recorded = {"name": "words.txt", "bytes": len(words), "sha256": sha256(words)}
    assert [source["files"][0] for source in sources] == [recorded, recorded]
    hub.files["lists/words.txt"] = b"plum\n"  # cached is cached
    pinned = f"{two[0]}\nwords_sha256 = '{sha256(words)}'"
    second = run(recipe(pinned), "second", hub.url, "--dry-run", "--json")
    assert second.code == 0, second.stderr
    assert hub.take_requests() == []
    (stored,) = stored_files(tmp_path / "cache")
    assert run(recipe(f"{two[0]}\nwords_sha256 = '{sha256(b'plum')}'"), "out", hub.url).error == (
        f"simple_spelling train: words.txt has SHA-256 {sha256(words)}, "
        f"but the recipe pins words_sha256 = {sha256(b'plum')}; to download it again delete {stored}"
    )


def test_word_list_that_does_not_arrive(hub: Any, run: Run, tmp_path: Path) -> None:
    words = b"apple\nbanana\n" * 1000
    hub.files |= {"cut.txt": words, "whole.txt": words}
    hub.cuts["/files/cut.txt"] = 1
    names = ("cut", "absent", "cut")
    entries = [
        f"task = 'simple_spelling'\nrows = {i}\nwords = '{hub.url}/files/{n}.txt'" for i, n in enumerate(names, 1)
    ]
    assert run(recipe(*entries[:2]), "out", hub.url).error == (
        "2 sources are missing: "
        f"(1) cannot download {hub.url}/files/cut.txt: peer closed connection without sending complete message body "
        f"(received 6500 bytes, expected 13000); {PASS}; "
        f"(2) cannot download {hub.url}/files/absent.txt: Client error '404 Not Found' "
        f"for url '{hub.url}/files/absent.txt'; {PASS}"
    )
    assert stored_files(tmp_path / "cache") == []
    hub.chunked = True  # no Content-Length to compare with
    hub.cuts["/files/cut.txt"] = 1
    error = run(recipe(entries[0]), "out", hub.url).error
    assert error.startswith(f"cannot download {hub.url}/files/cut.txt: peer closed connection without sending")
    assert error.endswith(f"; {PASS}")
    assert stored_files(tmp_path / "cache") == []
    again = run(recipe(entries[0]), "out", hub.url, "--dry-run")
    assert again.code == 0, again.stderr
    (stored,) = stored_files(tmp_path / "cache")
    assert stored.read_bytes() == words
    closed = hub_server.closed_port()
    refused = run(recipe("task = 'simple_spelling'\nrows = 1"), "out", closed, "--words", f"{closed}/words.txt").error
    assert refused == f"cannot download {closed}/words.txt: {REFUSED}; {PASS}"


def test_resharded_clones_are_refused() -> None:
    for names, message in [
        (
            ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            "mixes files",
        ),
        (["train-00000-of-00001.parquet", "train-backup.parquet"], "has train-backup.parquet next to numbered files"),
        (["train-00001-of-00002.parquet"], "is incomplete: 1 of 2 files missing"),
    ]:
        with pytest.raises(SourceError, match=message):
            check_complete([Path(name) for name in names], "here")
    check_complete([Path("train-00000-of-00001.parquet")], "here")
    check_complete([Path("a.parquet"), Path("b.parquet")], "here")


@pytest.mark.parametrize(
    "address",
    ["file:///etc/passwd", "http://example.org/w.txt", "ftp://example.org/w", "https://", "https://[x/w", "http://127.1/w"],
)  # fmt: skip
def test_word_lists_come_from_files_and_https(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("a request"))
    with pytest.raises(SourceError, match=r": neither a file nor an https address; give a file$"):
        hub_module.fetch_url(address, "give a file")


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "download", lambda *_, **k: None if k else pytest.fail("a download"))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("a request"))
    with hub_module.nothing_fetched(), pytest.raises(MissingSource):
        hub_module.fetch_url("http://localhost/words.txt", "give a file")
