from __future__ import annotations

import hashlib
import json
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import pytest

import chatdata as library
from chatdata.build.run import build
from chatdata.errors import UsageError
from chatdata.tasks.words import is_test_word
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer

ROOT = Path(__file__).parents[3]


def sha256_of_all(split: library.Split, kind: str) -> str:
    return hashlib.sha256(getattr(split, kind)(0, split.num_tokens).tobytes()).hexdigest()


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_golden_streams(shared: Path, stage: str, request: pytest.FixtureRequest) -> None:
    golden = json.loads((shared / "golden" / "streams.json").read_text())[stage]
    build = library.open_build(request.getfixturevalue(f"golden_{stage}"))
    train = build["train"]
    assert len(train) == golden["documents"]
    assert train.num_tokens == golden["tokens"]
    assert build.manifest["splits"]["train"]["supervised"] == golden["supervised"]
    assert sha256_of_all(train, "tokens") == golden["tokens_u16le_sha256"]
    assert sha256_of_all(train, "mask") == golden["mask_u8_sha256"]
    entries = build.manifest["splits"]["train"]["entries"]
    lengths = golden["task_lengths"]
    assert [entry["rows"] for entry in entries] == list(lengths.values() if stage == "mid" else lengths)
    assert train.index["truncated"].sum() == {"mid": 150, "sft": 56}[stage]
    if stage == "mid":
        first = train.index.head(12).select("task", "entry", "task_position").rows()
        assert [list(row) for row in first] == golden["first_order"]


@pytest.mark.parametrize("encoder", ["tiktoken", "fastokens", "gigatoken"])
@pytest.mark.parametrize("recipe", ["golden_mid", "golden_sft"])
def test_every_encoder_gives_the_golden_streams(
    build_recipe: Callable, tmp_path: Path, recipe: str, encoder: str, request: pytest.FixtureRequest
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
        out = build_recipe(recipe, tmp_path / "out", "--encoder", encoder)
    report = json.loads((out / "report.json").read_text())
    assert (report["encoder"]["name"], report["units"]["cached"]) == (encoder, 0)
    assert (report["encoder"]["texts_checked"] > 400) == (encoder != "tiktoken")
    assert (out / "manifest.json").read_bytes() == (request.getfixturevalue(recipe) / "manifest.json").read_bytes()


def files_of(build: Path) -> dict[str, str]:
    paths = (path for path in build.rglob("*") if path.is_file() and path.name != "report.json")
    return {str(path.relative_to(build)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_same_bytes_anywhere(tmp_path: Path, chatdata: Callable) -> None:
    """Another folder, time zone, locale, hash seed and an empty cache give the same shards and manifest."""
    builds = []
    for i, zone in enumerate(("UTC", "Asia/Kathmandu")):
        folder = tmp_path / f"at{i}" / ("deeper" * i)
        folder.mkdir(parents=True)
        names = {"TZ": zone, "PYTHONHASHSEED": str(i), "LC_ALL": ("C", "C.UTF-8")[i]}
        environment = {**os.environ, **names, "HOME": str(folder), "CHATDATA_CACHE": str(folder / "cache")}
        result = chatdata("build", "--stage", "sft", "--demo", "--out", f"out{i}", cwd=folder, env=environment)
        assert result.returncode == 0, result.stderr
        builds.append(files_of(folder / f"out{i}"))
    assert builds[0] == builds[1]
    assert sorted(builds[0]) == sorted(
        [
            "firewall.json",
            "manifest.json",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/chat_template.jinja",
        ]
        + [f"{split}/{name}" for split in ("train", "val") for name in SHARD_FILES]
    )
    manifest = (tmp_path / "at0" / "out0" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest and "/texts" not in manifest


SHARD_FILES = ("tokens-00000.npy", "mask-00000.npy", "offsets-00000.npy", "index-00000.parquet")


def test_full_shared_mixture(shared: Path, tmp_path: Path, chatdata: Callable) -> None:
    """Our mid recipe on the shared data, 20,000 + 8,000 spelling rows: everything is in the manifest's ledger."""
    data = shared / "data"
    arguments = ["--tokenizer", data / "tokenizer" / "tokenizer.pkl", "--words", data / "words_alpha.txt"]
    arguments += ["--data-dir", data / "hub", "--identity", data / "identity_conversations.jsonl"]
    recipe = ROOT / "tests" / "chatdata" / "recipes" / "shared_mid.toml"
    result = chatdata("build", "--stage", "mid", "--recipe", recipe, *arguments, "--out", tmp_path / "mid", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    build = library.open_build(tmp_path / "mid")
    assert printed["build_id"] == build.manifest["build_id"]
    train = build["train"]
    assert len(train) == 25_481 + 9_533 + 7_053 + 2 * 996 + 20_000 + 8_000 == 72_059
    assert len(build["val"]) == 1_323 + 1_531 + 420
    for task, pattern in (("simple_spelling", "Spell the word: "), ("spelling_bee", "<|assistant_start|>")):
        documents = np.flatnonzero(train.index["task"].cast(str).to_numpy() == task).tolist()
        assert len(documents) == {"simple_spelling": 20_000, "spelling_bee": 8_000}[task]
        words = {train[i].text().split(pattern)[1].split("<|" if "Spell" in pattern else ":")[0] for i in documents}
        assert len(words) > 5_000 and not any(map(is_test_word, words))
    gsm8k = [split.index.filter(split.index["task"] == "gsm8k") for split in (train, build["val"])]
    assert not set(gsm8k[0]["row"]) & set(gsm8k[1]["row"])
    assert sorted(gsm8k[1]["task_position"].to_list()) == list(range(7_053, 7_473))


def write_recipe(tmp_path: Path, text: str, lines: list[object] | None = None) -> Path:
    if lines is not None:
        (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "r.toml").write_text(text)
    return tmp_path / "r.toml"


def chat(user: str, assistant: object) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


CHATS = [chat("a" * n, "b" * n) for n in (1, 5, 9, 20)]  # 2n + 5 tokens: 7, 15, 23, 45
HEAD = 'stage = "sft"\nshuffle = {train = false}\n'
ENTRY = '[[train]]\ntask = "conversations"\npath = "c.jsonl"\n'


@pytest.mark.parametrize(
    ("policy", "lengths", "ledger"),
    [
        ('overflow = "keep"\n', [7, 15, 23, 45], (0, 0, {"overflow": 0, "zero_supervised": 0, "invalid": 0})),
        (
            'max_tokens = 20\noverflow = "truncate"\n',
            [7, 15, 20, 20],
            (2, 28, {"overflow": 0, "zero_supervised": 0, "invalid": 0}),
        ),
        ('max_tokens = 20\noverflow = "drop"\n', [7, 15], (0, 0, {"overflow": 2, "zero_supervised": 0, "invalid": 0})),
        (
            'max_tokens = 12\noverflow = "truncate"\nzero_supervised = "drop"\n',
            [7, 12],
            (1, 3, {"overflow": 0, "zero_supervised": 2, "invalid": 0}),
        ),
    ],
)
def test_policies(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable, policy: str, lengths: list[int], ledger: tuple
) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    recipe = write_recipe(tmp_path, HEAD + policy + ENTRY, CHATS)
    arguments = ("--recipe", recipe, "--tokenizer", tmp_path / "t", "--out", tmp_path / "out")
    assert chatdata("build", *arguments).returncode == 0
    build = library.open_build(tmp_path / "out")
    assert [len(document) for document in build["train"]] == lengths
    index = build["train"].index
    assert index["original_tokens"].to_list() == [7, 15, 23, 45][: len(lengths)]
    assert index["truncated"].to_list() == [a < b for a, b in zip(lengths, (7, 15, 23, 45), strict=False)]
    entry = build.manifest["splits"]["train"]["entries"][0]
    assert (entry["truncated"], entry["tokens_lost"], entry["dropped"]) == ledger
    assert (entry["rows"], entry["documents"]) == (4, len(lengths))
    for spans, length in zip(index["spans"].to_list(), lengths, strict=True):
        assert all(span["length"] > 0 and span["start"] + span["length"] <= length for span in spans)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            'max_tokens = 20\noverflow = "error"\n',
            'c.jsonl line 3: 23 tokens, over max_tokens = 20 (overflow = "error")',
        ),
        ('zero_supervised = "error"\n', 'c.jsonl line 5: no supervised token is left (zero_supervised = "error")'),
    ],
)
def test_policy_errors(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable, policy: str, message: str
) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    recipe = write_recipe(tmp_path, HEAD + policy + ENTRY, [*CHATS, CHATS[0][:1]])
    result = chatdata("build", "--recipe", recipe, "--tokenizer", tmp_path / "t", "--out", tmp_path / "out")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, f"Error: {message}")
    assert not (tmp_path / "out").exists()


def test_dropping_everything_is_an_error(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    recipe = write_recipe(tmp_path, HEAD + 'max_tokens = 2\noverflow = "drop"\n' + ENTRY, CHATS)
    result = chatdata("build", "--recipe", recipe, "--tokenizer", tmp_path / "t", "--out", tmp_path / "out")
    assert result.stderr.endswith("Error: train: the recipe's policies drop all 4 documents; nothing to write\n")


def test_a_wide_tokenizer_gets_uint32_shards(tmp_path: Path, chatdata: Callable) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {i.to_bytes(3, "big"): 256 + i for i in range(65_527 - 256)} | {b"ab": 65_527}
    wide = tmp_path / "wide.tiktoken"
    from base64 import b64encode

    wide.write_bytes(b"".join(b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    (tmp_path / "wide.pattern").write_text(r"\S+|\s+")
    recipe = write_recipe(tmp_path, HEAD + ENTRY, [chat("ab", "ba")])
    result = chatdata("build", "--recipe", recipe, "--tokenizer", wide, "--out", tmp_path / "out")
    assert "shards uint32 (over 65,536 tokens)" in result.stdout
    build = library.open_build(tmp_path / "out")
    assert build.manifest["dtype"] == "<u4" and build["train"][0].tokens.dtype == np.dtype("<u4")
    bos = 65_528
    assert build["train"][0].tokens.tolist() == [bos, bos + 1, 65_527, bos + 2, bos + 3, 98, 97, bos + 4]
    assert build["train"][0].text().count("ab") == 1


def test_base_stage(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.txt").write_text("three")
    recipe = write_recipe(
        tmp_path, 'stage = "base"\nshuffle = {train = false}\n[[train]]\ntask = "text"\npath = "*.txt"\n'
    )
    result = chatdata(
        "build", "--stage", "base", "--recipe", recipe, "--tokenizer", tmp_path / "t", "--out", tmp_path / "o"
    )
    assert result.returncode == 0, result.stderr
    train = library.open_build(tmp_path / "o")["train"]
    assert [document.text() for document in train] == ["<|bos|>one\ntwo", "<|bos|>three"]
    assert [document.mask.tolist() for document in train] == [[0] + [1] * 7, [0] + [1] * 5]


def test_limit_epochs_and_a_task_of_ones_own(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    (tmp_path / "mine.py").write_text(
        "from chatdata.tasks import Task\n"
        "TASK = Task('mine', 'counts', 'MIT', lambda row: [{'role': 'user', 'content': str(row)}],\n"
        "            generate=lambda split, options: lambda position: position, splits={'': {'train': 0}})\n"
    )
    recipe = write_recipe(tmp_path, HEAD + '[[train]]\ntask = "mine"\nrows = 9\nstart = 5\nepochs = 2\n')
    arguments = ("--recipe", recipe, "--tokenizer", tmp_path / "t", "--task-file", tmp_path / "mine.py", "--limit", 3)
    result = chatdata("build", *arguments, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    build = library.open_build(tmp_path / "out")
    assert build["train"].index.select("entry", "task_position", "row").rows() == [
        (entry, position, position) for entry in (0, 1) for position in (5, 6, 7)
    ]
    assert (
        build.manifest["sources"][0]["task_code_sha256"]
        == hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()
    )


def test_no_torch_is_imported(tmp_path: Path, chatdata: Callable) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom chatdata.cli import main\ntry:\n    main()\nfinally:\n"
        "    print('heavy:', sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))\n"
    )
    import subprocess

    command = [sys.executable, script, "build", "--stage", "mid", "--demo", "--limit", "50", "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("heavy: []\n")


def test_chatdata_does_not_depend_on_torch() -> None:
    """`uv run --package chatdata` installs what this closure of uv.lock names."""
    packages = {p["name"]: p for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    todo, found = ["chatdata"], set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [dependency["name"] for dependency in packages[name].get("dependencies", [])]
    assert {"chatdata", "tiktoken", "polars", "datasets"} <= found
    assert not {name for name in found if name == "torch" or name.startswith("nvidia-") or name == "transformers"}


def test_dry_run_and_json(tmp_path: Path, chatdata: Callable) -> None:
    out = tmp_path / "out"
    result = chatdata("build", "--stage", "mid", "--demo", "--out", out, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert (plan["recipe"], plan["stage"], result.stderr) == ("demo-mid", "mid", "")
    (math,) = [entry for entry in plan["splits"]["train"] if entry["entry"] == "demo_math train"]
    tokens = math.pop("tokens")
    assert math == {"entry": "demo_math train", "source": "demo_math train", "rows": 4200}
    assert tokens < plan["about"]["tokens"]
    assert not out.exists()


def test_demo_texts_are_well_formed(demo_mid: Path, chatdata: Callable) -> None:
    stats = json.loads(chatdata("stats", demo_mid, "--json").stdout)
    assert {row["task"] for row in stats["splits"]["train"]} == {
        "conversations",
        "identity",
        "demo_math",
        "demo_choice",
        "simple_spelling",
        "spelling_bee",
    }
    build = library.open_build(demo_mid)
    assert build.tokenizer.vocab_size == 400
    for name, split in build.splits.items():
        rows = stats["splits"][name]
        assert sum(row["documents"] for row in rows) == len(split)
        assert sum(row["tokens"] for row in rows) == split.num_tokens
        assert sum(row["supervised"] for row in rows) == np.count_nonzero(split.mask(0, split.num_tokens))


def test_the_demo_tokenizer_is_the_same_for_every_stage_and_limit(
    demo_mid: Path, tmp_path: Path, chatdata: Callable
) -> None:
    assert chatdata("build", "--stage", "sft", "--demo", "--limit", 5, "--out", tmp_path / "sft").returncode == 0
    name = "tokenizer/tokenizer.json"
    assert (tmp_path / "sft" / name).read_bytes() == (demo_mid / name).read_bytes()


def test_the_command_line_offers_what_the_library_takes() -> None:
    from chatdata import cli
    from chatdata.build import engines as engine
    from chatdata.firewall import listing as firewall
    from chatdata.tokenizer import encoders

    offered = {
        p.name: tuple(p.type.choices) for p in cli.cli.commands["build"].params if isinstance(p.type, click.Choice)
    }
    assert offered["engine"] == engine.ENGINES
    assert offered["encoder"] == ("auto", *encoders.ENCODERS)
    assert offered["decontaminate"] == firewall.CHOICES


@pytest.mark.parametrize("option", [{"engine": "rya"}, {"decontaminate": "dorp"}])
def test_an_unknown_word_as_option_is_refused(option: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'rya': give one of local, ray|'dorp': give one of report, drop, off"):
        build(cast(Any, None), tmp_path / "out", **cast(Any, option))
    assert not list(tmp_path.iterdir())
