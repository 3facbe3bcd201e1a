"""`chatdata build` and the commands next to it: an error is one line with the right exit code, and writes nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer
from chatdata.tokenizer.files import save_tokenizer

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CONVERSATIONS = 'stage = "mid"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n'
ALTERNATE = "after an optional system message roles alternate user, assistant, starting with user"


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def message(**changes: object) -> list[dict]:
    return [HI[0], {**HI[1], **changes}]


# name, files to write, recipe (or None), further arguments, exit code, the error line ({tmp} is the test's folder)
BAD_INPUTS = [
    (
        "missing identity file",
        {},
        'stage = "mid"\n[[train]]\ntask = "identity"\n',
        ["--identity", "{tmp}/me.jsonl"],
        1,
        "identity train: {tmp}/me.jsonl: no such file; `chatdata identity PERSONA --out FILE` makes one",
    ),
    (
        "no identity given",
        {},
        'stage = "mid"\n[[train]]\ntask = "identity"\n',
        [],
        1,
        "identity train: no file given: pass --identity FILE (JSONL or Parquet, a conversation per line; "
        "`chatdata identity PERSONA --out FILE` makes one)",
    ),
    (
        "several missing sources",
        {},
        CONVERSATIONS
        + '[[train]]\ntask = "identity"\n[[train]]\ntask = "simple_spelling"\nrows = 2\nwords = "w.txt"\n',
        [],
        1,
        "3 sources are missing: (1) conversations train: {tmp}/c.jsonl: no such file; (2) identity train: no file "
        "given: pass --identity FILE (JSONL or Parquet, a conversation per line; `chatdata identity PERSONA --out "
        "FILE` makes one); (3) simple_spelling train: "
        "{tmp}/w.txt: no such file; pass --words FILE or set words in the recipe",
    ),
    ("empty source", {"c.jsonl": "\n"}, CONVERSATIONS, [], 1, "conversations train: c.jsonl has no rows"),
    (
        "broken JSON line",
        {"c.jsonl": lines(HI) + "\n" + '[{"role": "user"\n'},
        CONVERSATIONS,
        [],
        1,
        "c.jsonl line 3: not valid JSON at column 1: Expecting ',' delimiter",
    ),
    (
        "not UTF-8",
        {"c.jsonl": b'["\xff"]\n'},
        CONVERSATIONS,
        [],
        1,
        "c.jsonl line 1: not UTF-8 at byte 2; save it as UTF-8",
    ),
    (
        "UTF-16",
        {"c.jsonl": "[]\n".encode("utf-16")},
        CONVERSATIONS,
        [],
        1,
        "c.jsonl line 1: not UTF-8 at byte 0; save it as UTF-8",
    ),
    (
        "one bracket too few",
        {},
        'stage = "mid"\n[train]\ntask = "gsm8k"\n',
        [],
        1,
        '{tmp}/r.toml, key "train": must be one or more [[train]] entries, not {"task": "gsm8k"}',
    ),
    (
        "roles out of order",
        {"c.jsonl": lines(HI, [HI[0], HI[0]])},
        CONVERSATIONS,
        [],
        1,
        f'c.jsonl line 2: message 1, key "role": user where assistant must come; {ALTERNATE}; consecutive = "merge" in '
        "the recipe joins them",
    ),
    (
        "unknown role",
        {"c.jsonl": lines(message(role="robot"))},
        CONVERSATIONS,
        [],
        1,
        "c.jsonl line 1: message 1, key \"role\": unknown role 'robot'; valid: system, developer, user, "
        "assistant, tool, function",
    ),
    (
        "unknown part type",
        {"c.jsonl": lines(message(content=[{"type": "image", "text": ""}]))},
        CONVERSATIONS,
        [],
        1,
        "c.jsonl line 1: message 1, key \"content\", part 0: unknown part type 'image': only text is trained on",
    ),
    (
        "non-string content",
        {"c.jsonl": lines(message(content=5))},
        CONVERSATIONS,
        [],
        1,
        'c.jsonl line 1: message 1, key "content": must be a string or a list of parts, not a number',
    ),
    (
        "no messages",
        {"c.jsonl": lines({"prompt": "Hi"})},
        CONVERSATIONS,
        [],
        1,
        'c.jsonl line 1: no messages: expected the key "messages" (or ShareGPT\'s "conversations"), or "prompt" and '
        '"completion"; columns in the recipe takes other names',
    ),
    (
        "MMLU answer outside its choices",
        {"m.parquet": [{"question": "q", "subject": "", "choices": list("abcd"), "answer": i} for i in (0, 3, 4)]},
        'stage = "mid"\n[[train]]\ntask = "mmlu"\npath = "m.parquet"\n',
        [],
        1,
        'm.parquet row 2: key "answer": 4 is outside its choices 0 … 3',
    ),
    (
        "a row of another task",
        {"m.parquet": [{"text": "q"}]},
        'stage = "mid"\n[[train]]\ntask = "gsm8k"\npath = "m.parquet"\n',
        [],
        1,
        'm.parquet row 0: the row does not fit task "gsm8k": no key "question"',
    ),
    (
        "broken Parquet",
        {"m.parquet": "PAR1 nothing"},
        'stage = "mid"\n[[train]]\ntask = "mmlu"\npath = "m.parquet"\n',
        [],
        1,
        "mmlu train: m.parquet: not a readable Parquet file: Parquet magic bytes not found in footer. "
        "Either the file is corrupted or this is not a parquet file.",
    ),
    (
        "unknown recipe key",
        {},
        CONVERSATIONS + "epoch = 2\n",
        [],
        1,
        '{tmp}/r.toml, [[train]] entry 1: unknown key "epoch"; did you mean "epochs"?',
    ),
    (
        "unknown task",
        {},
        'stage = "mid"\n[[train]]\ntask = "smoltalks"\n',
        [],
        1,
        '{tmp}/r.toml, [[train]] entry 1, key "task": unknown task "smoltalks"; did you mean "smoltalk"?',
    ),
    (
        "tokenizer with missing specials",
        {"c.jsonl": lines(HI)},
        CONVERSATIONS,
        ["--tokenizer", "{tmp}/missing.json"],
        1,
        "{tmp}/missing.json: special tokens missing: <|output_start|>, <|output_end|>; all nine must be in the "
        "tokenizer: `chatdata tokenizer import --add-specials` appends them, --chat-format does without",
    ),
    (
        "pickle naming another class",
        {"c.jsonl": lines(HI), "bad.pkl": pickle.dumps(os.system)},
        CONVERSATIONS,
        ["--tokenizer", "{tmp}/bad.pkl"],
        1,
        "{tmp}/bad.pkl: names the class posix.system; only tiktoken.core.Encoding is admitted",
    ),
    (
        "id over the dtype",
        {"c.jsonl": lines(HI), "wide.tiktoken": "YQ== 4294967295\n", "wide.pattern": SPLIT_PATTERN},
        CONVERSATIONS,
        ["--tokenizer", "{tmp}/wide.tiktoken"],
        1,
        "{tmp}/wide.tiktoken: id 4294967304 does not fit; ids must be integers in 0 … 1,048,575",
    ),
    (
        "a tokenizer that is not there",
        {"c.jsonl": lines(HI)},
        CONVERSATIONS,
        ["--tokenizer", "{tmp}/nowhere"],
        1,
        "{tmp}/nowhere: no such tokenizer file or folder",
    ),
    (
        "an option that would do nothing",
        {"c.jsonl": lines(HI)},
        CONVERSATIONS,
        ["--identity", "{tmp}/c.jsonl"],
        2,
        '--identity is given, but the recipe "r" has no identity entry',
    ),
    (
        "another stage's recipe",
        {"c.jsonl": lines(HI)},
        CONVERSATIONS,
        ["--stage", "sft"],
        2,
        '--stage sft, but the recipe "r" is for stage mid',
    ),
    (
        "max tokens without a rule",
        {"c.jsonl": lines(HI)},
        CONVERSATIONS,
        ["--max-tokens", "9"],
        1,
        '{tmp}/r.toml: max_tokens = 9 does nothing with overflow = "keep"; choose truncate, drop or error',
    ),
    ("demo of base", {}, None, ["--stage", "base", "--demo"], 2, "--demo has the stages mid and sft, not base"),
    ("no stage", {}, None, [], 2, "give FILEs, --stage mid|sft|base, or --recipe NAME|FILE"),
    (
        "no tokenizer given",
        {"c.jsonl": lines(HI)},
        CONVERSATIONS,
        ["--tokenizer="],
        2,
        "no tokenizer given: pass --tokenizer with a tokenizer.json, nanochat's tokenizer.pkl, a .tiktoken file or a "
        "build; make one with `chatdata tokenizer train`; or use --demo, which trains its own",
    ),
]


def write_files(folder: Path, files: dict[str, object], tokenizer: Tokenizer) -> None:
    for name, content in files.items():
        if isinstance(content, list):
            pq.write_table(pa.Table.from_pylist(content), folder / name)
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(str(content))
    save_tokenizer(tokenizer, folder / "t")
    contents = json.loads((folder / "t" / "tokenizer.json").read_text())
    contents["added_tokens"] = contents["added_tokens"][:7]
    (folder / "missing.json").write_text(json.dumps(contents))


@pytest.mark.parametrize("name,files,recipe,arguments,code,error", BAD_INPUTS, ids=[row[0] for row in BAD_INPUTS])
def test_bad_input(
    tmp_path: Path,
    byte_tokenizer: Tokenizer,
    chatdata: Callable,
    name: str,
    files: dict,
    recipe: str | None,
    arguments: list[str],
    code: int,
    error: str,
) -> None:
    write_files(tmp_path, files, byte_tokenizer)
    command = ["build", "--out", str(tmp_path / "out")]
    if recipe is not None:
        (tmp_path / "r.toml").write_text(recipe)
        command += ["--recipe", str(tmp_path / "r.toml")]
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if arguments == ["--tokenizer="]:
        arguments = []
    elif "--tokenizer" not in arguments and "--demo" not in arguments:
        arguments += ["--tokenizer", str(tmp_path / "t")]
    before = sorted(os.listdir(tmp_path))
    result = chatdata(*command, *arguments)
    assert result.stderr.splitlines()[-1] == "Error: " + error.replace("{tmp}", str(tmp_path))
    assert result.stderr.count("Error") == 1 and "Traceback" not in result.stderr
    assert result.returncode == code
    assert sorted(os.listdir(tmp_path)) == before  # neither OUT nor a partial folder


def test_debug_shows_a_traceback(tmp_path: Path, chatdata: Callable) -> None:
    result = chatdata("build", "--recipe", "nope", "--debug", "--out", tmp_path / "out")
    assert "Traceback" in result.stderr and 'no recipe "nope"' in result.stderr and result.returncode == 1


def test_usage_errors_of_the_parser(chatdata: Callable) -> None:
    for arguments in (["build", "--stage", "midd"], ["bulid"], ["build", "--limit", "0"], ["stats"]):
        result = chatdata(*arguments)
        assert result.returncode == 2 and "Error: " in result.stderr and "Traceback" not in result.stderr


def test_help_answers_at_once(chatdata: Callable) -> None:
    for arguments in (
        [],
        ["build"],
        ["inspect"],
        ["stats"],
        ["verify"],
        ["tasks"],
        ["tokenizer"],
        ["tokenizer", "train"],
    ):
        started = time.monotonic()
        result = chatdata(*arguments, "--help")
        assert result.returncode == 0 and result.stdout.startswith("Usage: chatdata")
        assert "Example" in result.stdout or not arguments or arguments == ["tokenizer"]
        # DESIGN 12 says half a second; ten times that only guards against a heavy import on a busy machine
        assert time.monotonic() - started < 5


def test_tasks(chatdata: Callable) -> None:
    assert "openai/gsm8k" in chatdata("tasks").stdout
    listed = {task["task"]: task for task in json.loads(chatdata("tasks", "--json").stdout)}
    assert listed["gsm8k"]["splits"]["main"] == {"train": 7473, "test": 1319}
    assert listed["mmlu"]["licence"] == "MIT" and listed["arc"]["source"] == "allenai/ai2_arc"


def test_options_that_exclude_each_other(demo_mid: Path, tmp_path: Path, chatdata: Callable) -> None:
    for arguments, error in [
        (("inspect", demo_mid, "--doc", 3, "--task", "demo_math"), "give --doc or --task, not both"),
        (("inspect", demo_mid, "--tokenizer", demo_mid), "--tokenizer goes with --conversation"),
        (
            ("build", "--stage", "mid", "--demo", "--data-dir", tmp_path),
            "--data-dir is given, but --demo reads no data",
        ),
        (("build", "--stage", "mid", "--data-dir", tmp_path / "typo"), "typo: no such folder"),
    ]:
        result = chatdata(*arguments)
        assert result.returncode == 2 and error in result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, chatdata.cli; print(sorted({'torch','polars','pyarrow','numpy','datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
